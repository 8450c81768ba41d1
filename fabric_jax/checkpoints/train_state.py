"""Training states on disk, in orbax's format: saved in the background, verified when read.

A checkpoint is a folder named by its step with the items ``params`` and ``moments`` (arrays by
dotted name), ``data`` (where in the data the run is), ``meta`` (whatever the caller adds) and
``manifest``. The manifest lists every array's shape, dtype and SHA-256, so that damage is found
whatever its kind, and the identity of the run, so that a checkpoint of another run is refused.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from fabric_jax.checkpoints.arrays import (
    HostArray,
    layout_differences,
    layouts,
    named_leaves,
    place_like,
    snapshot,
    summarize,
    with_leaves,
)
from fabric_jax.checkpoints.manifest import (
    Damaged,
    Json,
    Manifest,
    as_json,
    describe,
    identity_differences,
)
from fabric_jax.checkpoints.orbax_log import import_orbax
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

TREES = ("params", "moments")
DAMAGED_SUFFIX = ".damaged"
REPLACED_SUFFIX = ".replaced"


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: optimizer steps done.
        params: the trained tree.
        moments: the optimizer's state.
        data_state: position in the data, as given to ``save``.
        meta: as given to ``save``.
    """

    step: int
    params: Any
    moments: Any
    data_state: dict[str, Any]
    meta: dict[str, Any]


class TrainCheckpoints:
    """The checkpoints of one run in one folder: the newest few, and the best.

    ``save`` copies the arrays to host memory and returns; the rest happens in one background
    thread. What fails there is raised by the next ``save``, ``wait``, ``restore`` or ``close``. A
    process that dies leaves the checkpoints that were complete; the incomplete one is removed when
    the folder is next opened.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int,
        identity: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        """Opens or makes ``folder``.

        Args:
            folder: where the checkpoints are.
            keep_last: how many of the newest to keep; the one with the lowest metric stays too.
            identity: what must be equal for a checkpoint to be continued (model, adapter,
                optimizer); nested, of JSON values.
            report: gets one sentence for each damaged checkpoint that ``restore`` passes over.

        Raises:
            FabricError: the folder can't be made or written.
        """
        if keep_last < 1:
            raise FabricError("keep_last out of range", expected="1 or more", found=str(keep_last))
        self.folder = Path(folder).absolute()
        self._keep_last = keep_last
        self._identity = as_json(identity, "identity")
        self._report = report
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._metrics: dict[int, float | None] = {}
        self._manager = self._open()

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        params: Any,
        moments: Any,
        *,
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        metric: float | None = None,
    ) -> None:
        """Saves a state; its buffers may be reused or donated as soon as this returns.

        A checkpoint of the same step is replaced. At most one save is under way: a second one waits
        for the first.

        Args:
            step: optimizer steps done.
            params: the trained tree.
            moments: the optimizer's state, any pytree of arrays.
            data_state: position in the data, of JSON values.
            meta: anything else worth keeping, of JSON values.
            metric: lower is better; what is not a finite number never counts as best.

        Raises:
            FabricError: the *previous* save failed (disk full, folder unwritable, a value that is
                not finite), or an argument can't be written as JSON.
        """
        data, extra = as_json(data_state, "data_state"), as_json(meta, "meta")
        self.wait()
        trees = {"params": snapshot(params), "moments": snapshot(moments)}
        lower_is_better = None if metric is None or not math.isfinite(metric) else float(metric)
        self._pending = self._worker.submit(self._write, step, trees, data, extra, lower_is_better)

    def restore(self, like_params: Any, like_moments: Any) -> Restored | None:
        """The newest undamaged state, bit for bit as it was saved; None if there is no checkpoint.

        Args:
            like_params: a tree of arrays or ``ShapeDtypeStruct``; it gives structure, shapes,
                dtypes and, where its arrays are committed to devices, placement.
            like_moments: the same for the optimizer's state.

        Raises:
            FabricError: the newest readable checkpoint is of another run (what differs is named),
                or every checkpoint is damaged.
        """
        self.wait()
        likes = {"params": like_params, "moments": like_moments}
        # Orbax runs event loops, which a thread that has one (a notebook's) does not allow.
        return self._worker.submit(self._newest, likes).result()

    def latest_step(self) -> int | None:
        """The newest step saved, verified or not; None if there is no checkpoint."""
        self.wait()
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest metric among those kept; None if none has one."""
        self.wait()
        return self._worker.submit(lambda: self._best(self._manager.all_steps())).result()

    def wait(self) -> None:
        """Returns when nothing is being saved; raises what the last save ran into."""
        pending = self._pending
        if pending is None:
            return
        try:
            pending.result()
        finally:
            if pending.done():  # Not so where Ctrl-C ended the waiting.
                self._pending = None

    def close(self) -> None:
        """Waits, then releases the background thread; the object can't be used afterwards."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def _open(self) -> "ocp.CheckpointManager":
        """Opens the folder, removing what an interrupted save left."""
        ocp = import_orbax()
        # Of several processes one has the checkpoints; orbax must not wait for the others.
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix="fabric"
        )
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False,
            save_root_metadata=False,
            create=False,
            **({"multiprocessing_options": alone} if jax.process_count() > 1 else {}),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Orbax would do this in the background and fail without a word.
            for incomplete in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                _remove(incomplete)
            for replaced in self.folder.glob(f"*{REPLACED_SUFFIX}"):
                if replaced.with_suffix("").exists():
                    shutil.rmtree(replaced)
                else:
                    replaced.rename(replaced.with_suffix(""))
            return ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise _cannot_save(self.folder, error) from error

    def _newest(self, likes: Mapping[str, Any]) -> Restored | None:
        """The newest undamaged checkpoint; runs in the background thread, as does what follows."""
        damaged: dict[int, str] = {}
        for step in reversed(self._manager.all_steps()):
            try:
                restored = self._read(step, likes)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, reason, step)
            return restored
        if damaged:
            raise FabricError(
                f"every checkpoint in {self.folder} is damaged: "
                + summarize(f"step {step}: {reason}" for step, reason in damaged.items()),
                fix="Start again in another output folder, or restore the folder from a copy",
            )
        return None

    def _write(
        self,
        step: int,
        trees: Mapping[str, Mapping[str, HostArray]],
        data: Json,
        meta: Json,
        metric: float | None,
    ) -> None:
        """Writes one checkpoint and removes those no longer kept."""
        ocp = import_orbax()
        manifest = Manifest(
            step=step,
            metric=metric,
            identity=self._identity,
            data=data,
            meta=meta,
            arrays={name: describe(tree) for name, tree in trees.items()},
        )
        manifest.require_finite(self.folder, trees)
        items: dict[str, Any] = {
            "data": ocp.args.JsonSave(data),
            "meta": ocp.args.JsonSave(meta),
            "manifest": ocp.args.JsonSave(manifest.to_json()),
        }
        for name, tree in trees.items():
            if stored := _stored(tree):
                items[name] = ocp.args.PyTreeSave(stored)
        try:
            replaced = self._make_way(step)
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if replaced is not None:
                shutil.rmtree(replaced)
            self._metrics[step] = metric
            self._remove_old()
        except Exception as error:
            # Opening anew removes the incomplete checkpoint and frees its space.
            with suppress(FabricError):
                self._manager = self._open()
            raise _cannot_save(self.folder, error) from error

    def _make_way(self, step: int) -> Path | None:
        """Moves a checkpoint of the same step aside; ``_open`` undoes that if the save fails."""
        old = self.folder / str(step)
        if not old.exists():
            return None
        replaced = old.with_name(old.name + REPLACED_SUFFIX)
        old.rename(replaced)
        self._manager.reload()
        return replaced

    def _read(self, step: int, likes: Mapping[str, Any]) -> Restored:
        """One checkpoint, verified.

        Raises:
            Damaged: its files are not what was saved.
            FabricError: it is intact and of another run.
        """
        ocp = import_orbax()
        manifest = self._read_manifest(step)
        self._require_fit(manifest, likes)
        items: dict[str, Any] = {}
        for name in TREES:
            stored = _stored(named_leaves(likes[name]))
            as_numpy = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in stored}
            if stored:
                items[name] = ocp.args.PyTreeRestore(restore_args=as_numpy)
        found = self._read_items(step, items)
        placed: dict[str, Any] = {}
        for name in TREES:
            tree = cast(dict[str, HostArray], found[name] if name in items else {})
            for key, layout in manifest.layouts(name).items():
                if 0 in layout.shape:
                    tree[key] = np.zeros(layout.shape, layout.dtype)
            manifest.verify(name, tree)
            leaves = named_leaves(likes[name])
            placed[name] = with_leaves(
                likes[name], {key: place_like(like, tree[key]) for key, like in leaves.items()}
            )
        return Restored(step=step, data_state=manifest.data, meta=manifest.meta, **placed)

    def _read_manifest(self, step: int) -> Manifest:
        """The manifest of a step, with the data position and meta that it vouches for."""
        ocp = import_orbax()
        found = self._read_items(
            step, {name: ocp.args.JsonRestore() for name in ("manifest", "data", "meta")}
        )
        manifest = Manifest.from_json(found["manifest"], data=found["data"], meta=found["meta"])
        if manifest.step != step:
            raise Damaged(f"its manifest is of step {manifest.step}")
        return manifest

    def _read_items(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        ocp = import_orbax()
        if not items:
            return {}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            return {name: found[name] for name in items}
        except MemoryError:
            raise
        except Exception as error:  # Readers of damaged files raise whatever they stumble over.
            raise Damaged(_gist(error)) from error

    def _require_fit(self, manifest: Manifest, likes: Mapping[str, Any]) -> None:
        """Refuses an intact checkpoint that does not belong to this run."""
        differences = identity_differences(self._identity, manifest.identity)
        for name in TREES:
            differences += [
                f"{name}: {phrase}"
                for phrase in layout_differences(layouts(likes[name]), manifest.layouts(name))
            ]
        if differences:
            raise FabricError(
                f"the checkpoint {self.folder / str(manifest.step)} is of another run: "
                + summarize(differences),
                fix="Repeat the settings it was made with, or choose another output folder",
            )

    def _set_aside(self, step: int, reason: str, used: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again, and reports it."""
        source = self.folder / str(step)
        target = source.with_name(source.name + DAMAGED_SUFFIX)
        self._report(
            f"checkpoint {source} is damaged ({reason}); using step {used} instead. "
            f"It was renamed {target.name}."
        )
        try:
            if target.exists():
                shutil.rmtree(target)
            source.rename(target)
        except OSError as error:
            raise _cannot_save(self.folder, error) from error
        self._manager.reload()

    def _remove_old(self) -> None:
        """Deletes all but the newest few and the best."""
        steps = sorted(self._manager.all_steps())
        kept = {*steps[-self._keep_last :], self._best(steps)}
        for step in steps:
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        self._manager.delete(step)
        self._metrics.pop(step, None)

    def _best(self, steps: Iterable[int]) -> int | None:
        """The step with the lowest metric, the newest of equals; damaged ones have none."""
        for step in steps:
            if step not in self._metrics:
                try:
                    self._metrics[step] = self._read_manifest(step).metric
                except Damaged:
                    self._metrics[step] = None
        measured = [(m, -step) for step in steps if (m := self._metrics[step]) is not None]
        return -min(measured)[1] if measured else None


def _stored(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that orbax is given: it takes none without elements."""
    return {name: array for name, array in tree.items() if 0 not in array.shape}


def _remove(folder: Path) -> None:
    """Removes an incomplete checkpoint, to which writes of a failed save may still be under way."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _cannot_save(folder: Path, error: Exception) -> FabricError:
    return FabricError(
        f"cannot save a checkpoint in {folder}: {_gist(error)}",
        fix="Free space or choose another folder; earlier checkpoints are untouched",
    )


def _gist(error: Exception) -> str:
    """What a library's error comes down to: tensorstore's run over many lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if match := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(match[1]))
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= 200 else line[:200] + "…"
