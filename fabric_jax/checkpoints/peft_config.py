"""``adapter_config.json`` of PEFT: what it says of each module, and what it may not say here."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from fabric_jax.checkpoints.folders import read_json_object
from fabric_jax.errors import FabricError
from fabric_jax.layers.lora import LoraConfig

CONFIG = "adapter_config.json"

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LINEARS = {module.rpartition(".")[2]: name for name, module in MODULES.items()}

UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""What makes an adapter something else than ``scale · B(A(x))`` on whole linears; plain LoRA sets
none of it."""

CHANGES_BASE = ("corda", "loftq", "lora_ga", "mica", "olora", "pissa")
"""Initialisations that subtract from the base, or freeze half of the adapter: such an adapter does
not fit the original weights, or could not be trained on as it was."""

PATTERN_LENGTH, PATTERN_REPEATS = 200, 4
"""Bounds on the regular expressions of a file: backtracking takes exponential time without them."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The adapter of one module.

    Attributes:
        rank: R.
        alpha: numerator of the scale.
        scale: the factor on B(A(x)).
    """

    rank: int
    alpha: float
    scale: float


def read_settings(folder: Path) -> dict[str, Any]:
    """PEFT's settings, refused where they mean more than LoRA on whole linears.

    Raises:
        FabricError: the folder is no adapter, or one of a kind that can't be represented.
    """
    if not folder.is_dir():
        raise FabricError(f"the adapter folder {folder} does not exist")
    path = folder / CONFIG
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise FabricError(
            f"{path} is not of a LoRA adapter",
            expected="peft_type LORA",
            found=str(config.get("peft_type")),
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise FabricError(f"{path} lacks {', '.join(missing)}")
    _require_rank(config["r"], path)
    for key in ("rank_pattern", "alpha_pattern"):
        _require_patterns(config.get(key) or {}, f"{key} in {path}")
    for rank in (config.get("rank_pattern") or {}).values():
        _require_rank(rank, path)
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        used.append("init_lora_weights")
    if used:
        raise FabricError(
            f"the adapter {folder} is more than plain LoRA",
            found=", ".join(f"{key} = {config[key]!r}" for key in used),
            fix="Train it without these settings",
        )
    return config


def share_of(settings: Mapping[str, Any], module: str) -> Share:
    """What PEFT gives a module: the first pattern that matches, else the common value.

    Args:
        settings: as :func:`read_settings` returns them.
        module: path within the base model, ``model.layers.0.self_attn.q_proj``.

    Raises:
        TypeError, ValueError: an alpha is no number.
    """
    rank = int(_matching(settings.get("rank_pattern"), module, settings["r"]))
    alpha = float(_matching(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    root = math.sqrt(rank) if settings.get("use_rslora") else rank
    return Share(rank=rank, alpha=alpha, scale=alpha / root if rank else 0.0)


def to_lora_config(
    settings: Mapping[str, Any],
    shares: Mapping[str, Iterable[Share]],
    adapter_dtype: Literal["float32", "bfloat16"],
) -> LoraConfig:
    """The settings here: each linear has the largest rank of its layers, and one alpha.

    The alpha is that of a layer with that rank, or of any whose scale is not 0 if theirs is.

    Args:
        settings: as :func:`read_settings` returns them.
        shares: those of all layers, by the name of the linear.
        adapter_dtype: of the adapter's weights.

    Raises:
        TypeError, ValueError: a value is of the wrong type.
        FabricError: a value is out of range.
    """
    listed = {name: list(shares[name]) for name in MODULES if name in shares}
    ranks = {name: max(share.rank for share in found) for name, found in listed.items()}
    model = {
        name: max(found, key=lambda share: (share.scale != 0, share.rank))
        for name, found in listed.items()
    }
    return LoraConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        targets=tuple(listed),
        ranks=tuple(ranks.items()),
        alphas=tuple((name, share.alpha) for name, share in model.items()),
        dropout=float(settings.get("lora_dropout") or 0.0),
        rslora=bool(settings.get("use_rslora")),
        adapter_dtype=adapter_dtype,
    )


def to_settings(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """The settings under PEFT's names; ranks and alphas of single linears become patterns."""
    projections = {name: module.rpartition(".")[2] for name, module in MODULES.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "rank_pattern": {projections[name]: rank for name, rank in lora.ranks},
        "alpha_pattern": {projections[name]: _whole(alpha) for name, alpha in lora.alphas},
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": [word for name, word in projections.items() if lora.covers(name)],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _matching(patterns: Mapping[str, Any] | None, module: str, common: Any) -> Any:
    """``peft.utils.other.get_pattern_key``, with the value that the key stands for."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return common


def _require_rank(rank: Any, path: Path) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise FabricError(f"{path} has a rank that is no whole number", found=repr(rank))


def _require_patterns(patterns: Any, where: str) -> None:
    """Refuses what is no mapping of regular expressions, or would take too long to match."""
    if not isinstance(patterns, dict):
        raise FabricError(f"{where} is no object", found=repr(patterns))
    for pattern in cast(dict[str, Any], patterns):
        plain = re.sub(r"\[[^]]*\]", "x", re.sub(r"\\.", "x", pattern))
        repeats = sum(map(plain.count, "*+?{"))
        if (
            len(pattern) > PATTERN_LENGTH
            or repeats > PATTERN_REPEATS
            or re.search(r"\)[*+{]", plain)
        ):
            raise FabricError(
                f"{where} has a pattern that could take too long to match",
                expected=f"at most {PATTERN_LENGTH} characters and {PATTERN_REPEATS} repetitions, "
                "none of them of a group",
                found=repr(pattern[:PATTERN_LENGTH]),
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise FabricError(f"{where} has a malformed pattern {pattern!r}: {error}") from error
