"""Is work lost, or an output wrong, when a job is killed, the disk is full or a file is damaged?

Each try is a ``fabric-jax`` command in a process of its own that is killed with SIGKILL at a random
moment (``fault_kills``; ``fault_groups``: one of several that train together), or that meets a full
disk or a damaged checkpoint (``fault_files``); the command is then run again, and what it makes is
compared, byte for byte, with what an undisturbed run made. The processes are forked from one that
has imported everything and started no backend: a try costs a second, of several processes ten.

    python -m experiments.faults --seconds 240 --output experiments/results/faults-cpu.json

adds as many tries to the record as fit into the time. The record is written after every ten.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OF_ONE = ("training", "checkpointing", "exporting", "sweeping", "disk_full", "damaged_checkpoint")
KINDS = (*OF_ONE, "two_processes", "four_processes")
"""Those of one process first."""
SHARES = {
    "training": 35,
    "checkpointing": 25,
    "exporting": 25,
    "sweeping": 15,
    "disk_full": 5,
    "damaged_checkpoint": 5,
    "two_processes": 2,
    "four_processes": 1,
}
"""Tries of a kind in each round."""
WRITE_EVERY = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Adds tries to the record; 1 where one of them found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="no try begins after these")
    parser.add_argument("--tries", type=int, default=0, help="no more than these; 0: no limit")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", required=True, help="the record; tries are added to it")
    parser.add_argument("--scratch", default="", help="folder to work in; default: a temporary one")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    with tempfile.TemporaryDirectory(prefix="fabric-faults-", dir=options.scratch or None) as name:
        limits = options.seconds, options.tries or 10**9
        record = run(Path(name), Path(options.output), limits, tuple(options.kinds))
    print(json.dumps(record, indent=2))
    return int(any(counts[key] for counts in record["kinds"].values() for key in FINDINGS))


FINDINGS = ("lost_work", "hangs", "corrupted_outputs", "unclear_messages")
"""Counts that have to be zero. Lost work: a checkpoint that was complete when the process died was
not continued, or more steps than two intervals between checkpoints (one is being written while the
next begins) had to be repeated; in a sweep, a cell with a record ran again. Corrupted outputs: what
is under the name of an output is neither absent nor, byte for byte, that of an undisturbed run.
Unclear messages: an exit code that is neither 0 nor 2, or a traceback; of processes beside one that
was killed: another code than 3, or 2 where it had not come yet, or no word of it."""


def run(
    scratch: Path, output: Path, limits: tuple[float, int], kinds: tuple[str, ...]
) -> dict[str, Any]:
    """The record with the tries of one session added; ``limits`` are its seconds and tries."""
    # Before jax is imported: processes share what they compile.
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(scratch / "programs"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    from experiments.fault_files import DamagedCheckpoints, FullDisk
    from experiments.fault_groups import Groups
    from experiments.fault_kills import Exports, Runs, Sweeps
    from experiments.fault_processes import Workshop
    from fabric_jax.files import write_json

    record = read(output)
    seed = sum(counts["tries"] for counts in record["kinds"].values())
    workshop = Workshop(scratch, seed)
    makers: dict[str, Any] = {
        "training": lambda: Runs(workshop, "training", save_every=4),
        "checkpointing": lambda: Runs(workshop, "checkpointing", save_every=1),
        "exporting": lambda: Exports(workshop),
        "sweeping": lambda: Sweeps(workshop),
        "disk_full": lambda: FullDisk(workshop),
        "damaged_checkpoint": lambda: DamagedCheckpoints(workshop),
        "two_processes": lambda: Groups(workshop, 2),
        "four_processes": lambda: Groups(workshop, 4),
    }
    tries = {kind: makers[kind]() for kind in kinds}
    done, begin = 0, time.monotonic()
    while time.monotonic() - begin < limits[0] and done < limits[1]:
        kind = least_tried(record, kinds)
        counts = record["kinds"][kind]
        tries[kind].attempt(counts, record["problems"])
        counts["tries"] += 1
        done += 1
        if done % WRITE_EVERY == 0:
            write_json(output, record)
    for kind in kinds:
        tries[kind].finish(record["kinds"][kind], record["problems"])
    record["sessions"].append(
        {"seed": seed, "tries": done, "seconds": round(time.monotonic() - begin)}
    )
    record |= {"device": workshop.facts(), "settings": workshop.settings()}
    record["kills"] = sum(record["kinds"][kind].get("kills", 0) for kind in KINDS)
    write_json(output, record)
    return record


def read(output: Path) -> dict[str, Any]:
    """The record so far."""
    zeros = dict.fromkeys(("tries", *FINDINGS), 0)
    if output.exists():
        record = json.loads(output.read_text())
        record["kinds"] = {kind: dict(zeros) for kind in KINDS} | record["kinds"]
        return record
    return {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "kills": 0,
        "kinds": {kind: dict(zeros) for kind in KINDS},
        "problems": [],
        "sessions": [],
    }


def least_tried(record: dict[str, Any], kinds: Sequence[str]) -> str:
    """The kind that is furthest behind its share."""
    return min(kinds, key=lambda kind: record["kinds"][kind]["tries"] / SHARES[kind])


if __name__ == "__main__":
    sys.exit(main())
