"""The linear layer of a BitNet, in the three forms its weight can take."""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from fabric_kernels import packed_width
from fabric_kernels.ternary_matmul import Implementation
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from fabric_jax.layers.dot import linear
from fabric_jax.layers.lora import Lora, LoraConfig
from fabric_jax.layers.parameters import Constant, Normal, RandomTernary, declare_base
from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.packed_linear import packed_linear
from fabric_jax.quantization.straight_through import fake_quantize_activation, quantize_weight

BaseMode = Literal["packed", "master", "float"]
"""``packed``: frozen 2-bit codes. ``master``: float weights, quantised in every forward pass with
straight-through gradients. ``float``: a plain linear without quantisers."""

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
    """

    mode: BaseMode
    dtype: DTypeLike
    act_quant: ActQuant
    implementation: Implementation | None
    lora: LoraConfig
    stack: tuple[int, ...]


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
                    (n, packed_width(k)), jnp.uint8, RandomTernary(k), stack=stack
                )
                self.scale = declare_base((), jnp.float32, scale, stack=stack)
            case "master":
                self.weight = declare_base((n, k), jnp.float32, Normal(INIT_STD), stack=stack)
            case "float":
                self.weight = declare_base((n, k), options.dtype, Normal(INIT_STD), stack=stack)
        self.lora = Lora(n, k, options.lora, stack=stack) if options.lora.covers(name) else None
        self.mode: BaseMode = options.mode
        self.act_quant: ActQuant = options.act_quant
        self.implementation: Implementation | None = options.implementation
        self.stream = zlib.crc32(name.encode())

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[..., K] to [..., N] in the dtype of ``x``."""
        y = self._base(x)
        if self.lora is not None:
            if dropout_key is not None:
                dropout_key = jax.random.fold_in(dropout_key, self.stream)
            y = y + self.lora(x, dropout_key)
        return checkpoint_name(y, LINEAR_OUTPUT)

    def _base(self, x: jax.Array) -> jax.Array:
        match self.mode:
            case "packed":
                return packed_linear(
                    x,
                    self.weight[...],
                    self.scale[...],
                    act_quant=self.act_quant,
                    implementation=self.implementation,
                )
            case "master":
                values = fake_quantize_activation(x, self.act_quant)
                return linear(values, quantize_weight(self.weight[...]))
            case "float":
                return linear(x, self.weight[...])
