"""Runs of several processes on this machine: killed one by one, resumed, compared."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fabric_jax.errors import FabricError
from fabric_jax.parallel.processes import LOST_CODE, DevicesConfig
from fabric_jax.training.command import flags
from fabric_jax.training.config import FinetuneConfig
from fabric_jax.training.loop import finetune
from tests.training.conftest import Configure

pytestmark = pytest.mark.xdist_group("training processes")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
HEARTBEAT = 10


class Processes:
    """``fabric-jax finetune`` in several processes that meet on a port of this machine."""

    def __init__(self, config: FinetuneConfig, count: int, folder: Path, programs: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment.pop("XLA_FLAGS", None)
        self.logs = [folder / f"{number}.log" for number in range(count)]
        self.all: list[subprocess.Popen[bytes]] = []
        for number, log in enumerate(self.logs):
            words = ["--coordinator", f"localhost:{port}", "--processes", str(count)]
            words += ["--process", str(number), "--heartbeat-seconds", str(HEARTBEAT)]
            command = [sys.executable, "-m", "fabric_jax.cli.main", "finetune", *flags(config)]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*command, *words],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.all.append(process)

    def wait(self) -> list[int]:
        try:
            return [process.wait(timeout=PATIENCE) for process in self.all]
        finally:
            for process in self.all:
                process.kill()

    def text(self, number: int) -> str:
        return self.logs[number].read_text(errors="replace")


def steps_of(output: Path) -> list[int]:
    try:
        lines = (output / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines]


def kill_at_step(run: Processes, victim: int, output: Path, step: int) -> None:
    """Kills one process after a step; the others say what happened and end."""
    deadline = time.monotonic() + PATIENCE
    while (steps_of(output) or [0])[-1] < step:
        assert time.monotonic() < deadline, run.text(0)
        assert all(process.poll() is None for process in run.all), run.text(0)
        time.sleep(0.01)
    run.all[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    codes = run.wait()
    # Gloo notices at once; the coordination service at the latest after its heartbeat timeout.
    assert time.monotonic() - start < 6 * HEARTBEAT
    assert codes[victim] == -signal.SIGKILL
    for number, code in enumerate(codes):
        if number == victim:
            continue
        assert code == LOST_CODE, run.text(number)
        assert "lost the others" in run.text(number)
        assert "--resume auto" in run.text(number)


def settings(configure: Configure, output: Path, steps: int) -> FinetuneConfig:
    dataset = {"batch_size": 4, "packing": False}
    return configure(
        output, dataset=dataset, max_steps=steps, epochs=steps, save_every=2, resume="auto"
    )


@pytest.mark.slow
def test_two_processes_lose_one_resume_and_end_with_the_adapter_of_one(
    configure: Configure, tmp_path: Path, programs: Path, quiet: Console
) -> None:
    config = settings(configure, tmp_path / "two", 12)
    kill_at_step(Processes(config, 2, tmp_path, programs), 1, tmp_path / "two", 5)
    last = Processes(config, 2, tmp_path, programs)
    assert last.wait() == [0, 0], last.text(0) + last.text(1)
    assert "resuming after step" in last.text(0)
    assert "fine-tuned" not in last.text(1)
    assert steps_of(tmp_path / "two") == list(range(1, 13))
    finetune(settings(configure, tmp_path / "one", 12), console=quiet)
    found, expected = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("two", "one")
    )
    for name, tensor in expected.items():
        # Adam's steps are of about the learning rate, 1e-2, whatever the gradient's size.
        np.testing.assert_allclose(found[name], tensor, atol=5e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_process_is_killed_in_turn(
    count: int, configure: Configure, tmp_path: Path, programs: Path
) -> None:
    """And the adapter is, bit for bit, that of as many processes which nobody disturbed."""
    steps = 6 * count + 4
    whole = settings(configure, tmp_path / "whole", steps)
    undisturbed = Processes(whole, count, tmp_path, programs)
    assert undisturbed.wait() == [0] * count, undisturbed.text(0)
    output = tmp_path / "killed"
    config = settings(configure, output, steps)
    for victim in range(count):
        kill_at_step(Processes(config, count, tmp_path, programs), victim, output, 6 * victim + 5)
    last = Processes(config, count, tmp_path, programs)
    assert last.wait() == [0] * count, last.text(0)
    assert "resuming after step" in last.text(0)
    assert steps_of(output) == list(range(1, steps + 1))
    file = "adapter/adapter_model.safetensors"
    assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "below that of all"),
        ({"coordinator": "localhost:1"}, "below that of all"),
        ({"processes": 2}, "no place to meet"),
        ({"mesh": "rows=2"}, "unknown mesh axis"),
        ({"heartbeat_seconds": 0}, "out of range"),
    ],
)
def test_wrong_settings_of_processes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        DevicesConfig(**fields)  # pyright: ignore[reportArgumentType]
