"""The safetensors files of a model folder, as one table of tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fabric_jax.checkpoints.arrays import HostArray, Layout, summarize
from fabric_jax.checkpoints.folders import read_json_object
from fabric_jax.checkpoints.source import ALL_ROWS
from fabric_jax.checkpoints.tensor_file import DAMAGED, TensorFile, open_tensors
from fabric_jax.errors import FabricError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Tensors by name, whichever file each lies in."""

    layouts: dict[str, Layout]
    files: dict[str, TensorFile]

    def read(self, name: str, rows: slice = ALL_ROWS) -> HostArray:
        """One tensor or some of its rows, the caller's own.

        Raises:
            FabricError: the file is damaged or a value is not finite.
        """
        return self.files[name].read(name, rows)


def open_shards(folder: Path) -> Shards:
    """Reads the headers of ``model.safetensors`` or of the shards that the index names.

    Raises:
        FabricError: there are no such files, one is missing or damaged, or index and shards do not
            agree.
    """
    if (folder / WEIGHTS).is_file():
        file = open_tensors(folder / WEIGHTS)
        return Shards(layouts=file.layouts, files=dict.fromkeys(file.layouts, file))
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    places = _places(index)
    missing = [name for name in sorted(set(places.values())) if not (folder / name).is_file()]
    if missing:
        raise FabricError(
            f"shards of {folder} are missing: {summarize(missing)}",
            fix="Copy or download them too",
        )
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(places.values())):
        file = open_tensors(folder / shard)
        for name in file.layouts:
            if name in files:
                raise FabricError(
                    f"{name} is in two shards, {files[name].path} and {file.path}", fix=DAMAGED
                )
            files[name] = file
    wrong = [name for name, shard in places.items() if _shard_of(files, name) != shard]
    wrong += [name for name in files if name not in places]
    if wrong:
        raise FabricError(
            f"{index} does not agree with its shards about {summarize(wrong)}", fix=DAMAGED
        )
    return Shards(layouts={name: file.layouts[name] for name, file in files.items()}, files=files)


def _shard_of(files: dict[str, TensorFile], name: str) -> str | None:
    return files[name].path.name if name in files else None


def _places(index: Path) -> dict[str, str]:
    """The name of the shard of each tensor; shards are files of the index's own folder."""
    table = read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FabricError(f"{index} has no weight_map of tensors and files")
    for shard in cast(dict[str, Any], table).values():
        if not isinstance(shard, str) or not _is_shard_name(shard):
            raise FabricError(
                f"{index} names a shard that can't be one",
                expected=f"a file of the same folder that ends in {SUFFIX}",
                found=repr(shard)[:100],
            )
    return cast(dict[str, str], table)


def _is_shard_name(name: str) -> bool:
    plain = name.isprintable() and not any(mark in name for mark in ("/", "\\", ":"))
    return plain and name.endswith(SUFFIX) and not name.startswith(".") and len(name) < 256


def _no_weights(folder: Path) -> FabricError:
    """The error for a folder without safetensors, by what it has instead."""
    expected = f"{WEIGHTS} or {INDEX}"
    pickles = sorted(
        path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")
    )
    vocabularies = sorted(folder.glob("*.gguf"))
    if vocabularies:
        return FabricError(
            f"{folder} has no {WEIGHTS}", expected=expected, fix=f"Name {vocabularies[0]} itself"
        )
    if pickles:
        return FabricError(
            f"{folder} holds its weights as pickles, which can run any code and are not read",
            expected=expected,
            found=summarize(pickles),
            fix="Download the safetensors of the model, or convert it with transformers first: "
            "`model.save_pretrained(folder)`",
        )
    return FabricError(f"{folder} has no weights", expected=expected)
