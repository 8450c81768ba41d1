"""A LoRA step of a named model in a named recipe, for the experiments that measure steps."""

from dataclasses import dataclass
from typing import Any, Literal

from fabric_jax.sweeps import current_platform

Recipe = Literal["seed", "ours", "smallest", "fast"]
RECIPES: tuple[Recipe, ...] = ("seed", "ours", "smallest", "fast")
BITNET = (
    *("bitnet-125m", "bitnet-350m", "bitnet-1b", "bitnet-1.5b", "bitnet-2.7b", "bitnet-3.8b"),
    *("bitnet-7b", "bitnet-13b"),
)


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One job.

    Attributes:
        model: registry name.
        weights: form of the linears.
        recipe: ``seed`` is what the published system does: nothing recomputed, all logits at once,
            float32 adapters and moments. ``ours`` recomputes layers, updates them within the
            backward pass and has a tile of logits at a time; activations are bfloat16 on
            accelerators, float32 on CPU. ``smallest`` is that with int8 embedding and moments.
            ``fast`` keeps everything, with a tile of logits at a time; on a CUDA device layers are
            written out one after another.
        rows: in a batch.
        length: positions in a row.
        rank: of LoRA on all linears.
        implementation: of the packed products.
    """

    model: str = "bitnet-1b"
    weights: str = "ternary2"
    recipe: Recipe = "ours"
    rows: int = 1
    length: int = 128
    rank: int = 8
    implementation: str = "auto"


def memory_config(cell: StepConfig) -> Any:
    """The ``MemoryConfig`` of a cell."""
    from fabric_jax.layers import cross_entropy
    from fabric_jax.layers.lora import LoraConfig
    from fabric_jax.training.config import OptimizerConfig
    from fabric_jax.training.memory_account import MemoryConfig

    if cell.recipe == "seed":
        # One tile for all tokens. A cell has a process of its own, so nothing else sees it.
        setattr(cross_entropy, "LOGITS_TILE_BYTES", 1 << 40)  # noqa: B010
    saving = cell.recipe in ("ours", "smallest")
    ternary = cell.weights.startswith("ternary")
    tables: Any = {"int4": "int8", "int8": "int8", "float32": "float32"}.get(cell.weights)
    embedding: Any = tables or "float16"
    if cell.recipe == "smallest":
        embedding = "int8"
    on_cpu = current_platform() == "cpu"
    anything: Any = cell
    implementation = anything.implementation
    if ternary and implementation == "auto" and current_platform() not in ("cpu", "cuda"):
        # Which one is best is asked of the device that is there; here another one is described.
        implementation = "xla"
    return MemoryConfig(
        model=cell.model,
        lora=LoraConfig(rank=cell.rank),
        optimizer=OptimizerConfig(
            clip_norm=0.0, moments="int8" if cell.recipe == "smallest" else "float32"
        ),
        weights=anything.weights,
        dtype="float32" if on_cpu or cell.recipe == "seed" else "bfloat16",
        embedding_dtype=embedding,
        remat="layer" if saving else "none",
        implementation=implementation,
        fused_update=saving,
        max_length=cell.length,
        batch_size=cell.rows,
    )


@dataclass(frozen=True, kw_only=True)
class Built:
    """A job's definition and step, before any array exists."""

    definition: Any
    optimizer: Any
    step: Any
    config: Any

    def abstract_arguments(self) -> tuple[Any, ...]:
        """State, base, batch and key as shapes."""
        import jax
        from flax import nnx

        from fabric_jax.training.step import init_state

        adapter = nnx.to_pure_dict(self.definition.adapter)
        return (
            jax.eval_shape(lambda tree: init_state(tree, self.optimizer), adapter),
            nnx.to_pure_dict(self.definition.base),
            abstract_batch((1, self.config.batch_size, self.config.max_length)),
            jax.eval_shape(lambda: jax.random.key(0)),
        )


def unrolls(cell: StepConfig) -> bool:
    """Whether layers are written out: a loop copies what it keeps, launch by launch."""
    return cell.recipe == "fast" and current_platform() == "cuda"


def build(config: Any, *, unroll: bool = False) -> Built:
    """The decoder, optimizer and step of a ``MemoryConfig``."""
    from fabric_jax.checkpoints.loading import weights_form
    from fabric_jax.models.decoder import DecoderOptions, define_decoder
    from fabric_jax.models.registry import get_config
    from fabric_jax.training.memory_account import STEPS_OF_SCHEDULE
    from fabric_jax.training.optimizer import make_optimizer
    from fabric_jax.training.step import make_train_step

    form, model = weights_form(config.weights), get_config(config.model)
    options = DecoderOptions(
        mode=form.mode or ("packed" if model.ternary else "float"),
        packing=form.packing,
        float_format=form.float_format,
        dtype=config.dtype,
        implementation=None if config.implementation == "auto" else config.implementation,
        remat=config.remat,
        lora=config.lora,
        embedding_dtype=None if config.embedding_dtype == "same" else config.embedding_dtype,
        unroll=unroll,
    )
    definition = define_decoder(model, options)
    optimizer = make_optimizer(config.optimizer, STEPS_OF_SCHEDULE, freeze_a=config.lora.freeze_a)
    step = make_train_step(definition, optimizer, fused=config.fused_update)
    return Built(definition=definition, optimizer=optimizer, step=step, config=config)


def abstract_batch(shape: tuple[int, int, int]) -> Any:
    """A batch's shapes, [A, B, T]."""
    import jax
    import jax.numpy as jnp

    from fabric_jax.data.batch import Batch

    whole: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Batch(tokens=whole, targets=whole, loss_mask=mask, segment_ids=whole, positions=whole)


def picked_implementation(config: Any) -> str | None:
    """What runs the packed products; None where no weight is packed."""
    from fabric_kernels.ternary_matmul import select_implementation

    if not config.weights.startswith("ternary"):
        return None
    chosen = None if config.implementation == "auto" else config.implementation
    return select_implementation(chosen)


def settings_of(config: Any) -> dict[str, Any]:
    """What the recipe stands for, for the record."""
    names = ("dtype", "embedding_dtype", "remat", "fused_update")
    return {name: getattr(config, name) for name in names} | {"moments": config.optimizer.moments}


def small_share(platform: str, share: float = 0.04) -> dict[str, str]:
    """A share of the device that suits a model of a few million parameters."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.2f}"} if platform == "cuda" else {}


def device_share(cell: StepConfig, platform: str) -> dict[str, str]:
    """The share of an 80 GB device that a cell needs, so that several can run beside another."""
    if platform != "cuda":
        return {}
    from fabric_jax.models.registry import get_config

    model = get_config(cell.model)
    bytes_a_weight = {"ternary2": 0.25, "ternary1.6": 0.2, "int4": 0.57, "int8": 1.07}
    linears = bytes_a_weight.get(cell.weights, 4 if cell.weights == "float32" else 2)
    needed = model.linear_parameters * linears
    needed += model.embedding_parameters * (4 if cell.weights == "float32" else 2)
    width = 12 * model.hidden_size + 6 * model.ffn_size + 4 * model.num_heads * model.head_dim
    kept = cell.rows * cell.length * (width * 4 * model.num_layers + 16 * model.vocab_size)
    if cell.recipe in ("ours", "smallest"):
        kept = cell.rows * cell.length * (width * 8 + 4 * model.hidden_size * model.num_layers)
    share = (1.15 * (needed + kept) + (3 << 30)) / (78 << 30)
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{min(0.9, share + 0.005):.2f}"}
