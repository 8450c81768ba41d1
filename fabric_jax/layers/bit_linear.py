"""The linear layer of a BitNet, in the three forms its weight can take."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import jax
import jax.numpy as jnp
from fabric_kernels import (
    BlockTable,
    FrozenWeight,
    LowRank,
    Packing,
    Prologue,
    TernaryWeight,
    frozen_matmul,
    low_rank_product,
    packed_width,
)
from fabric_kernels.ternary_matmul import (
    GradientBits,
    Implementation,
    SideImplementation,
    adapted_after,
    normalises,
    side_implementation,
)
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from fabric_jax.layers.dot import linear
from fabric_jax.layers.lora import Lora, LoraConfig
from fabric_jax.layers.norm import RMSNorm
from fabric_jax.layers.parameters import Constant, Normal, RandomTernary, declare_base
from fabric_jax.layers.residuals import Twin, as_codes, exact_form, joined, on_both
from fabric_jax.layers.table import declare_blocks, table_bits
from fabric_jax.parallel.axes import Cut, cut_of
from fabric_jax.parallel.linears import Plan, partitioned_linears
from fabric_jax.parallel.masters import gather_parts, quantize_parts
from fabric_jax.parallel.mesh import MeshShape
from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.master_group import packed_masters
from fabric_jax.quantization.master_linear import master_linear
from fabric_jax.quantization.packed_linear import packed_linears
from fabric_jax.quantization.ste_options import SteOptions
from fabric_jax.quantization.straight_through import fake_quantize_activation

BaseMode = Literal["packed", "master", "float"]
"""``packed``: frozen codes of 2 or 1.6 bits. ``master``: float weights, quantised in every forward
pass with straight-through gradients. ``float``: a plain linear without quantisers."""

FloatFormat = Literal["same", "float32", "bfloat16", "float16", "int8", "int4"]
"""How plain linears are stored: in the dtype of the activations (``same``), in a float dtype, or as
integers with a float16 scale for each 32 inputs. What isn't in that dtype is frozen."""

INIT_STD = 0.02
LINEAR_OUTPUT = "linear"
"""The name under which rematerialisation policies know the output of a linear."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """What all linears of a model share.

    Attributes:
        mode: the form of the weights.
        dtype: of float weights; master weights are float32 whatever it says.
        act_quant: quantiser of the inputs in the ternary modes.
        implementation: which ``ternary_matmul`` runs; ``None`` picks.
        lora: adapters.
        stack: (L,) where L layers are stacked, () for one.
        gradient_bits: of the backward product through packed weights on CPU.
        packing: layout of packed weights.
        float_format: how weights in the mode ``float`` are stored.
        mesh: what ternary weights are cut along; arrays are then parts, within ``shard_map``.
        norm_dtype: of the gains of norms; None for ``dtype``.
        ste: what masters and their inputs go through.
        sides: what runs norms and gates; None: what goes with ``implementation``.
    """

    mode: BaseMode
    dtype: DTypeLike
    act_quant: ActQuant
    implementation: Implementation | None
    lora: LoraConfig
    stack: tuple[int, ...]
    gradient_bits: GradientBits = 16
    packing: Packing = "ternary2"
    float_format: FloatFormat = "same"
    mesh: MeshShape = field(default_factory=MeshShape)
    norm_dtype: DTypeLike | None = None
    ste: SteOptions = field(default_factory=SteOptions)
    sides: SideImplementation | None = None

    @property
    def side(self) -> SideImplementation | None:
        """What runs norms and gates; None picks."""
        return self.sides or side_implementation(self.implementation)


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a layer of a stack knows besides its parameters.

    Attributes:
        index: int32 []. Packed weights, and floats in a format of their own, are then whole stacks
            [L, ...], of which this layer is read where it lies; every other parameter is the
            layer's own. None: so are these.
        dropout_key: of this layer; None for no dropout.
        int8_residuals: whether outputs of linears are twins, see ``layers.residuals``.
        adapter_ids: int32 [B], which adapter of a stack each row of the batch has; None for the
            one adapter that there is.
        strength: float32 [], how far masters are quantised yet; None for entirely.
    """

    index: jax.Array | None = None
    dropout_key: jax.Array | None = None
    int8_residuals: bool = False
    adapter_ids: jax.Array | None = None
    strength: jax.Array | None = None


def float_dtype(float_format: FloatFormat, dtype: DTypeLike) -> str:
    """The dtype that plain linears are stored in, by name, ``int8`` and ``int4`` included."""
    return jnp.dtype(dtype).name if float_format == "same" else float_format


def is_frozen(mode: BaseMode, float_format: FloatFormat, dtype: DTypeLike) -> bool:
    """Whether linears can't be trained: packed ones, and floats in a format of their own."""
    if mode == "float":
        return float_dtype(float_format, dtype) != jnp.dtype(dtype).name
    return mode == "packed"


class BitLinear(nnx.Module):
    """``y = q(x) · q(W)^T``, plus the adapter's share where the layer is a LoRA target."""

    def __init__(self, name: str, n: int, k: int, options: LinearOptions) -> None:
        """Declares the weight [n, k] of the linear that adapters know as ``name``."""
        stack = options.stack
        match options.mode:
            case "packed":
                # The absmean of Gaussian weights with the usual standard deviation.
                scale = Constant(INIT_STD * math.sqrt(2 / math.pi))
                self.weight = declare_base(
                    (n, packed_width(k, options.packing)),
                    jnp.uint8,
                    RandomTernary(k, options.packing),
                    stack=stack,
                )
                self.scale = declare_base((), jnp.float32, scale, stack=stack)
            case "master":
                self.weight = declare_base((n, k), jnp.float32, Normal(INIT_STD), stack=stack)
            case "float":
                stored = float_dtype(options.float_format, options.dtype)
                bits = table_bits(stored)
                if bits is None:
                    self.weight = declare_base((n, k), stored, Normal(INIT_STD), stack=stack)
                else:
                    self.codes, self.scales = declare_blocks(n, k, bits, INIT_STD, stack=stack)
        covered = options.lora.covers(name)
        self.lora = (
            Lora(n, k, options.lora.of(name), stack=stack, mesh=options.mesh) if covered else None
        )
        self.cut = Cut()
        if options.mode != "float":
            width = packed_width(k, options.packing) if options.mode == "packed" else k
            self.cut = cut_of(name, n, width, options.mesh)
        self.k = k
        self.name = name
        self.options = options
        self.stream = zlib.crc32(name.encode())

    def __call__(
        self, x: jax.Array | Twin, context: LayerContext | None = None
    ) -> jax.Array | Twin:
        """[..., K] to [..., N] in the dtype of ``x``."""
        return apply_together([self], x, context)[0]

    def packed(self, context: LayerContext | None) -> TernaryWeight:
        """The frozen weight; only in the mode ``packed``."""
        index = None if context is None else context.index
        packing = self.options.packing
        return TernaryWeight(self.weight[...], self.scale[...], index, self.k, packing)

    def frozen(self, context: LayerContext | None) -> FrozenWeight:
        """The frozen weight; only in the mode ``float`` with a format of its own."""
        index = None if context is None else context.index
        if table_bits(self.options.float_format) is None:
            return FrozenWeight(self.weight[...], index)
        return FrozenWeight(BlockTable(self.codes[...], self.scales[...], self.k), index)

    def unpacked(self, x: jax.Array, context: LayerContext | None) -> jax.Array:
        """The base's share of the output; only in the other modes."""
        options = self.options
        if is_frozen(options.mode, options.float_format, options.dtype):
            return frozen_matmul(x, self.frozen(context))
        if options.mode == "float":
            return linear(x, self.weight[...])
        key = self.own_key(context)
        strength = None if context is None else context.strength
        weight = self.weight[...]
        if self.cut != Cut():
            if strength is None and replace(options.ste, product="float") == SteOptions():
                values = fake_quantize_activation(x, options.act_quant)
                return linear(values, quantize_parts(self.cut, weight))
            weight = cast(jax.Array, gather_parts(self.cut, weight))
        return master_linear(
            x,
            weight,
            name=self.name,
            act_quant=options.act_quant,
            ste=options.ste,
            key=key,
            strength=strength,
        )

    def own_key(self, context: LayerContext | None) -> jax.Array | None:
        """Random numbers of this linear in this layer; None where nothing is random."""
        key = _key(context)
        return None if key is None else jax.random.fold_in(key, self.stream)

    def product(self, context: LayerContext | None) -> LowRank | None:
        """The adapter as arrays; None where there is none, it drops channels, or rows differ."""
        if self.lora is None or (self.lora.dropout > 0 and _key(context) is not None):
            return None
        if context is not None and context.adapter_ids is not None:
            return None
        return self.lora.product

    def finish(
        self, x: jax.Array | Twin, y: jax.Array, context: LayerContext | None
    ) -> jax.Array | Twin:
        """``y`` plus the share of an adapter that is not in it yet, in the form that is kept."""
        if self.lora is not None and context is not None and context.adapter_ids is not None:
            y = y + self.lora.of_rows(exact_form(x), context.adapter_ids)
        elif self.lora is not None and self.product(context) is None:
            key = _key(context)
            assert key is not None
            y = y + joined(on_both(self.lora, x, jax.random.fold_in(key, self.stream)))
        if context is not None and context.int8_residuals:
            return as_codes(y)
        return checkpoint_name(y, LINEAR_OUTPUT)


def apply_after(
    norm: RMSNorm | None,
    linears: Sequence[BitLinear],
    x: jax.Array | Twin,
    context: LayerContext | None,
    residual: jax.Array | Twin | None = None,
) -> list[jax.Array | Twin]:
    """The outputs of linears that share ``norm(x)``; that of one alone, added to a residual.

    Some kernels compute all of it on the way.
    """
    prologue = Prologue() if norm is None else norm.prologue
    if prologue is not None and takes_prologue(linears, x, context, prologue):
        return apply_together(linears, x, context, prologue, residual)
    outputs = apply_together(linears, x if norm is None else on_both(norm, x), context)
    return outputs if residual is None else [on_both(jnp.add, residual, outputs[0])]


def apply_beside(
    norm: RMSNorm | None,
    linears: Sequence[BitLinear],
    x: jax.Array | Twin,
    context: LayerContext | None,
) -> tuple[list[jax.Array | Twin], jax.Array | Twin]:
    """:func:`apply_after`, and ``x`` for what else reads it: see ``RMSNorm.beside``."""
    prologue = None if norm is None else norm.prologue
    if norm is None or isinstance(x, Twin):
        return apply_after(norm, linears, x, context), x
    if prologue is None or not takes_prologue(linears, x, context, prologue):
        normal, x = norm.beside(x)
        return apply_together(linears, normal, context), x
    if not _normalises(linears, x, context, prologue):
        return apply_together(linears, x, context, prologue), x
    weights = [one.packed(context) for one in linears]
    adapters = [one.product(context) for one in linears]
    *outputs, x = adapted_after(x, prologue, weights, adapters, beside=True)
    return [one.finish(x, y, context) for one, y in zip(linears, outputs, strict=True)], x


def takes_prologue(
    linears: Sequence[BitLinear],
    x: jax.Array | Twin,
    context: LayerContext | None,
    prologue: Prologue,
) -> bool:
    """Whether linears do the prologue: nothing but their kernels reads their input, or keeps it."""
    options = linears[0].options
    packed = options.mode == "packed" or packs_masters(linears, context)
    quantized = packed and options.act_quant == "per_token" and options.sides is None
    kept = isinstance(x, Twin) or (context is not None and context.int8_residuals)
    whole = all(one.cut == Cut() for one in linears)
    if not quantized or not whole or kept:
        return False
    plain = all(one.lora is None for one in linears)
    return plain or _normalises(linears, x, context, prologue)


def _normalises(
    linears: Sequence[BitLinear],
    x: jax.Array | Twin,
    context: LayerContext | None,
    prologue: Prologue,
) -> bool:
    """Whether a kernel normalises and quantises the input at once, and adapters are arrays."""
    options = linears[0].options
    if options.mode != "packed" or isinstance(x, Twin):
        return False
    if any(one.lora is not None and one.product(context) is None for one in linears):
        return False
    weights = [one.packed(context) for one in linears]
    return normalises(x, prologue, weights, options.implementation)


def apply_together(
    linears: Sequence[BitLinear],
    x: jax.Array | Twin,
    context: LayerContext | None = None,
    prologue: Prologue | None = None,
    residual: jax.Array | Twin | None = None,
) -> list[jax.Array | Twin]:
    """The outputs of linears that share their input: it is quantised once.

    A prologue, and for one linear a residual, may be given where :func:`takes_prologue` says so.
    """
    options = linears[0].options
    products = [one.product(context) for one in linears]
    cuts = tuple(one.cut for one in linears)
    if options.mode == "packed" and any(cut != Cut() for cut in cuts):
        outputs = partitioned_linears(
            Plan(
                cuts=cuts,
                tensor=options.mesh.tensor,
                act_quant=options.act_quant,
                implementation=options.implementation,
                gradient_bits=options.gradient_bits,
            ),
            exact_form(x),
            [one.packed(context) for one in linears],
            products,
            kept=x.kept if isinstance(x, Twin) else None,
        )
    elif options.mode == "packed":
        outputs = packed_linears(
            exact_form(x),
            [one.packed(context) for one in linears],
            products,
            prologue=prologue,
            residual=None if residual is None else exact_form(residual),
            kept=x.kept if isinstance(x, Twin) else None,
            act_quant=options.act_quant,
            implementation=options.implementation,
            gradient_bits=options.gradient_bits,
        )
    else:
        bases = _unpacked_together(linears, x, context, prologue)
        if residual is not None:
            bases = [exact_form(residual) + bases[0]]
        outputs = [
            y if adapter is None else y + joined(on_both(low_rank_product, x, adapter))
            for y, adapter in zip(bases, products, strict=True)
        ]
    return [one.finish(x, y, context) for one, y in zip(linears, outputs, strict=True)]


def packs_masters(linears: Sequence[BitLinear], context: LayerContext | None) -> bool:
    """Whether masters are packed in every forward pass, which is what their variant asks for."""
    options = linears[0].options
    asked = options.mode == "master" and options.ste.product == "packed"
    whole = context is None or (context.strength is None and not context.int8_residuals)
    cut = any(one.cut != Cut() for one in linears)
    return asked and whole and options.act_quant == "per_token" and not cut


def _unpacked_together(
    linears: Sequence[BitLinear],
    x: jax.Array | Twin,
    context: LayerContext | None,
    prologue: Prologue | None,
) -> Sequence[jax.Array]:
    """The base's share of each output; only in the modes other than ``packed``."""
    if isinstance(x, Twin) or not packs_masters(linears, context):
        assert prologue is None, "takes_prologue has said so"
        return [joined(on_both(one.unpacked, x, context)) for one in linears]
    options = linears[0].options
    return packed_masters(
        x,
        [one.weight[...] for one in linears],
        prologue=prologue,
        name=linears[0].name,
        ste=options.ste,
        keys=[one.own_key(context) for one in linears],
        implementation=options.implementation,
        gradient_bits=options.gradient_bits,
    )


def _key(context: LayerContext | None) -> jax.Array | None:
    return None if context is None else context.dropout_key
