"""What a run that ran out of device memory tells its user."""

from dataclasses import replace

import jax
from fabric_kernels.ternary_matmul import select_implementation

from fabric_jax.errors import FabricError
from fabric_jax.measurement.device import device_memory_bytes
from fabric_jax.models.decoder import DecoderDefinition, DecoderOptions, define_decoder
from fabric_jax.parallel.mesh import MeshShape
from fabric_jax.training.config import OptimizerConfig, RunConfig
from fabric_jax.training.memory_account import analytic_bytes, predict

MIB = 2**20
SHOWN = 3


def is_out_of_memory(error: Exception) -> bool:
    """Whether XLA could not allocate."""
    return "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(
    config: RunConfig, definition: DecoderDefinition, mesh: MeshShape, *, fused: bool
) -> FabricError:
    """The prediction, what the device has, and the three cheapest ways to need less."""

    def needed(
        options: DecoderOptions | None = None,
        optimizer: OptimizerConfig | None = None,
        rows: int | None = None,
    ) -> int:
        changed = definition if options is None else define_decoder(definition.config, options)
        arrays, scratch = predict(
            changed,
            optimizer or config.optimizer,
            rows=rows or config.dataset.batch_size,
            length=config.dataset.max_length,
            fused=fused,
            mesh=mesh,
            spread=config.devices.spread_adapter,
        )
        return analytic_bytes(arrays, scratch)

    now, own = needed(), definition.options
    rows = config.dataset.batch_size
    ways: list[tuple[str, int]] = []
    # In the order of what they cost: nothing, a little time, rounding, much time.
    if rows % 2 == 0 and (rows // 2) % mesh.row_shards == 0:
        halved = f"--batch-size {rows // 2} --accumulation {2 * config.accumulation}"
        ways.append((halved, needed(rows=rows // 2)))
    ways.append(("--remat int8-residuals", needed(replace(own, remat="int8-residuals"))))
    ways.append(("--remat layer", needed(replace(own, remat="layer"))))
    if jax.default_backend() == "gpu" and not fused:
        ways.append(("--remat offload", needed(replace(own, remat="offload"))))
    smaller = replace(config.optimizer, moments="int8")
    ways.append(("--moments int8", needed(optimizer=smaller)))
    if own.mode == "packed":
        ways.append(("--embedding-dtype int8", needed(replace(own, embedding_dtype="int8"))))
    fitting = [f"{flags} ({size / MIB:,.0f} MiB)" for flags, size in ways if size < now]
    kernel = select_implementation(own.implementation) if own.mode == "packed" else "xla"
    return FabricError(
        f"the device is out of memory: the job needs {now / MIB:,.0f} MiB by its dimensions "
        f"(products by {kernel})",
        found=f"{device_memory_bytes(jax.local_devices()[0]) / MIB:,.0f} MiB",
        fix="Cheapest first: " + "; ".join(fitting[:SHOWN]) + ". Checkpoints are intact",
    )
