"""Several processes of one run, on JAX's distributed runtime.

Every process runs the same program on the devices of its own host. The first one writes. Who is
alive is known to the runtime's coordination service: a process that dies ends the others, at once
where they wait for it in a collective of the CPU, after the heartbeat timeout elsewhere.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np

from fabric_jax.errors import FabricError
from fabric_jax.parallel.mesh import MeshShape, parse_mesh

FAILED_CODE = 1
"""Exit code of a process with an error that no one foresaw."""
WRONG_CODE = 2
"""Exit code of a process that found something wrong itself."""
LOST_CODE = 3
"""Exit code of a process whose run ended because another process did."""


@dataclass(frozen=True, kw_only=True)
class DevicesConfig:
    """Which devices a run uses.

    Attributes:
        mesh: how many lie along data, fsdp and tensor, as in data=4,fsdp=2,tensor=2; all along data
            by default, as far as they divide the rows of a micro-batch.
        spread_adapter: cut adapter and moments over the devices that have other rows, instead of
            keeping them whole on each.
        distributed: several processes train together; where and how many they are is found out
            from SLURM, Open MPI, Kubernetes or the TPU pod. Implied by --coordinator.
        coordinator: host:port of the first process, where nothing can be found out.
        processes: how many there are.
        process: the number of this one, from 0.
        heartbeat_seconds: a process that is silent for so long is taken for dead.
        meeting_seconds: the first waits so long for all to start, and they for it.
    """

    mesh: str = ""
    spread_adapter: bool = False
    distributed: bool = False
    coordinator: str = ""
    processes: int = 0
    process: int = -1
    heartbeat_seconds: int = 100
    meeting_seconds: int = 300

    def __post_init__(self) -> None:
        """Refuses what can't be meant."""
        if self.mesh:
            parse_mesh(self.mesh, None)
        if self.coordinator and not 0 <= self.process < self.processes:
            raise FabricError(
                "the number of a process is below that of all of them",
                expected="--processes N and --process I with 0 <= I < N beside --coordinator",
                found=f"--processes {self.processes} --process {self.process}",
            )
        if not self.coordinator and (self.processes or self.process >= 0):
            raise FabricError(
                "processes have no place to meet", fix="Give --coordinator host:port of the first"
            )
        for name in ("heartbeat_seconds", "meeting_seconds"):
            if getattr(self, name) < 1:
                raise FabricError(
                    f"{name} out of range", expected="1 or more", found=str(getattr(self, name))
                )


def join_processes(config: DevicesConfig) -> None:
    """Meets the other processes of the run, where there are any; before anything uses a device.

    Raises:
        FabricError: no cluster is found, or the others don't come.
    """
    if not (config.distributed or config.coordinator) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit: dict[str, Any] = {}
    if config.coordinator:
        explicit = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
    _explain_aborts()
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=config.meeting_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise FabricError(
            f"the processes of the run don't meet: {str(error).splitlines()[0]}",
            fix="Start all of them, or give --coordinator host:port --processes N --process I",
        ) from error


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    leave(
        "this process lost the others: a library ended it, and said above what it knows. "
        "A process of the run died or can't be reached; what it printed last says why. "
        "Start all of them again with --resume auto to continue.",
        LOST_CODE,
    )


def _explain_aborts() -> None:
    """Has a message of ours follow that of a library which calls ``abort`` for a lost process.

    The coordination service does, and so does Gloo, of four processes, in the one that was to
    receive from the dead one: "Is there a distributed collective mismatch in your code?". Both do
    it in threads of their own, where nothing can be caught. Python's own handlers run too late.
    """
    if os.name == "posix":
        ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def tells_of_lost_peer(error: Exception) -> bool:
    """Whether a collective raised this because another process is gone.

    Backends have no common type for it: Gloo's is a ``ValueError`` of its own words.
    """
    signs = ("Gloo", "Connection closed", "Connection reset", "UNAVAILABLE", "heartbeat", "NCCL")
    return any(sign.lower() in str(error).lower() for sign in signs)


def leave(message: str, code: int) -> NoReturn:
    """Ends a process whose peers may never answer again; the others' collectives then fail.

    An orderly exit would wait for all of them.
    """
    print(f"fabric-jax: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def chosen_mesh(config: DevicesConfig, rows: int) -> MeshShape:
    """The mesh of a run with ``rows`` rows in a micro-batch.

    Raises:
        FabricError: the devices are others, or don't divide the rows.
    """
    devices = jax.device_count()
    if config.mesh or jax.process_count() > 1:
        shape = parse_mesh(config.mesh, devices)
        shape.require_rows(rows)
        return shape
    return MeshShape(data=int(np.gcd(rows, devices)))


def from_first(values: Any, like: Any) -> Any:
    """What the first process has, on all of them.

    Args:
        values: a tree of host arrays on the first process; whatever on others.
        like: its shapes and dtypes.
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    if not is_first():
        values = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    return multihost_utils.broadcast_one_to_all(values)


def json_from_first(value: Any) -> Any:
    """A JSON value of the first process, on all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0)
    size = int(from_first(np.int32(text.size), np.zeros((), np.int32)))
    found = from_first(text, np.zeros(size, np.uint8))
    return json.loads(np.asarray(found, np.uint8).tobytes())


def largest(number: int) -> int:
    """The largest of all processes' numbers; all must ask at the same time."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def on_host(tree: Any) -> Any:
    """The tree in a form that this process can read; all must ask at the same time.

    Arrays of which other processes have parts are gathered.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def one(leaf: jax.Array) -> Any:
        if leaf.is_fully_replicated or leaf.is_fully_addressable:
            return np.asarray(leaf.addressable_data(0)) if leaf.is_fully_replicated else leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)
