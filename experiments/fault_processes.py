"""``fabric-jax`` commands in forked processes, and the tiny job that they do, for ``faults``.

The parent imports everything once and never starts a backend, which no fork would survive.
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fabric_jax.models.config import ModelConfig
from fabric_jax.models.registry import get_config

NEEDED = (
    *("grain", "orbax.checkpoint", "tyro", "fabric_jax.training.loop"),
    *("fabric_jax.conversion.convert", "fabric_jax.sweeps.runner"),
    *("fabric_jax.cli.main", "fabric_jax.cli.convert", "fabric_jax.cli.finetune"),
    "fabric_jax.cli.sweep",
)
"""Modules that the commands import when they run."""
STEPS, EVAL_EVERY = 24, 7
PATIENCE = 120.0
"""Seconds after which a process hangs. One takes two, alone on the machine."""
MICRO: ModelConfig = replace(
    get_config("bitnet-tiny"),
    name="micro",
    num_layers=2,
    hidden_size=32,
    ffn_size=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; minus the signal's number where that ended it; None where it hung.
        text: what it printed.
        seconds: from start to end.
    """

    code: int | None
    text: str
    seconds: float


class Forked:
    """A command in a process of its own.

    Args:
        words: of ``fabric-jax``, or a function instead.
        file_limit: bytes that no file may grow beyond; None for no limit.
    """

    def __init__(self, words: list[str] | Callable[[], int], file_limit: int | None = None) -> None:
        """Starts it."""
        self.start, self.seconds, self._status = time.monotonic(), 0.0, None
        self._said = bytearray()
        # A file would fall under the limit, too.
        self._pipe, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            _become(words, writing, file_limit)
        os.close(writing)
        os.set_blocking(self._pipe, False)

    def poll(self) -> int | None:
        """Its exit code, None as long as it runs."""
        if self._status is None:
            self._listen()
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self._status = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.start
                self._listen()
                os.close(self._pipe)
        return self._status

    def wait(self) -> Ended:
        """Until its end, or for as long as we have patience."""
        while self.poll() is None and time.monotonic() - self.start < PATIENCE:
            time.sleep(0.002)
        hung = self.poll() is None
        if hung:
            self.kill()
        text = self._said.decode(errors="replace")
        return Ended(code=None if hung else self._status, text=text, seconds=self.seconds)

    def kill(self) -> bool:
        """Whether it was still running when it was killed."""
        if self.poll() is not None:
            return False
        os.kill(self.process, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)
        return self._status == -signal.SIGKILL

    def _listen(self) -> None:
        """Takes up what it has printed, before the pipe is full."""
        with suppress(BlockingIOError):
            while piece := os.read(self._pipe, 1 << 16):
                self._said += piece


def _become(words: list[str] | Callable[[], int], writing: int, file_limit: int | None) -> NoReturn:
    """The child: runs the command and leaves without what the parent would clean up."""
    code = 1
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        code = words() if callable(words) else command(words)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def command(words: list[str]) -> int:
    """``fabric-jax``, as it is called from a shell."""
    return import_module("fabric_jax.cli.main").main(words)


class Workshop:
    """A tiny model, rows, dice, and what an undisturbed run makes of them.

    Args:
        scratch: folder to work in.
        seed: of the dice.
    """

    def __init__(self, scratch: Path, seed: int) -> None:
        """Makes model and rows, and trains twice."""
        for name in NEEDED:
            import_module(name)
        self.scratch, self.dice = scratch, random.Random(seed)
        self.model, self.rows = scratch / "model", scratch / "rows.jsonl"
        rows = [{"text": f"row {i} says {'word ' * (i % 5)}{i * i}"} for i in range(40)]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.must(lambda: make_model(self.model))
        self.whole = scratch / "whole"
        words = self.finetune(self.whole, save_every=4)
        self.must(words)
        # Once more with every program compiled before, for how long that takes.
        self.seconds = self.must(self.finetune(scratch / "again", save_every=4)).seconds
        self.reference = digest(self.whole / "adapter"), digest(self.whole / "adapter_best")
        again = digest(scratch / "again/adapter"), digest(scratch / "again/adapter_best")
        if self.reference != again:
            raise RuntimeError("two undisturbed runs differ")

    def finetune(self, output: Path, *, save_every: int) -> list[str]:
        """The command of a run."""
        return [
            *("finetune", "--model", str(self.model), "--data", str(self.rows)),
            *("--output", str(output), "--resume", "auto", "--no-tensorboard"),
            *("--max-length", "32", "--batch-size", "2", "--rank", "4", "--learning-rate", "0.01"),
            *("--max-steps", str(STEPS), "--epochs", str(STEPS), "--eval-fraction", "0.2"),
            *("--eval-every", str(EVAL_EVERY), "--save-every", str(save_every)),
        ]

    def start(self, words: list[str] | Callable[[], int], file_limit: int | None = None) -> Forked:
        """A process."""
        return Forked(words, file_limit)

    def must(self, words: list[str] | Callable[[], int]) -> Ended:
        """What has to end well."""
        ended = self.start(words).wait()
        if ended.code != 0:
            raise RuntimeError(f"exit code {ended.code}:\n{ended.text}")
        return ended

    def settings(self) -> dict[str, Any]:
        """Of the record."""
        return {
            "model": {k: v for k, v in asdict(MICRO).items() if isinstance(v, int | str)},
            "steps": STEPS,
            "eval_every": EVAL_EVERY,
            "save_every": {"training": 4, "checkpointing": 1},
            "seconds_to_a_hang": PATIENCE,
            "processes": "forked from one that has imported the package and started no backend",
        }

    def facts(self) -> dict[str, Any]:
        """Of the machine."""
        path = self.scratch / "facts"

        def write() -> int:
            from fabric_jax.measurement.device import device_facts

            path.write_text(json.dumps(device_facts().to_dict()))
            return 0

        self.must(write)
        return json.loads(path.read_text())


def make_model(folder: Path) -> int:
    """A folder with random packed weights."""
    from fabric_jax.checkpoints.native import save_model
    from fabric_jax.models.decoder import DecoderOptions, define_decoder
    from fabric_jax.models.initialize import initialize_base

    definition = define_decoder(MICRO, DecoderOptions())
    save_model(folder, definition, initialize_base(definition, 0), tokenizer_json=None)
    return 0


def digest(path: Path) -> str | None:
    """SHA-256 of a file, or of a folder's files and their names; None where there is none."""
    if not path.exists():
        return None
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def last_step(output: Path) -> int:
    """The step of the newest whole line of metrics, 0 without any."""
    try:
        lines = (output / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoints(output: Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    folder = output / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def note(
    counts: dict[str, Any], problems: list[str], finding: str, what: str, text: str = ""
) -> None:
    """Counts a finding, and keeps what there is to say of it."""
    counts[finding] += 1
    traceback_at = text.find("Traceback")
    start = max(traceback_at - 300, 0) if traceback_at >= 0 else -600
    problems.append(f"{finding}: {what}" + (f": {text[start:][:900]}" if text else ""))
