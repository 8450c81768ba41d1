"""A decoder's layers as a step of decoding through all of them takes them."""

from typing import TYPE_CHECKING, cast, get_args

import jax
import jax.numpy as jnp
from fabric_kernels import Prologue
from fabric_kernels.decoding import Implementation, LayerStacks, fastest, picks_itself, why_not
from fabric_kernels.ternary_matmul import resolve, select_implementation
from jax.typing import DTypeLike

from fabric_jax.errors import FabricError
from fabric_jax.layers.bit_linear import BitLinear, takes_prologue
from fabric_jax.layers.kv_cache import KVCache
from fabric_jax.models.config import ModelConfig
from fabric_jax.parallel.axes import Cut

if TYPE_CHECKING:
    from fabric_jax.models.decoder import Block


def layer_stacks(
    layers: "Block",
    config: ModelConfig,
    cache: KVCache,
    shape: tuple[int, ...],
    wanted: bool | None,
    dtype: DTypeLike,
) -> tuple[LayerStacks, Implementation] | None:
    """The layers for ``decode_layers`` and what runs them; None where they go one by one.

    Args:
        layers: with stacks as parameters, no adapters.
        config: of the model.
        cache: of that many rows.
        shape: of the tokens [B, T]; more than one of a row always go layer by layer.
        wanted: ``DecoderOptions.whole_step``.
        dtype: of the residual stream.

    Raises:
        FabricError: it is wanted and not for such layers: no GPU's kernels nor the CPU's would run
            every product, or the layers are not Llama's or BitNet's (norms of heads or of
            what is added, windows).
    """
    rows, length = shape
    if length > 1 or wanted is False:
        return None
    reason = _why_not(layers, config, rows)
    if reason is None:
        implementation = _implementation(layers, rows)
        if implementation not in get_args(Implementation):
            reason = f"products of {rows} rows that {implementation} runs"
        else:
            chosen = cast(Implementation, implementation)
            if wanted is None and not picks_itself(rows, chosen):
                return None
            stacks = _stacks(layers, config)
            if chosen == "triton" and _is_free(layers):
                chosen = fastest(stacks, cache, rows, dtype)
            reason = why_not(stacks, cache, rows, chosen, dtype)
            if reason is None:
                return stacks, chosen
    if wanted is None:
        return None
    raise FabricError(
        "a step of decoding can't go through all layers in one launch here",
        expected="kernels of a GPU or of the CPU, layers as Llama's or BitNet's, no adapters",
        found=reason,
        fix="leave whole_step out",
    )


def writes_layers_out(layers: "Block", shape: tuple[int, ...]) -> bool:
    """Whether a step of decoding is to have its layers one after another instead of a loop.

    On a GPU all of its kernels are one graph then, where a loop launches one for each turn. This is
    for kernels that read stacks where they lie: a slice of anything else would be a kernel of its
    own, or be moved out of the loop over steps, all layers at once.

    Args:
        layers: with stacks as parameters.
        shape: of the tokens [B, T]; more than one of a row are no step.
    """
    rows, length = shape
    linears = _linears(layers)
    if length > 1 or jax.default_backend() != "gpu":
        return False
    if any(linear.options.mode != "packed" or linear.cut != Cut() for linear in linears):
        return False
    if any(linear.lora is not None for linear in linears):
        return False
    # Of stacks that 32 bits don't count, the layer is taken out.
    small = all(linear.weight[...].size < 1 << 31 for linear in linears)
    return small and _implementation(layers, rows) == "triton"


def _stacks(layers: "Block", config: ModelConfig) -> LayerStacks:
    attention, mlp = layers.attention, layers.mlp
    activation = mlp.activation
    assert activation != "gelu"
    return LayerStacks(
        **{linear.name: linear.packed(None) for linear in _linears(layers)},
        attention_gain=layers.attention_norm.gain[...],
        sub_gain=None if attention.sub_norm is None else attention.sub_norm.gain[...],
        mlp_gain=layers.mlp_norm.gain[...],
        mlp_sub_gain=None if mlp.sub_norm is None else mlp.sub_norm.gain[...],
        activation=activation,
        eps=config.norm_eps,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
    )


def _linears(layers: "Block") -> list[BitLinear]:
    attention, mlp = layers.attention, layers.mlp
    return [attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down]


def _why_not(layers: "Block", config: ModelConfig, rows: int) -> str | None:
    linears = _linears(layers)
    options = linears[0].options
    empty = jnp.zeros((rows, 1, config.hidden_size), layers.attention_norm.gain.dtype)
    if config.qk_norm or config.post_norms or config.sliding_window is not None:
        return "norms of heads or of what is added, or windows"
    if layers.mlp.activation == "gelu":
        return "another gate"
    if layers.attention_norm.offset:
        return "norms with an offset"
    plain = options.sides is None and all(linear.lora is None for linear in linears)
    if not plain or not takes_prologue(linears, empty, None, Prologue()):
        return "other weights than packed ones alone, or another quantiser"
    return None


def _is_free(layers: "Block") -> bool:
    """Whether nobody has named what runs the products."""
    return select_implementation(_linears(layers)[0].options.implementation) == "tuned"


def _implementation(layers: "Block", rows: int) -> str:
    """What runs the products; where they differ, all of them."""
    linears = _linears(layers)
    named = select_implementation(linears[0].options.implementation)
    runs = {resolve(named, "linear", rows, linear.packed(None)) for linear in linears}
    return " and ".join(sorted(runs))
