"""What must be equal for a checkpoint to be continued: all that the next step depends on.

May change between sessions: where files lie, how often to log, save and evaluate, how many
checkpoints to keep, ``remat`` (the same maths, rounded elsewhere; coarsely with int8-residuals),
the layout of packed weights (the same integers), and ``epochs`` and ``max_steps`` as long as the
learning rate does not depend on them: that is, under the constant schedule with a warm-up given in
steps.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fabric_jax.checkpoints.hub import fetch_model
from fabric_jax.checkpoints.loading import weights_folder
from fabric_jax.data.load import Data
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.registry import REGISTRY
from fabric_jax.training.config import RunConfig
from fabric_jax.training.optimizer import warmup_steps
from fabric_jax.training.step import Trains

NOT_IN_BATCHES = ("data", "eval_data", "tokenizer", "chat_template", "columns")
"""Fields of ``DataConfig`` that say where things are; the data's fingerprint covers contents."""


def run_identity(
    config: RunConfig,
    definition: DecoderDefinition,
    data: Data,
    *,
    trains: Trains,
    weights: str,
    total_steps: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The identity of a run, as nested JSON values.

    Args:
        config: of the run.
        definition: of the decoder.
        data: what it is trained on.
        trains: which tree.
        weights: names the base weights, see :func:`weights_digest`.
        total_steps: optimizer steps that the learning rate is planned for.
        settings: what else a step of this kind of run depends on.
    """
    options, optimizer = definition.options, asdict(config.optimizer)
    del optimizer["warmup_ratio"]
    optimizer["warmup_steps"] = warmup_steps(config.optimizer, total_steps)
    if config.optimizer.schedule != "two-stage":
        del optimizer["second_learning_rate"], optimizer["second_weight_decay"]
    if config.optimizer.schedule != "constant":
        optimizer["total_steps"] = total_steps
    dataset = asdict(config.dataset)
    for name in NOT_IN_BATCHES:
        del dataset[name]
    lora = asdict(options.lora)
    if not options.lora.freeze_a:
        del lora["freeze_a"]  # Checkpoints from before there was such a setting can go on.
    identity: dict[str, Any] = {
        "trains": trains,
        "model": definition.config.to_dict(),
        "weights": weights,
        "mode": options.mode,
        "dtype": config.dtype,
        "embedding_dtype": jnp.dtype(options.embedding_dtype or options.dtype).name,
        "gradient_bits": options.gradient_bits,
        "act_quant": options.act_quant,
        "lora": lora,
        "optimizer": optimizer,
        "accumulation": config.accumulation,
        "seed": config.seed,
        "dataset": dataset,
        "data": data.fingerprint,
    }
    if options.mode == "float" and options.frozen:
        # Left out otherwise: what earlier versions saved can be continued.
        identity["float_format"] = options.float_format
    if settings:
        identity["settings"] = dict(settings)
    return identity


def weights_digest(source: str, seed: int) -> str:
    """Names base weights: SHA-256 of the files that hold them, or how random ones were made."""
    if source in REGISTRY:
        return f"random {source} of seed {seed}"
    path = Path(source).expanduser()
    if not path.exists():
        path = fetch_model(source)
    path = weights_folder(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digests: list[str] = []
    for name in files:
        try:
            with name.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise FabricError(f"cannot read {name}: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256(repr(digests).encode()).hexdigest()
