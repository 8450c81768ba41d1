"""The decoder: one module for every model, its layers stacked and scanned."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from fabric_kernels import BlockTable, Packing, table_matmul
from fabric_kernels.attention import Angles, cached_attention
from fabric_kernels.decoding import decode_layers
from fabric_kernels.ternary_matmul import (
    NARROW_PRODUCT,
    Implementation,
    side_implementation,
)
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.attention import Attention, AttentionChoice, Projected, attend
from fabric_jax.layers.bit_linear import (
    INIT_STD,
    LINEAR_OUTPUT,
    BaseMode,
    FloatFormat,
    LayerContext,
    LinearOptions,
)
from fabric_jax.layers.cross_entropy import tiled_cross_entropy
from fabric_jax.layers.feed_forward import FeedForward
from fabric_jax.layers.kv_cache import KVCache
from fabric_jax.layers.norm import GainStack, RMSNorm
from fabric_jax.layers.parameters import AdapterParam, BaseParam
from fabric_jax.layers.residuals import INT8_RESIDUAL, Twin, exact_form, joined, on_both
from fabric_jax.layers.table import declare_table, table_rows, table_value
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder_options import DecoderOptions as DecoderOptions
from fabric_jax.models.decoder_options import Remat as Remat
from fabric_jax.models.decoding import layer_stacks, writes_layers_out
from fabric_jax.models.offload import scan_offloaded
from fabric_jax.models.stacks import join_trees, split_packed
from fabric_jax.models.views import Views, cache_views, row_views
from fabric_jax.parallel.mesh import MeshShape


class Block(nnx.Module):
    """One layer: ``h += attention(norm(h))``, then ``h += mlp(norm(h))``.

    With post-norms what is added is normalised once more.
    """

    def __init__(self, config: ModelConfig, options: LinearOptions) -> None:
        """Declares the parameters, stacked as ``options.stack`` says."""
        sub_norm_eps = config.norm_eps if config.sub_norms else None
        norm = partial(_norm, config, options, options.stack)
        self.attention_norm = norm()
        self.attention = Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sub_norm_eps=sub_norm_eps,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            norm_offset=config.norm_offset,
            options=options,
        )
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = FeedForward(
            hidden_size=config.hidden_size,
            ffn_size=config.ffn_size,
            activation=config.activation,
            sub_norm_eps=sub_norm_eps,
            norm_offset=config.norm_offset,
            options=options,
        )
        self.mlp_post_norm = norm() if config.post_norms else None

    def project(
        self, h: jax.Array, angles: Angles | None, context: LayerContext | None
    ) -> tuple[Projected, jax.Array]:
        """Queries, keys and values of the residual stream ``h`` [B, T, D], and ``h`` itself.

        See ``Attention``: :meth:`combine` takes the ``h`` that is returned.
        """
        projected, stream = self.attention.project(self.attention_norm, h, angles, context)
        return projected, cast(jax.Array, stream)

    def combine(
        self,
        h: jax.Array,
        attended: Float[Array, "B T H hd"] | Twin,
        context: LayerContext | None,
    ) -> jax.Array:
        """The residual stream after attention and feed-forward."""
        if self.attention_post_norm is None:
            middle = self.attention.close(attended, context, residual=h)
        else:
            change = self.attention.close(attended, context)
            middle = on_both(jnp.add, h, on_both(self.attention_post_norm, change))
        if self.mlp_post_norm is None:
            return joined(self.mlp(middle, context, self.mlp_norm, residual=middle))
        change = self.mlp(middle, context, self.mlp_norm)
        return joined(on_both(jnp.add, middle, on_both(self.mlp_post_norm, change)))

    def know_gains(self, stacks: dict[str, Any]) -> None:
        """Tells norms of the gains of all layers: a step of decoding reads them where they lie.

        Args:
            stacks: the layers' parameters as they are declared, stacked.
        """
        for norm, gains in (
            (self.attention_norm, stacks["attention_norm"]),
            (self.attention.sub_norm, stacks["attention"].get("sub_norm")),
            (self.mlp_norm, stacks["mlp_norm"]),
            (self.mlp.sub_norm, stacks["mlp"].get("sub_norm")),
        ):
            if norm is not None and gains is not None:
                norm.whole = GainStack(gains["gain"])


def _norm(
    config: ModelConfig, options: LinearOptions | DecoderOptions, stack: tuple[int, ...]
) -> RMSNorm:
    """A norm of the residual stream."""
    return RMSNorm(
        config.hidden_size,
        eps=config.norm_eps,
        dtype=options.norm_dtype or options.dtype,
        stack=stack,
        offset=config.norm_offset,
        implementation=options.sides or side_implementation(options.implementation),
    )


class Decoder(nnx.Module):
    """Tokens to hidden states, logits and losses.

    Parameters are two trees, base and adapter; ``DecoderDefinition.bind`` puts them together.
    """

    def __init__(self, config: ModelConfig, options: DecoderOptions) -> None:
        """Declares every parameter; allocates none."""
        stacked = LinearOptions(
            mode=options.mode,
            packing=options.packing,
            dtype=options.dtype,
            act_quant=options.act_quant,
            implementation=options.implementation,
            lora=options.lora,
            stack=(config.num_layers,),
            gradient_bits=options.gradient_bits,
            float_format=options.float_format,
            mesh=options.mesh,
            norm_dtype=options.norm_dtype,
            ste=options.ste,
            sides=options.sides,
        )
        table = (config.vocab_size, config.hidden_size)
        table_dtype = options.embedding_dtype or options.dtype
        self.embedding = declare_table(table, table_dtype, INIT_STD)
        self.layers = Block(config, stacked)
        self.final_norm = _norm(config, options, ())
        self.head = None if config.tied_head else declare_table(table, table_dtype, INIT_STD)
        self.config = config
        self.dtype = options.dtype
        self.remat: Remat = options.remat
        self.frozen_linears = options.frozen
        self.loss_tile_bytes = options.loss_tile_bytes
        self.round_logits = options.round_logits
        self.unroll = options.unroll
        self.whole_step = options.whole_step
        self.attention_choice: AttentionChoice = options.attention
        # The implementation is named for packed products; others have no choice of theirs.
        self.attention_runs: Implementation | None = options.sides or (
            options.implementation if options.mode == "packed" else None
        )

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
        dropout_key: jax.Array | None = None,
        strength: Float[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; a token sees the tokens before it in its own segment.

        ``strength`` says how far master weights and their inputs are quantised, None for entirely.
        """
        views = row_views(self.config, positions, segment_ids)
        return self._run(tokens, positions, views, None, dropout_key, strength=strength)[0]

    def extend(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        cache: KVCache,
        *,
        slots: int | None = None,
        adapter_ids: Int32[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Final hidden states of tokens that continue what ``cache`` holds, and the new cache.

        ``slots`` says that no position lies beyond that many slots, so that the others needn't be
        looked at. With ``adapter_ids`` the adapter is a stack of several (``layers.lora``), of
        which each row has its own.
        """
        views = cache_views(self.config, positions, slots or cache.capacity)
        whole = layer_stacks(
            *(self.layers, self.config, cache, tokens.shape, self.whole_step), self.dtype
        )
        if whole is not None:
            stacks, implementation = whole
            h, cache = decode_layers(
                *(self.embed(tokens), stacks, cache, positions),
                angles=views.of_global.angles,
                scale=self.config.attention_scale,
                implementation=implementation,
            )
            return self.final_norm(h), cache
        hidden, cache_or_none = self._run(tokens, positions, views, cache, None, adapter_ids)
        assert cache_or_none is not None
        return hidden, cache_or_none

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of final hidden states."""
        return table_matmul(hidden, self.head_weight())

    def loss(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int32[Array, "B T"],
        weights: Float[Array, "B T"],
        *,
        train_head: bool = False,
        z_loss: float = 0.0,
    ) -> Float[Array, ""]:
        """Sum of the weighted next-token losses, nats, without all logits at once."""
        return tiled_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.head_weight(),
            targets.reshape(-1),
            weights.reshape(-1),
            train_head=train_head,
            z_loss=z_loss,
            tile_bytes=self.loss_tile_bytes,
            round_logits=self.round_logits,
        )

    def head_weight(self) -> Float[Array, "V D"] | BlockTable:
        """The matrix of the head: its own, or the embedding."""
        return table_value(self.embedding if self.head is None else self.head)

    def embed(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream that enters the first layer."""
        h = table_rows(self.embedding, tokens, self.dtype)
        if self.config.embedding_scale:
            h = h * jnp.asarray(math.sqrt(self.config.hidden_size), h.dtype)
        return h

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        views: Views,
        cache: KVCache | None,
        dropout_key: jax.Array | None,
        adapter_ids: jax.Array | None = None,
        strength: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        graphdef, *states = nnx.split(self.layers, AdapterParam, BaseParam)
        adapter, base = (nnx.to_pure_dict(state) for state in states)
        packed, base = split_packed(base, self.frozen_linears)
        stacked = base
        h = self.embed(tokens)
        if self.remat == "offload" and cache is None:
            consts = (packed, positions, views, dropout_key, strength)
            layer = partial(self._layer_of, graphdef)
            h = scan_offloaded(layer, h, (adapter, base), consts, unroll=self.unroll)
            return self.final_norm(h), None

        def body(
            carry: tuple[jax.Array, KVCache | None], layer: tuple[jax.Array, tuple[Any, ...]]
        ) -> tuple[tuple[jax.Array, KVCache | None], None]:
            h, cache = carry
            index, trees = layer
            adapter, base = trees
            block: Block = nnx.merge(graphdef, adapter, join_trees(packed, base))
            if cache is not None and tokens.shape[1] == 1:
                block.know_gains(stacked)
            context = self._context(index, cache, dropout_key, adapter_ids, strength)
            return self._layer(block, h, context, positions, views, cache), None

        unroll = self.unroll
        if cache is not None:
            unroll |= writes_layers_out(self.layers, tokens.shape)
        # Constants where the layers are written out, which cost no kernel.
        indices = jnp.asarray(np.arange(self.config.num_layers, dtype=np.int32))
        layers = (indices, (adapter, base))
        (h, cache), _ = lax.scan(self._recomputed(body), (h, cache), layers, unroll=unroll)
        return self.final_norm(h), cache

    def _recomputed(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of a scan over layers, whose backward pass keeps what ``remat`` says."""
        keep = jax.checkpoint_policies.save_only_these_names
        # A loop keeps XLA from taking what is recomputed for what is there already.
        recomputed = partial(jax.checkpoint, prevent_cse=self.unroll)
        match self.remat:
            case "none" | "offload":
                return body
            case "linears":
                return recomputed(body, policy=keep(LINEAR_OUTPUT, NARROW_PRODUCT))
            case "int8-residuals":
                return recomputed(body, policy=keep(INT8_RESIDUAL, NARROW_PRODUCT))
            case "layer":
                return recomputed(body)

    def _layer_of(
        self,
        graphdef: nnx.GraphDef[Block],
        h: jax.Array,
        index: jax.Array,
        trees: tuple[Any, Any],
        consts: Any,
    ) -> jax.Array:
        """The residual stream after one layer, all arrays of which are among the arguments."""
        adapter, base = trees
        packed, positions, views, dropout_key, strength = consts
        block = nnx.merge(graphdef, adapter, join_trees(packed, base))
        context = self._context(index, None, dropout_key, None, strength)
        return self._layer(block, h, context, positions, views, None)[0]

    def layer_function(
        self,
        positions: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
        dropout_key: jax.Array | None = None,
    ) -> Callable[[jax.Array, jax.Array, dict[str, Any]], jax.Array]:
        """One layer as ``(h, index, adapter) -> h``, for loops over layers that are not a forward.

        ``h`` [B, T, D] is the residual stream, ``adapter`` the layer's own adapter parameters. The
        base is read where it lies in this decoder.
        """
        graphdef, _, state = nnx.split(self.layers, AdapterParam, BaseParam)
        packed, rest = split_packed(nnx.to_pure_dict(state), self.frozen_linears)
        views = row_views(self.config, positions, segment_ids)

        def layer(h: jax.Array, index: jax.Array, adapter: dict[str, Any]) -> jax.Array:
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), rest)
            block: Block = nnx.merge(graphdef, adapter, join_trees(packed, own))
            context = self._context(index, None, dropout_key, None)
            return self._layer(block, h, context, positions, views, None)[0]

        return layer

    def _context(
        self,
        index: jax.Array,
        cache: KVCache | None,
        dropout_key: jax.Array | None,
        adapter_ids: jax.Array | None,
        strength: jax.Array | None = None,
    ) -> LayerContext:
        """What layer ``index`` knows besides its parameters."""
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        # A cache takes its keys and values as they are; nothing is differentiated there.
        rounds = self.remat == "int8-residuals" and cache is None
        return LayerContext(
            index=index,
            dropout_key=key,
            int8_residuals=rounds,
            adapter_ids=adapter_ids,
            strength=strength,
        )

    def _layer(
        self,
        block: Block,
        h: jax.Array,
        context: LayerContext,
        positions: jax.Array,
        views: Views,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The residual stream after one layer, and the cache with its keys and values."""
        index = context.index
        assert index is not None
        view, scale = views.at(index), self.config.attention_scale
        if cache is not None and positions.shape[1] == 1:
            projected, h = block.project(h, None, context)
            q, k, v = map(exact_form, projected)
            attended, cache = cached_attention(
                *(q, k, v, cache, index, positions),
                angles=view.angles,
                first=view.first,
                scale=scale,
                implementation=self.attention_runs,
            )
            return block.combine(h, attended, context), cache
        # A cache holds keys that are turned; without one it is left to the attention.
        early, late = (None, view.angles) if cache is None else (view.angles, None)
        (q, k, v), h = block.project(h, early, context)
        if cache is not None:
            cache = cache.write(index, positions, exact_form(k), exact_form(v))
            k, v = cache.read(index, h.dtype, view.mask.shape[-1])
        choice: AttentionChoice = self.attention_choice if cache is None else "auto"
        core = partial(attend, mask=view.mask, scale=scale, angles=late, choice=choice)
        attended = on_both(core, q, k, v, implementation=self.attention_runs)
        return block.combine(h, attended, context), cache


@dataclass(frozen=True, kw_only=True)
class DecoderDefinition:
    """A decoder without its numbers: what binds the two parameter trees to code.

    Attributes:
        config: what the model is.
        options: how it is stored and computed.
        graphdef: the module's static structure.
        base: abstract base parameters (shapes, dtypes, initializers).
        adapter: abstract adapter parameters.
    """

    config: ModelConfig
    options: DecoderOptions
    graphdef: nnx.GraphDef[Decoder]
    base: nnx.State[Any, Any]
    adapter: nnx.State[Any, Any]

    def bind(self, base: dict[str, Any], adapter: dict[str, Any]) -> Decoder:
        """The decoder over these trees of arrays; callable inside ``jit`` and ``grad``."""
        return nnx.merge(self.graphdef, adapter, base)

    def on_mesh(self, mesh: MeshShape) -> "DecoderDefinition":
        """The same decoder where its trees are cut along a mesh; see ``DecoderOptions.mesh``."""
        if mesh == self.options.mesh:
            return self
        return define_decoder(self.config, replace(self.options, mesh=mesh))


def define_decoder(config: ModelConfig, options: DecoderOptions) -> DecoderDefinition:
    """The definition of a decoder; no array is made."""
    if options.mode not in get_args(BaseMode):
        raise unknown_name("mode of the weights", options.mode, get_args(BaseMode))
    if options.packing not in get_args(Packing):
        raise unknown_name("packing of the weights", options.packing, get_args(Packing))
    if options.float_format not in get_args(FloatFormat):
        raise unknown_name("format of floats", options.float_format, get_args(FloatFormat))
    if options.mode != "float" and options.float_format != "same":
        raise FabricError(
            f"{config.name} has no float weights to be stored as {options.float_format}",
            expected="the mode 'float'",
            found=f"the mode {options.mode!r}",
        )
    if options.mode != "float" and not config.ternary:
        raise FabricError(
            f"{config.name} is not a ternary model",
            expected="float weights",
            found=f"the mode {options.mode!r}",
        )
    decoder = Decoder(config, options)
    graphdef, adapter, base = nnx.split(decoder, AdapterParam, BaseParam)
    return DecoderDefinition(
        config=config, options=options, graphdef=graphdef, base=base, adapter=adapter
    )
