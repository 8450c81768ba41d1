"""Runs in processes of their own that are killed or interrupted, and resumed."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fabric_jax.training.command import flags
from tests.training.conftest import Configure

pytestmark = pytest.mark.xdist_group("training processes")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
STEPS = 100
"""The same in all quick tests: the learning rates are part of the compiled program."""


class Run:
    """``fabric-jax finetune``, or another command, in a process.

    Args:
        words: flags.
        programs: folder of compiled programs to reuse; None compiles in every process.
        log: what the process prints.
        command: the subcommand.
    """

    def __init__(
        self, words: list[str], programs: Path | None, log: Path, command: str = "finetune"
    ) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "JAX_PLATFORMS": "cpu",
        }
        if programs is not None:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(programs),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        run = [sys.executable, "-m", "fabric_jax.cli.main", command, *words]
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                run, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE)

    @property
    def text(self) -> str:
        return self._log.read_text()


def last_step(output: Path) -> int:
    """The step of the newest whole line of metrics, 0 without any."""
    try:
        lines = (output / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(run: Run, output: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while last_step(output) < step:
        assert run.process.poll() is None, f"ended before step {step}:\n{run.text}"
        assert time.monotonic() < deadline, run.text
        time.sleep(0.001)


def kill_and_resume(
    configure: Configure, folder: Path, programs: Path | None, *, kills: int, steps: int
) -> None:
    """Kills a run ``kills`` times, then compares its adapter with that of an undisturbed run.

    Half of the moments are drawn from the steps, so that they fall into steps, saves and
    evaluations; half from the time after the start, so that some fall into loading.
    """
    draw = random.Random(0)
    settings = {
        "max_steps": steps,
        "epochs": steps,
        "save_every": 4,
        "eval_every": 7,
        "resume": "auto",
    }
    whole = Run(flags(configure(folder / "whole", **settings)), programs, folder / "whole.log")
    assert whole.wait() == 0, whole.text
    output = folder / "killed"
    words = flags(configure(output, **settings))
    for number in range(kills):
        run = Run(words, programs, folder / f"{number}.log")
        if number % 2:
            time.sleep(draw.uniform(0.0, 4.0))
        else:
            wait_for_step(run, output, draw.randint(1, (number + 1) * steps // (kills + 1)))
            time.sleep(draw.uniform(0.0, 0.05))
        run.process.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, f"ended before it was killed:\n{run.text}"
    last = Run(words, programs, folder / "last.log")
    assert last.wait() == 0, last.text
    assert "resuming after step" in last.text
    for name in ("adapter", "adapter_best"):
        file = f"{name}/adapter_model.safetensors"
        assert (output / file).read_bytes() == (folder / "whole" / file).read_bytes()
    found = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert found == list(range(1, steps + 1))


def test_a_run_killed_three_times_ends_with_the_same_adapter(
    configure: Configure, tmp_path: Path, programs: Path
) -> None:
    kill_and_resume(configure, tmp_path, programs, kills=3, steps=STEPS)


@pytest.mark.long
def test_a_run_killed_twenty_times_ends_with_the_same_adapter(
    configure: Configure, tmp_path: Path
) -> None:
    kill_and_resume(configure, tmp_path, None, kills=20, steps=300)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_and_tells_how_to_resume(
    number: signal.Signals, configure: Configure, tmp_path: Path, programs: Path
) -> None:
    output = tmp_path / "run"
    config = configure(output, max_steps=STEPS, epochs=STEPS, eval_every=1000)
    run = Run(flags(config), programs, tmp_path / "first.log")
    wait_for_step(run, output, 5)
    run.process.send_signal(number)
    assert run.wait() == 128 + number, run.text
    steps = [int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 1
    assert last_step(output) == steps[0]
    assert not (output / "adapter").exists()
    command = shlex.split(run.text.split("To resume:")[1].splitlines()[1])
    assert command[:2] == ["fabric-jax", "finetune"]
    assert command[command.index("--resume") + 1] == "auto"
    if number == signal.SIGTERM:
        resumed = Run(command[2:], programs, tmp_path / "second.log")
        assert resumed.wait() == 0, resumed.text
        assert f"resuming after step {steps[0]} of {STEPS}" in resumed.text
        assert last_step(output) == STEPS


STUCK = """
import hashlib, sys
from fabric_jax.training.interrupt import Interrupts
with Interrupts(lambda number: print("noted", number, flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
"""


def test_the_second_signal_stops_even_a_step_that_never_ends(tmp_path: Path) -> None:
    """The main thread is inside one call of C that takes hours."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"noted {signal.SIGTERM.value}\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT


def test_handlers_are_put_back() -> None:
    from fabric_jax.training.interrupt import Interrupts

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts(lambda _: None) as interrupts:
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while interrupts.received is None and time.monotonic() < deadline:
            time.sleep(0.001)
    assert interrupts.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
