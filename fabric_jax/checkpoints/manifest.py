"""What a checkpoint says about itself, and how that is checked against its contents."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fabric_jax.checkpoints.arrays import (
    HostArray,
    Layout,
    digest,
    is_finite,
    layout_differences,
    layout_of,
    summarize,
)
from fabric_jax.errors import FabricError

FORMAT = 1

Json = dict[str, Any]


class Damaged(Exception):
    """The files of a checkpoint are not what was saved; the text says how."""


@dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """Layout and digest of an array."""

    layout: Layout
    sha256: str


def describe(tree: Mapping[str, HostArray]) -> dict[str, ArrayRecord]:
    """The record of every array; hashing uses all cores."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, tree.values()))
    return {
        name: ArrayRecord(layout=layout_of(array), sha256=sha)
        for (name, array), sha in zip(tree.items(), digests, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: optimizer steps done.
        metric: lower is better; None if it was not measured.
        identity: what must be equal for the checkpoint to be continued.
        data: position in the data.
        meta: whatever the caller added.
        arrays: by tree, then by dotted name.
    """

    step: int
    metric: float | None
    identity: Json
    data: Json
    meta: Json
    arrays: dict[str, dict[str, ArrayRecord]]

    def layouts(self, tree: str) -> dict[str, Layout]:
        """Shapes and dtypes of a tree's arrays."""
        return {name: record.layout for name, record in self.arrays[tree].items()}

    def to_json(self) -> Json:
        """The manifest as it is stored: data and meta by digest only, then a digest of it all."""
        body: Json = {
            "format": FORMAT,
            "step": self.step,
            "metric": self.metric,
            "identity": self.identity,
            "data_sha256": _digest_json(self.data),
            "meta_sha256": _digest_json(self.meta),
            "arrays": {
                tree: {
                    name: {
                        "shape": list(record.layout.shape),
                        "dtype": record.layout.dtype,
                        "sha256": record.sha256,
                    }
                    for name, record in records.items()
                }
                for tree, records in self.arrays.items()
            },
        }
        return body | {"sha256": _digest_json(body)}

    @classmethod
    def from_json(cls, stored: Any, *, data: Any, meta: Any) -> "Manifest":
        """The inverse of :meth:`to_json`.

        Raises:
            Damaged: a digest does not match.
            FabricError: a later version wrote it.
        """
        if not isinstance(stored, dict):
            raise Damaged("its manifest is not a JSON object")
        body = dict(cast(Json, stored))
        if body.pop("sha256", None) != _digest_json(body):
            raise Damaged("its manifest does not match its digest")
        if body["format"] != FORMAT:
            raise FabricError(
                "a checkpoint of another version of fabric_jax",
                expected=f"format {FORMAT}",
                found=f"format {body['format']}",
            )
        for name, value in (("data", data), ("meta", meta)):
            if _digest_json(value) != body[f"{name}_sha256"]:
                raise Damaged(f"its {name} does not match its digest")
        arrays = {
            tree: {
                name: ArrayRecord(
                    layout=Layout(shape=tuple(record["shape"]), dtype=record["dtype"]),
                    sha256=record["sha256"],
                )
                for name, record in records.items()
            }
            for tree, records in body["arrays"].items()
        }
        return cls(
            step=body["step"],
            metric=body["metric"],
            identity=body["identity"],
            data=data,
            meta=meta,
            arrays=arrays,
        )

    def verify(self, tree: str, arrays: Mapping[str, HostArray]) -> None:
        """Compares arrays that were read with what was saved.

        Raises:
            Damaged: the names, layouts or bytes differ, or a value is not finite.
        """
        found = {name: layout_of(array) for name, array in arrays.items()}
        if differences := layout_differences(self.layouts(tree), found):
            raise Damaged(f"{tree}: {summarize(differences)}")
        records = describe(arrays)
        for name, record in self.arrays[tree].items():
            if records[name].sha256 != record.sha256:
                raise Damaged(f"{tree}: the bytes of {name} do not match their digest")
            if not is_finite(arrays[name]):
                raise Damaged(f"{tree}: {name} has values that are not finite")

    def require_finite(self, folder: Path, trees: Mapping[str, Mapping[str, HostArray]]) -> None:
        """Refuses to save what could never be continued."""
        for tree, arrays in trees.items():
            for name, array in arrays.items():
                if not is_finite(array):
                    raise FabricError(
                        f"step {self.step} was not saved in {folder}: {tree} {name} has values "
                        "that are not finite",
                        fix="Continue from the last checkpoint with a lower learning rate",
                    )


def identity_differences(here: Json, stored: Json) -> list[str]:
    """Where two identities differ, one phrase a key."""
    ours, theirs = _flat(here), _flat(stored)
    return [
        f"{key} is {_shown(theirs, key)} in the checkpoint, {_shown(ours, key)} here"
        for key in dict.fromkeys((*ours, *theirs))
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    ]


def as_json(value: Mapping[str, Any], name: str) -> Json:
    """``value`` as JSON gives it back, so that what is compared later is what was stored.

    Raises:
        FabricError: JSON can't hold it.
    """
    try:
        return cast(Json, json.loads(json.dumps(dict(value), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise FabricError(f"{name} can't be written as JSON: {error}") from error


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Json, prefix: str = "") -> Json:
    """Dotted keys of nested dictionaries; lists are values."""
    flat: Json = {}
    for key, part in value.items():
        if isinstance(part, dict) and part:
            flat |= _flat(cast(Json, part), f"{prefix}{key}.")
        else:
            flat[prefix + key] = part
    return flat


def _shown(flat: Json, key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
