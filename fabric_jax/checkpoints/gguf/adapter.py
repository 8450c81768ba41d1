"""LoRA adapters as llama.cpp takes them.

Layer i's A [R, K] and B [N, R] are the tensors ``blk.i.attn_q.weight.lora_a`` and ``.lora_b`` and
so on. The runtime adds ``alpha / R · B(A(x))``, R being that of the tensor and alpha one for the
file (a missing or zero alpha stands for a factor of 1), so whatever else a target is scaled by is
multiplied into its B. Rows of B are in the order of the base's rows, and padded like them.
"""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from fabric_jax.checkpoints.arrays import (
    HostArray,
    layout_differences,
    layouts,
    named_leaves,
    summarize,
)
from fabric_jax.checkpoints.gguf.architecture import choose_architecture
from fabric_jax.checkpoints.gguf.encode import GgufKind, encode_dense
from fabric_jax.checkpoints.gguf.floats import read_floats
from fabric_jax.checkpoints.gguf.metadata import OWN, Metadata
from fabric_jax.checkpoints.gguf.names import (
    BITNET,
    BITNET_CPP,
    LINEARS,
    from_pairs,
    linear_name,
    to_pairs,
    turned_heads,
)
from fabric_jax.checkpoints.gguf.padding import LINEAR_AXES, PREFIX, Padding, plan_padding
from fabric_jax.checkpoints.gguf.write import Entry, write_container
from fabric_jax.errors import FabricError
from fabric_jax.files import new_file
from fabric_jax.gguf_container import GgufFile, read_gguf
from fabric_jax.layers.lora import TARGET_GROUPS, LoraConfig
from fabric_jax.models.config import ModelConfig
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree, nest

ALPHA, SETTINGS = "adapter.lora.alpha", OWN + "lora"
PATHS = {path.rpartition(".")[2]: path for path in LINEARS}
"""Paths of the linears by the names that LoRA targets have."""


def save_gguf_adapter(
    path: str | Path,
    definition: DecoderDefinition,
    adapter: Tree,
    *,
    base_kind: GgufKind = "TQ2_0",
    architecture: str | None = None,
) -> None:
    """Writes an adapter file in float32; it appears whole or not at all.

    Args:
        path: the file; an earlier one is replaced.
        definition: of the decoder that the adapter belongs to.
        adapter: its weights.
        base_kind: the type of the base's file: TQ1_0 and TQ2_0 may be padded, and then the adapter
            must be.
        architecture: that of the base's file; None for llama.cpp's.

    Raises:
        FabricError: ``adapter`` does not fit ``definition`` or is not finite, no architecture runs
            the model, or the file can't be written.
    """
    config, lora = definition.config, definition.options.lora
    wrong = layout_differences(layouts(nnx.to_pure_dict(definition.adapter)), layouts(adapter))
    if wrong or lora.rank == 0:
        raise FabricError(
            f"these weights are no adapter of {config.name}: {summarize(wrong) or 'it has rank 0'}"
        )
    architecture = choose_architecture(config, architecture)
    padding = _padding(config, architecture) if base_kind in ("TQ1_0", "TQ2_0") else None
    alpha = lora.scale * lora.rank
    if alpha == 0:
        # The runtime takes it for a missing alpha, which is a factor of 1.
        raise FabricError("an adapter with alpha 0 adds nothing, and GGUF can't say so")
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(adapter).items()}
    entries: list[Entry] = []
    for layer in range(config.num_layers):
        for target in (name for name in TARGET_GROUPS["all"] if lora.covers(name)):
            where = _Place(target=target, config=config, arch=architecture, padding=padding)
            own = f"layers.{where.path}.lora"
            factor = lora.of(target).scale * lora.of(target).rank / alpha
            a = where.a_to_file(leaves[f"{own}.a"][layer].astype(np.float32))
            b = where.b_to_file(leaves[f"{own}.b"][layer].astype(np.float32), factor)
            stored = linear_name(where.path, layer)
            entries += [_entry(f"{stored}.lora_a", a), _entry(f"{stored}.lora_b", b)]
    fields: dict[str, Any] = {
        "general.type": "adapter",
        "general.name": f"adapter of {config.name}",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "adapter.type": "lora",
        ALPHA: float(alpha),
        SETTINGS: json.dumps(dataclasses.asdict(lora)),
    } | ({} if padding is None else padding.fields())
    with new_file(path) as temporary:
        write_container(temporary, architecture, fields, {}, entries)


def read_gguf_adapter(path: str | Path, config: ModelConfig) -> tuple[LoraConfig, Tree]:
    """Reads an adapter of a model, ours or of any converter.

    Where it has a target in some layers only, it is zero in the others; where ranks of a target
    differ between layers, the smaller are filled up with zeros. Adapters of norms are left out, as
    llama.cpp leaves them out.

    Args:
        path: the file.
        config: the model that it belongs to.

    Returns:
        The settings to define the decoder with, and the adapter's weights.

    Raises:
        FabricError: no adapter, one of another model, or one with parts that can't be had here.
    """
    file = read_gguf(path)
    metadata = Metadata(path=str(path), values=file.metadata)
    arch = _require_adapter(metadata, config)
    padding = _read_padding(metadata, config, arch)
    pairs = _pairs(file)
    _require_shapes(file, pairs, config if padding is None else padding.padded)
    ranks = {
        target: max(file.tensors[f"{stored}.lora_a"].shape[0] for stored in found.values())
        for target, found in pairs.items()
    }
    alpha = metadata.get(ALPHA, float, 0.0)
    lora = _stored_settings(metadata, ranks, alpha) or _settings(ranks, alpha)
    leaves: list[tuple[tuple[str, ...], jax.Array]] = []
    for target, found in pairs.items():
        where = _Place(target=target, config=config, arch=arch, padding=padding)
        n, k = config.linear_shapes[where.path]
        a = np.zeros((config.num_layers, ranks[target], k), np.float32)
        b = np.zeros((config.num_layers, ranks[target], n), np.float32)
        for layer, stored in found.items():
            narrow = read_floats(file, f"{stored}.lora_a").astype(np.float32)
            rank = len(narrow)
            a[layer, :rank] = where.a_from_file(narrow)
            # What the file's scale is more than that of the settings.
            factor = (alpha / rank if alpha else 1.0) / lora.of(target).scale
            factor = 1.0 if abs(factor - 1) < 1e-6 else factor
            wide = read_floats(file, f"{stored}.lora_b").astype(np.float32)
            b[layer, :rank] = where.b_from_file(wide, factor)
        for name, stack in (("a", a), ("b", b)):
            leaf = jax.device_put(stack, may_alias=False).astype(lora.adapter_dtype)
            leaves.append((("layers", *where.path.split("."), "lora", name), leaf))
    return lora, nest(leaves)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a target's matrices lie in a file."""

    target: str
    config: ModelConfig
    arch: str
    padding: Padding | None

    @property
    def path(self) -> str:
        return PATHS[self.target]

    @property
    def heads(self) -> int:
        return turned_heads(self.arch, self.path, self.config)

    @property
    def query_factor(self) -> float:
        """What padding multiplies queries by."""
        return self.padding.query_factor if self.padding and self.target == "q" else 1.0

    def a_to_file(self, a: HostArray) -> HostArray:
        """[R, K] to [R, K']."""
        return self.padding.widen(a, ("rank", LINEAR_AXES[self.path][1])) if self.padding else a

    def a_from_file(self, a: HostArray) -> HostArray:
        return self.padding.narrow(a, ("rank", LINEAR_AXES[self.path][1])) if self.padding else a

    def b_to_file(self, b: HostArray, factor: float) -> HostArray:
        """[R, N] to [N', R], times a factor."""
        rows = to_pairs(b.T, self.heads)
        rows = (rows.astype(np.float64) * (factor * self.query_factor)).astype(np.float32)
        return self.padding.widen(rows, (LINEAR_AXES[self.path][0],)) if self.padding else rows

    def b_from_file(self, b: HostArray, factor: float) -> HostArray:
        rows = self.padding.narrow(b, (LINEAR_AXES[self.path][0],)) if self.padding else b
        rows = (rows.astype(np.float64) * (factor / self.query_factor)).astype(np.float32)
        return from_pairs(rows, self.heads).T


def _entry(name: str, values: HostArray) -> Entry:
    make = partial(encode_dense, values, "F32", name)
    return Entry(name=name, shape=values.shape, kind="F32", make=make)


def _padding(config: ModelConfig, architecture: str) -> Padding | None:
    """Of the base's file, if it is a ternary one."""
    square = architecture in (BITNET, *BITNET_CPP)
    return plan_padding(config, square=square) if config.ternary else None


def _require_adapter(metadata: Metadata, config: ModelConfig) -> str:
    """The architecture of an adapter, if it is one for this model."""
    kinds = [metadata.word(key, "none") for key in ("general.type", "adapter.type")]
    if kinds != ["adapter", "lora"]:
        raise FabricError(
            f"{metadata.path} is no LoRA adapter",
            expected="general.type adapter and adapter.type lora",
            found=" and ".join(kinds),
        )
    found = metadata.word("general.architecture")
    own = choose_architecture(config)
    known = (own, *BITNET_CPP) if own == BITNET else (own,)
    if found not in known:
        raise FabricError(
            f"the adapter {metadata.path} is of another architecture than {config.name}",
            expected=own,
            found=found,
            fix="Load the model that it was trained on",
        )
    return found


def _read_padding(metadata: Metadata, config: ModelConfig, arch: str) -> Padding | None:
    """The padding that an adapter's metadata tells of, which must be that of this model."""
    widths = {key: value for key, value in metadata.values.items() if key.startswith(PREFIX)}
    if not widths:
        return None
    padding = _padding(config, arch)
    if padding is None or widths != padding.fields():
        raise FabricError(
            f"the adapter {metadata.path} is of a model with other widths than {config.name}",
            found=", ".join(f"{key.removeprefix(PREFIX)} {v}" for key, v in widths.items())[:200],
        )
    return padding


def _pairs(file: GgufFile) -> dict[str, dict[int, str]]:
    """For each target the layers that have it, and the names of the base's tensors there."""
    stems = {stem: path.rpartition(".")[2] for path, stem in LINEARS.items()}
    found: dict[str, dict[int, str]] = {}
    wrong: list[str] = []
    for name in file.tensors:
        stored, _, ending = name.rpartition(".")
        if stored.endswith("_norm.weight"):
            continue
        other = {"lora_a": "lora_b", "lora_b": "lora_a"}.get(ending)
        parts = stored.split(".")
        target = stems.get(parts[2]) if len(parts) == 4 and parts[0] == "blk" else None
        number = parts[1] if len(parts) == 4 else ""
        if other is None or target is None or not (number.isascii() and number.isdigit()):
            wrong.append(f"{name[:80]} is nothing that can have an adapter here")
        elif f"{stored}.{other}" not in file.tensors:
            wrong.append(f"{name} lacks its {other}")
        elif linear_name(PATHS[target], int(number[:9])) != stored:
            wrong.append(f"{name[:80]} is nothing that can have an adapter here")
        else:
            found.setdefault(target, {})[int(number)] = stored
    if wrong or not found:
        raise FabricError(f"the adapter {file.path} can't be read: {summarize(wrong) or 'empty'}")
    return {target: found[target] for target in TARGET_GROUPS["all"] if target in found}


def _require_shapes(file: GgufFile, pairs: dict[str, dict[int, str]], config: ModelConfig) -> None:
    wrong: list[str] = []
    for target, found in pairs.items():
        n, k = config.linear_shapes[PATHS[target]]
        for layer, stored in found.items():
            a, b = (file.tensors[f"{stored}.lora_{letter}"].shape for letter in "ab")
            if layer >= config.num_layers:
                wrong.append(f"{stored} is of a layer beyond {config.num_layers}")
            elif len(a) != 2 or a[1] != k or b != (n, a[0]) or a[0] > min(n, k):
                wrong.append(
                    f"{stored} has A {list(a)} and B {list(b)} instead of [R, {k}] and [{n}, R]"
                )
    if wrong:
        raise FabricError(
            f"the adapter {file.path} does not fit {config.name}: {summarize(wrong)}",
            fix="Load the model that it was trained on",
        )


def _settings(ranks: dict[str, int], alpha: float) -> LoraConfig:
    """Of a file that doesn't tell more than the runtime needs."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Without an alpha all factors are 1, whatever the ranks.
    alphas = () if alpha else tuple((target, float(own)) for target, own in ranks.items())
    return LoraConfig(
        rank=rank,
        alpha=alpha or float(rank),
        targets=tuple(ranks),
        ranks=tuple(ranks.items()),
        alphas=alphas,
    )


def _stored_settings(metadata: Metadata, ranks: dict[str, int], alpha: float) -> LoraConfig | None:
    """The settings that we wrote ourselves; None where the file has none.

    Raises:
        FabricError: they contradict the tensors or the alpha that the runtime uses.
    """
    text = metadata.get(SETTINGS, str, "")
    if not text:
        return None
    try:
        lora = LoraConfig(**_checked(json.loads(text)))
        own = {target: lora.of(target).rank for target in ranks}
        same = lora.linears == frozenset(ranks) and own == ranks
        same = same and bool(np.isclose(lora.scale * lora.rank, alpha, rtol=1e-5))
    except (TypeError, ValueError, ArithmeticError, RecursionError, FabricError) as error:
        raise FabricError(
            f"{SETTINGS} in {metadata.path} is damaged: {str(error)[:300]}"
        ) from error
    if not same:
        raise FabricError(
            f"{SETTINGS} in {metadata.path} contradicts the rest of the file",
            expected=f"ranks {ranks} and alpha {alpha:g}",
            found=str(lora)[:300],
        )
    return lora


def _checked(stored: Any) -> dict[str, Any]:
    """The fields of a ``LoraConfig`` in JSON, each of its type."""
    if not isinstance(stored, dict):
        raise TypeError("no object")
    values = cast(dict[str, Any], stored)
    names, pairs = ("targets",), {"ranks": int, "alphas": float}
    kinds = {"rank": int, "alpha": float, "dropout": float, "rslora": bool, "adapter_dtype": str}
    kinds |= {"freeze_a": bool}
    unknown = values.keys() - kinds.keys() - pairs.keys() - set(names)
    if unknown or values.get("adapter_dtype", "float32") not in ("float32", "bfloat16"):
        raise ValueError(f"{', '.join(sorted(unknown))[:80] or 'adapter_dtype'}")
    out: dict[str, Any] = {key: _typed(values[key], kinds[key]) for key in kinds.keys() & values}
    if "targets" in values:
        out["targets"] = tuple(_typed(name, str) for name in _typed(values["targets"], list))
    for key in pairs.keys() & values:
        listed = [_typed(pair, list) for pair in _typed(values[key], list)]
        out[key] = tuple((_typed(name, str), _typed(own, pairs[key])) for name, own in listed)
    return out


def _typed(value: Any, kind: type) -> Any:
    """A value, if it is of a type; whole numbers will do as floats."""
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
