"""Bytes of a training job by category: counted on the arrays, and predicted from dimensions."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from fabric_kernels import packed_width
from fabric_kernels.block_quantization import table_bytes

from fabric_jax.layers.bit_linear import float_dtype
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.layers.table import table_bits
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions
from fabric_jax.models.initialize import Tree

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class MemoryByCategory:
    """Bytes of each part of a job.

    Attributes:
        weights: of the linears in all layers; packed bytes where the model is packed, scales
            included where floats are stored as int8 or int4.
        scales: one float32 per packed matrix.
        embedding_and_head: one matrix where the head is tied; scales included where quantised.
        norms: gains.
        adapters: LoRA matrices.
        optimizer: its moments, and a few bytes of step counters.
        gradients: of the trained tree, float32. A compiled step keeps them among its temporaries,
            so they are only predicted.
        temporaries: scratch of the compiled step, gradients and activations included; None unless
            a compiled step was given.
    """

    weights: int
    scales: int
    embedding_and_head: int
    norms: int
    adapters: int
    optimizer: int
    gradients: int | None
    temporaries: int | None

    @property
    def base(self) -> int:
        """The base model: everything that LoRA leaves frozen."""
        return self.weights + self.scales + self.embedding_and_head + self.norms

    @property
    def total(self) -> int:
        """Everything known; gradients count where temporaries, which hold them, are not."""
        scratch = self.gradients if self.temporaries is None else self.temporaries
        return self.base + self.adapters + self.optimizer + (scratch or 0)

    def to_dict(self) -> dict[str, int | None]:
        """Category to bytes."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The same categories twice.

    Attributes:
        measured: from the device's own count of the arrays.
        predicted: from the model's dimensions, before any array exists.
    """

    measured: MemoryByCategory
    predicted: MemoryByCategory


@dataclass(frozen=True, kw_only=True)
class CompiledMemory:
    """What a compiled program needs on its device, in bytes, by XLA's own analysis."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """Arguments, outputs and temporaries; donated arguments, which become outputs, once."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


def memory_by_category(
    definition: DecoderDefinition,
    base: Tree,
    adapter: Tree,
    moments: Any,
    compiled: jax.stages.Compiled | None = None,
) -> MemoryReport:
    """Bytes of a job's arrays by category, beside the prediction.

    Args:
        definition: what the trees are parameters of.
        base: base weights.
        adapter: LoRA weights; empty where the base is trained.
        moments: the optimizer's state, () for none.
        compiled: the training step, for its temporaries.
    """
    parts = {"weights": 0, "scales": 0, "embedding_and_head": 0, "norms": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        parts[_category(path)] += leaf_bytes(leaf)
    measured = MemoryByCategory(
        **parts,
        adapters=tree_bytes(adapter),
        optimizer=tree_bytes(moments),
        gradients=None,
        temporaries=None if compiled is None else compiled_memory(compiled).temporaries,
    )
    return MemoryReport(
        measured=measured, predicted=predict_memory(definition.config, definition.options)
    )


def predict_memory(config: ModelConfig, options: DecoderOptions) -> MemoryByCategory:
    """The categories of a training job from dimensions alone; no array is made.

    What is trained is the adapter where there is one (its B alone where A is frozen), else a base
    that isn't packed. The gradient
    is float32, and so are AdamW's two moments; its step counters are not counted here.
    """
    item = jnp.dtype(options.dtype).itemsize
    shapes = config.linear_shapes.values()
    match options.mode:
        case "packed":
            weights = sum(n * packed_width(k, options.packing) for n, k in shapes)
            scales = FLOAT32_BYTES * len(shapes)
        case "master":
            weights, scales = sum(FLOAT32_BYTES * n * k for n, k in shapes), 0
        case "float":
            weights, scales = sum(_float_bytes(n, k, options) for n, k in shapes), 0
    weights, scales = config.num_layers * weights, config.num_layers * scales
    embedding = _table_bytes(config, options)
    norms = item * config.norm_parameters
    adapters = adapter_parameters(config, options.lora)
    trained = 0 if options.frozen else config.parameters
    if adapters:
        trained = adapter_parameters(config, options.lora, trained=True)
    return MemoryByCategory(
        weights=weights,
        scales=scales,
        embedding_and_head=embedding,
        norms=norms,
        adapters=adapters * jnp.dtype(options.lora.adapter_dtype).itemsize,
        optimizer=2 * FLOAT32_BYTES * trained,
        gradients=FLOAT32_BYTES * trained,
        temporaries=None,
    )


def _float_bytes(n: int, k: int, options: DecoderOptions) -> int:
    """Bytes of a plain linear [n, k] as it is stored."""
    dtype = float_dtype(options.float_format, options.dtype)
    bits = table_bits(dtype)
    return n * k * jnp.dtype(dtype).itemsize if bits is None else table_bytes(n, k, bits)


def _table_bytes(config: ModelConfig, options: DecoderOptions) -> int:
    """Bytes of embedding and head."""
    dtype = options.embedding_dtype or options.dtype
    bits = table_bits(dtype)
    if bits is None:
        return jnp.dtype(dtype).itemsize * config.embedding_parameters
    tables = 1 if config.tied_head else 2
    return tables * table_bytes(config.vocab_size, config.hidden_size, bits)


def adapter_parameters(config: ModelConfig, lora: LoraConfig, *, trained: bool = False) -> int:
    """Weights of the adapter that ``lora`` puts on a model: R · (N + K) for each linear.

    With ``trained`` only those that are trained: R · N where A is frozen.
    """
    named = {path.split(".")[-1]: shape for path, shape in config.linear_shapes.items()}
    only_b = trained and lora.freeze_a
    covered = [
        lora.of(name).rank * (n if only_b else n + k)
        for name, (n, k) in named.items()
        if lora.covers(name)
    ]
    return config.num_layers * sum(covered)


def f16_bytes(config: ModelConfig) -> int:
    """Bytes of all weights of the same model in 16 bits each."""
    return 2 * config.parameters


def tree_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on their devices."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(array: jax.Array) -> int:
    """Bytes of one array on its devices.

    Not ``nbytes``: that counts a whole byte for each element of a type narrower than one.
    """
    return int(array.on_device_size_in_bytes())


def compiled_memory(compiled: jax.stages.Compiled) -> CompiledMemory:
    """XLA's analysis of a compiled program.

    Raises:
        ValueError: the platform offers none.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this platform has no memory analysis of compiled programs")
    return CompiledMemory(
        arguments=int(stats.argument_size_in_bytes),
        outputs=int(stats.output_size_in_bytes),
        aliased=int(stats.alias_size_in_bytes),
        temporaries=int(stats.temp_size_in_bytes),
    )


def _category(path: tuple[Any, ...]) -> str:
    names = [str(part.key) for part in path]
    if names[0] in ("embedding", "head"):
        return "embedding_and_head"
    match names[-1]:
        case "gain":
            return "norms"
        case "scale":
            return "scales"
        case "weight" | "codes" | "scales":
            return "weights"
        case _:
            raise ValueError(f"no memory category for the parameter {'.'.join(names)}")
