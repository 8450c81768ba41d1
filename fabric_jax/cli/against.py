"""``fabric-jax evaluate --against``: a model beside itself after a change."""

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, get_args

from fabric_jax.cli.evaluate import EvaluateConfig, load
from fabric_jax.errors import FabricError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fabric_jax.data.batch import Batch
    from fabric_jax.data.load import EvaluationData
    from fabric_jax.evaluation import Divergence, Run

CHANGEABLE = (
    *("model", "adapter", "weights", "dtype", "embedding_dtype", "act_quant"),
    *("implementation", "sides"),
)


def run_against(
    config: EvaluateConfig, changed: EvaluateConfig, first: "Run", data: "EvaluationData"
) -> int:
    """Measures how far the second model is from the first, prints and records it."""
    from rich.console import Console

    from fabric_jax.evaluation import Run, measure_divergence

    loaded, adapter = load(changed)
    second = Run(loaded.definition, loaded.base, adapter)
    total = data.batches.batches_in_epoch(0)
    with Console(stderr=True).status("compiling") as status:

        def batches() -> "Iterator[Batch]":
            for number, batch in enumerate(data.batches.epoch(0), 1):
                status.update(f"batch {number} of {total}")
                yield batch

        found = measure_divergence(first, second, batches())
    if config.json:
        from fabric_jax.files import write_json

        write_json(config.json, _record(config, changed, found))
    _print(config, found)
    return 0


def changed_config(config: EvaluateConfig) -> EvaluateConfig:
    """The settings of the second model.

    Raises:
        FabricError: a change is not name=value, or the name or the value is unknown.
    """
    choices = {field.name: get_args(field.type) for field in fields(EvaluateConfig)}
    changes: dict[str, Any] = {}
    for word in config.against:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise FabricError(
                f"--against takes changes as name=value, found {word!r}",
                expected=", ".join(f"{known}=" for known in CHANGEABLE),
            )
        if name not in CHANGEABLE:
            raise unknown_name("change", name, CHANGEABLE)
        if choices[name] and value not in choices[name]:
            raise unknown_name(name, value, choices[name])
        changes[name] = "" if name == "adapter" and value == "none" else value
    return replace(config, **changes)


def _record(config: EvaluateConfig, changed: EvaluateConfig, found: "Divergence") -> dict[str, Any]:
    from fabric_jax.measurement.device import device_facts

    return {
        "config": asdict(config),
        "against": {name: getattr(changed, name) for name in CHANGEABLE},
        "device": device_facts().to_dict(),
        "divergence": found.to_dict(),
    }


def _print(config: EvaluateConfig, found: "Divergence") -> None:
    from fabric_jax.cli.output import print_table

    rows = [
        ("positions", f"{found.positions:,}"),
        ("KL, mean", f"{found.kl_mean:.3g}"),
        ("KL, median", f"{found.kl_median:.3g}"),
        ("KL, 99%", f"{found.kl_p99:.3g}"),
        ("KL, largest", f"{found.kl_max:.3g}"),
        ("same most likely token", f"{found.top1_agreement:.4%}"),
        ("perplexity", f"{found.perplexity_first:.6g}"),
        (f"perplexity, {' '.join(config.against)}", f"{found.perplexity_second:.6g}"),
        ("ratio", f"{found.perplexity_ratio:.8f}"),
    ]
    print_table(f"{config.model} against {' '.join(config.against)}", ("", ""), rows)
