"""Saves that don't end: killed processes, full disks, folders that can't be written."""

import os
import random
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fabric_jax.checkpoints.train_state import TrainCheckpoints
from fabric_jax.errors import FabricError

ROOT = Path(__file__).resolve().parents[2]


def make_state(step: int, size: int = 100_000):
    """Incompressible arrays that follow from the step."""
    random_ = np.random.default_rng(step)
    params = {"w": random_.standard_normal((2, size), np.float32)}
    return params, (np.int32(step), {"w": random_.standard_normal((2, size), np.float32)})


def save(checkpoints: TrainCheckpoints, step: int, size: int = 100_000) -> None:
    params, moments = make_state(step, size)
    checkpoints.save(step, params, moments, data_state={"row": step}, meta={})


def check_newest(folder: Path, step: int | None = None, size: int = 100_000) -> int:
    """Opens the folder as the next session would; returns the step that it restores."""
    reports: list[str] = []
    with TrainCheckpoints(folder, keep_last=2, identity={}, report=reports.append) as checkpoints:
        newest = checkpoints.latest_step()
        restored = checkpoints.restore(*make_state(0, size))
    assert restored is not None
    assert reports == []
    assert restored.step == newest
    assert step is None or restored.step == step
    assert restored.data_state == {"row": restored.step}
    params, moments = make_state(restored.step, size)
    np.testing.assert_array_equal(restored.params["w"], params["w"])
    np.testing.assert_array_equal(restored.moments[1]["w"], moments[1]["w"])
    assert all(path.name.isdigit() for path in folder.iterdir())
    return restored.step


SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[2]).parent))
from test_interrupted_saves import TrainCheckpoints, make_state, save
with TrainCheckpoints(sys.argv[1], keep_last=2, identity={}, report=print) as checkpoints:
    restored = checkpoints.restore(*make_state(0))
    for step in itertools.count(restored.step + 1 if restored else 1):
        save(checkpoints, step)
"""


@pytest.mark.parametrize("session", range(4))
def test_sigkill(tmp_path_factory, session):
    """Killed in the middle of a save, the run goes on from the last whole checkpoint."""
    folder = tmp_path_factory.getbasetemp() / "killed"  # One run, resumed by each session.
    before = check_newest(folder) if folder.exists() else 0
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(folder), __file__]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
            whole = max((int(name) for name in names if name.isdigit()), default=0)
            if whole >= before + 2 and any("tmp" in name for name in names):
                break
            time.sleep(0.0005)
        time.sleep(random.uniform(0, 0.05))
        child.kill()
    finally:
        _, errors = child.communicate()
    assert child.returncode == -9, errors.decode()
    assert check_newest(folder) >= whole


def test_leftovers_are_removed(tmp_path):
    with TrainCheckpoints(tmp_path, keep_last=2, identity={}, report=print) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        leftover = tmp_path / "2.orbax-checkpoint-tmp"
        (leftover / "params").mkdir(parents=True)
        (leftover / "params" / "part").write_bytes(b"x")
    check_newest(tmp_path, 1)
    assert not leftover.exists()


@contextmanager
def file_size_limit(size: int):
    """Writes beyond ``size`` bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("surface", ["wait", "save", "close", "latest_step"])
def test_failed_save_surfaces(tmp_path, surface, capfd):
    folder = tmp_path / "run"
    checkpoints = TrainCheckpoints(folder, keep_last=2, identity={}, report=print)
    save(checkpoints, 1)
    checkpoints.wait()
    with file_size_limit(50_000):
        save(checkpoints, 2)  # Fails, but in the background.
        calls = {
            "wait": checkpoints.wait,
            "close": checkpoints.close,
            "latest_step": checkpoints.latest_step,
            "save": lambda: save(checkpoints, 3),
        }
        with pytest.raises(FabricError) as caught:
            calls[surface]()
    assert str(folder) in str(caught.value)
    assert "File too large" in str(caught.value)
    assert "Free space" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["1"]
    if surface != "close":
        # With space again, the same object goes on.
        save(checkpoints, 4)
        assert checkpoints.latest_step() == 4
        checkpoints.close()
    check_newest(folder, 1 if surface == "close" else 4)
    assert capfd.readouterr().err == ""


def test_failed_replacement_keeps_the_old(tmp_path):
    with TrainCheckpoints(tmp_path, keep_last=1, identity={}, report=print) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        with file_size_limit(50_000):
            save(checkpoints, 1)
            with pytest.raises(FabricError, match="cannot save"):
                checkpoints.wait()
    check_newest(tmp_path, 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(small_disk, capfd):
    folder = small_disk / "run"
    with TrainCheckpoints(folder, keep_last=2, identity={}, report=print) as checkpoints:
        save(checkpoints, 1, size=120_000)  # 1.9 MB
        save(checkpoints, 2, size=120_000)
        with pytest.raises(FabricError, match=r"cannot save .*[Nn]o space left.*Free space"):
            checkpoints.wait()
    check_newest(folder, 1, size=120_000)
    assert capfd.readouterr().err == ""


def test_read_only_disk(small_disk):
    folder = small_disk / "run"
    with TrainCheckpoints(folder, keep_last=2, identity={}, report=print) as checkpoints:
        save(checkpoints, 1, size=100)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True, capture_output=True)
    with TrainCheckpoints(folder, keep_last=2, identity={}, report=print) as checkpoints:
        restored = checkpoints.restore(*make_state(0, 100))
        assert restored is not None
        assert restored.step == 1
        save(checkpoints, 2, size=100)
        with pytest.raises(FabricError, match=f"cannot save .*{folder}.*[Rr]ead-only"):
            checkpoints.wait()
    with pytest.raises(FabricError, match=r"cannot save .*other.*[Rr]ead-only"):
        TrainCheckpoints(small_disk / "other", keep_last=2, identity={}, report=print)


def test_folder_is_a_file(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(FabricError, match=str(tmp_path / "run")):
        TrainCheckpoints(tmp_path / "run", keep_last=2, identity={}, report=print)


def test_nothing_is_printed(tmp_path, capfd):
    with TrainCheckpoints(tmp_path, keep_last=1, identity={}, report=print) as checkpoints:
        for step in range(3):
            save(checkpoints, step)
        checkpoints.restore(*make_state(0))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
