"""How a decoder is stored and computed: everything that may be chosen."""

from dataclasses import dataclass, field
from typing import Literal

from fabric_kernels import Packing
from fabric_kernels.ternary_matmul import GradientBits, Implementation, SideImplementation
from jax.typing import DTypeLike

from fabric_jax.layers.attention import AttentionChoice
from fabric_jax.layers.bit_linear import BaseMode, FloatFormat, is_frozen
from fabric_jax.layers.cross_entropy import LOGITS_TILE_BYTES
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.parallel.mesh import MeshShape
from fabric_jax.quantization.absmax import ActQuant
from fabric_jax.quantization.ste_options import SteOptions

Remat = Literal["none", "linears", "int8-residuals", "layer", "offload"]
"""What the backward pass keeps of a layer: everything, the outputs of its linears (norms, gates and
attention are recomputed, no product with a weight is), int8 codes of these outputs, its input
alone, or that in the host's memory. Codes leave the loss as it is; gradients are computed from
rounded values."""


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How a model is stored and computed, as opposed to what it is (``ModelConfig``).

    Attributes:
        mode: form of the linears' weights. A model that is not ternary has only ``float``.
        packing: layout of packed weights: 2 or 1.6 bits each. Results are the same, bit for bit.
        dtype: of activations, norms and float weights.
        embedding_dtype: of embedding and head as they are stored: a float dtype, ``"int8"`` or
            ``"int4"`` (frozen codes with scales); None for ``dtype``.
        act_quant: quantiser of the inputs of ternary linears.
        implementation: which ``ternary_matmul`` runs; ``None`` picks the best for the device.
        remat: what the backward pass recomputes.
        lora: adapters; rank 0 for none.
        gradient_bits: width of gradients in the backward product through packed weights on CPU: 16
            (fixed point, about twice as fast) or 24 (as exact as float32).
        float_format: of linears in the mode ``float`` as they are stored; ``same`` is ``dtype``,
            any other than that is frozen.
        mesh: what ternary weights are cut along. Such a decoder runs within ``shard_map``, bound to
            parts of the trees that are declared (``fabric_jax.parallel``).
        norm_dtype: of the gains of norms as they are stored; None for ``dtype``.
        ste: what master weights and their inputs go through.
        loss_tile_bytes: float32 logits that exist at once; accelerators want large tiles.
        round_logits: round the logits of losses to ``dtype``, see ``layers.cross_entropy``; for
            large tiles.
        sides: what runs norms, gates and attention; None: what goes with ``implementation``. Named,
            the products alone differ between implementations, and their exact sums are comparable.
        attention: ``auto``: ours; or cuDNN's flash attention, for half precision on NVIDIA GPUs:
            ``cudnn``, and ``cudnn-causal`` for rows that are one document each (no mask is read).
        unroll: write the layers out one after another instead of looping over them. What is kept
            for the backward pass is then left where it was computed; a loop copies it into stacks,
            which it fills with zeros before. Faster on accelerators; compilation grows with depth.
        whole_step: decode through all layers in one launch (``fabric_kernels.decoding``), on CUDA
            GPUs and, in float32, on CPU, of a few rows and without adapters; where that is not
            possible, True raises. None: on Hopper and on CPU, of one row, where it is possible.
    """

    mode: BaseMode = "packed"
    packing: Packing = "ternary2"
    dtype: DTypeLike = "float32"
    act_quant: ActQuant = "per_token"
    implementation: Implementation | None = None
    remat: Remat = "none"
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=0))
    gradient_bits: GradientBits = 16
    embedding_dtype: DTypeLike | None = None
    float_format: FloatFormat = "same"
    mesh: MeshShape = field(default_factory=MeshShape)
    norm_dtype: DTypeLike | None = None
    ste: SteOptions = field(default_factory=SteOptions)
    loss_tile_bytes: int = LOGITS_TILE_BYTES
    round_logits: bool = False
    attention: AttentionChoice = "auto"
    sides: SideImplementation | None = None
    unroll: bool = False
    whole_step: bool | None = None

    @property
    def frozen(self) -> bool:
        """Whether the linears can't be trained."""
        return is_frozen(self.mode, self.float_format, self.dtype)
