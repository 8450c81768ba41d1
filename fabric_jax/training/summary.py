"""``summary.json``: a run in flat keys."""

from dataclasses import asdict, dataclass
from typing import Any

from fabric_jax.measurement.device import device_facts
from fabric_jax.measurement.memory import peak_memory_bytes
from fabric_jax.training.totals import Totals

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run went; over all its sessions where it was resumed.

    Attributes:
        output: its folder.
        trained: folder of the adapter or model in its last state.
        best: folder of the adapter at the lowest evaluation loss, None without evaluation.
        model: what was trained.
        parameters: of the base model.
        trained_parameters: of the trained tree; of B alone where A is frozen.
        steps: optimizer steps.
        epochs: passes over the data, with the fraction.
        loss_first: of the first step, before its update; nats a trainable token.
        loss_last: of the last step.
        eval_loss_first: before the first step, None without evaluation rows.
        eval_loss_last: after the last step.
        eval_loss_best: lowest after a step.
        eval_bits_per_byte_last: after the last step; None where the bytes of the evaluation text
            aren't known.
        best_step: where that was.
        trainable_tokens: targets with weight in the loss, seen in all steps.
        real_tokens: positions that are not padding.
        positions: all positions.
        tokens_per_second: real tokens, compilation, evaluation and saving left out.
        trainable_tokens_per_second: likewise.
        positions_per_second: likewise.
        seconds_per_step: median over the newest session with steps, its first one left out.
        seconds: wall time, loading and compilation left out.
        compile_seconds: of the training step in this session; 0 where it wasn't needed.
        peak_bytes: the most memory in use in this session.
        analytic_bytes: what the job needs by its dimensions.
        compiled_bytes: what XLA plans for the step, with its arguments; None where it wasn't
            compiled.
        compiled_temporary_bytes: what the compiled step needs beside its arguments and results;
            None where it wasn't compiled.
        implementation: of ``ternary_matmul``; None where no weight is packed.
        packing: layout of packed weights; None where no weight is packed.
        platform: cpu, gpu or tpu.
        device: its name.
        device_count: local devices.
        cpu: the processor's name.
        cores: those that this process may use.
        system: operating system and machine.
        python: version.
        packages: versions, as "name version, …".
    """

    output: str
    trained: str
    best: str | None
    model: str
    parameters: int
    trained_parameters: int
    steps: int
    epochs: float
    loss_first: float | None
    loss_last: float | None
    eval_loss_first: float | None
    eval_loss_last: float | None
    eval_loss_best: float | None
    eval_bits_per_byte_last: float | None
    best_step: int | None
    trainable_tokens: int
    real_tokens: int
    positions: int
    tokens_per_second: float
    trainable_tokens_per_second: float
    positions_per_second: float
    seconds_per_step: float | None
    seconds: float
    compile_seconds: float
    peak_bytes: int
    analytic_bytes: int
    compiled_bytes: int | None
    compiled_temporary_bytes: int | None
    implementation: str | None
    packing: str | None
    platform: str
    device: str
    device_count: int
    cpu: str
    cores: int
    system: str
    python: str
    packages: str

    def to_json(self) -> dict[str, Any]:
        """Flat keys and JSON values."""
        return asdict(self)


def measured(totals: Totals) -> dict[str, Any]:
    """The keys that come from the counters of the run."""
    run = totals.run
    return {
        "steps": run.steps,
        "loss_first": totals.loss_first,
        "loss_last": totals.loss_last,
        "eval_loss_first": totals.eval_loss_first,
        "eval_loss_last": totals.eval_loss_last,
        "eval_loss_best": totals.eval_loss_best,
        "eval_bits_per_byte_last": totals.eval_bits_per_byte_last,
        "best_step": totals.best_step,
        "trainable_tokens": run.trainable_tokens,
        "real_tokens": run.real_tokens,
        "positions": run.positions,
        "tokens_per_second": run.rate(run.real_tokens),
        "trainable_tokens_per_second": run.rate(run.trainable_tokens),
        "positions_per_second": run.rate(run.positions),
        "seconds_per_step": totals.seconds_per_step,
        "seconds": totals.elapsed,
    }


def machine() -> dict[str, Any]:
    """The keys that come from this process and its machine."""
    facts = device_facts()
    return {
        "peak_bytes": peak_memory_bytes(),
        "platform": facts.platform,
        "device": facts.kind,
        "device_count": facts.count,
        "cpu": facts.cpu,
        "cores": facts.cores,
        "system": facts.system,
        "python": facts.python,
        "packages": ", ".join(f"{name} {number}" for name, number in facts.packages.items()),
    }
