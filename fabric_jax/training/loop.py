"""The two kinds of runs: LoRA fine-tuning of a frozen model, and training of all weights."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fabric_jax.checkpoints.adapters import load_adapter, notes_on, read_lora_config
from fabric_jax.checkpoints.loading import load_base, weights_form
from fabric_jax.checkpoints.peft import save_adapter
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig
from fabric_jax.models.initialize import Tree, initialize_adapter
from fabric_jax.parallel.processes import join_processes
from fabric_jax.training.command import command_line
from fabric_jax.training.config import FinetuneConfig, PretrainConfig
from fabric_jax.training.identity import weights_digest
from fabric_jax.training.pretrain import find_origin, pretrain_job
from fabric_jax.training.recipes import resolve
from fabric_jax.training.rows import load_rows
from fabric_jax.training.session import Job
from fabric_jax.training.summary import Summary
from fabric_jax.training.train import train


def finetune(config: FinetuneConfig, *, console: Console | None = None) -> Summary:
    """Trains a LoRA adapter on a frozen model.

    The output folder gets ``adapter/`` (the last state, in PEFT's layout), ``adapter_best/`` (the
    one with the lowest evaluation loss), ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``,
    ``config.json`` and ``summary.json``.

    Args:
        config: of the run.
        console: where progress goes; standard error where not given.

    Raises:
        FabricError: something in the configuration, model, data or output folder is wrong.
        Interrupted: Ctrl-C or SIGTERM; the state was saved, the message says how to resume.
    """
    join_processes(config.devices)

    def prepare() -> Job:
        form = weights_form(config.weights)
        loaded = load_base(
            config.model,
            dtype=config.dtype,
            act_quant=config.act_quant,
            seed=config.seed,
            lora=_lora_settings(config),
            remat=config.remat,
            mode=form.mode,
            packing=form.packing,
            float_format=form.float_format,
            implementation=None if config.implementation == "auto" else config.implementation,
            embedding_dtype=None if config.embedding_dtype == "same" else config.embedding_dtype,
            gradient_bits=config.gradient_bits,
        )
        definition = loaded.definition
        data, _ = load_rows(config, definition.config, loaded.tokenizer_source)

        def fresh() -> Tree:
            if config.adapter:
                return load_adapter(config.adapter, definition)
            return initialize_adapter(definition, config.seed)

        def export(folder: Path, adapter: Tree) -> None:
            save_adapter(folder, definition, adapter, config.model)

        return Job(
            definition=definition,
            trains="adapter",
            frozen=loaded.base,
            fresh=fresh,
            data=data,
            weights=weights_digest(config.model, config.seed),
            kind="adapter",
            export=export,
            keep_best=True,
            resume_with=command_line("finetune", replace(config, resume="auto")),
            notes=tuple(notes_on(config.adapter)) if config.adapter else (),
            fused=config.fused_update,
        )

    return train(config, prepare, console=console)


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> Summary:
    """Trains all weights of a model with straight-through estimators, by a recipe.

    The output folder gets ``model/`` (float32 masters in the last state; ``load_base`` and
    ``fabric-jax convert`` pack them), ``samples.jsonl``, the tokenised text where it has no other
    place, and what :func:`finetune` writes beside the adapter.

    Args:
        config: of the run.
        console: where progress goes; standard error where not given.

    Raises:
        FabricError: something in the configuration, data or output folder is wrong.
        Interrupted: Ctrl-C or SIGTERM; the state was saved.
    """
    join_processes(config.devices)
    origin = find_origin(config)
    resolved = resolve(config, origin.model.parameters)
    return train(resolved, lambda: pretrain_job(resolved, origin), console=console)


def _lora_settings(config: FinetuneConfig) -> LoraConfig:
    """The run's settings; those of ``config.adapter`` where it continues one.

    Raises:
        FabricError: a setting was given that differs from the adapter's.
    """
    if not config.adapter:
        return config.lora
    stored, given, default = (
        read_lora_config(config.adapter, config.model),
        config.lora,
        LoraConfig(),
    )
    for name in ("rank", "alpha", "linears", "ranks", "alphas", "rslora"):
        value = getattr(given, name)
        if value not in (getattr(default, name), getattr(stored, name)):
            raise FabricError(
                f"the adapter {config.adapter} has another LoRA {name}",
                expected=str(getattr(stored, name)),
                found=str(value),
                fix="Leave the setting out, or start a fresh adapter",
            )
    return replace(
        stored,
        dropout=given.dropout,
        adapter_dtype=given.adapter_dtype,
        freeze_a=given.freeze_a,
    )
