"""A run goes on on another mesh, on another number of devices, and on the same one bit for bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fabric_jax.checkpoints.native import save_model
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.initialize import initialize_base
from tests.parallel.virtual_devices import run_program
from tests.training.conftest import MICRO

STEPS, STOP, SAVED = 12, 8, 6
"""The run stops when it has given ``STOP`` batches; the newest checkpoint is of step ``SAVED``."""
Line = tuple[int, float, float]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and rows: an epoch of 9 steps and one row more, so that a run begins a second one."""
    folder = tmp_path_factory.mktemp("job")
    definition = define_decoder(MICRO, DecoderOptions())
    save_model(folder / "model", definition, initialize_base(definition, 0), tokenizer_json=None)
    rows = [{"text": f"row {i} says {'word ' * (i % 5)}{i * i}"} for i in range(37)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    return str(folder / "model"), str(folder / "rows.jsonl")


def run(
    job: tuple[str, str], output: Path, mesh: str, *, stop: int = 0, act_quant: str = "none"
) -> list[Line]:
    devices = 8 if mesh else 1
    words = (str(output), *job, act_quant, str(STEPS), str(stop), mesh)
    return [tuple(line) for line in run_program("resume", *words, devices=devices)]


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def check_same_run(found: list[Line], expected: list[Line], tolerance: float) -> None:
    """The same steps at the same positions in the data, with these losses."""
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    losses = np.array([[line[2] for line in lines] for lines in (found, expected)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=tolerance)


def stopped(job: tuple[str, str], output: Path, mesh: str, act_quant: str = "none") -> None:
    lines = run(job, output, mesh, stop=STOP, act_quant=act_quant)
    assert SAVED <= lines[-1][0] < STEPS
    found = sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())
    assert found[-1] == SAVED


@pytest.mark.slow
def test_a_run_goes_on_on_other_meshes_and_on_one_device(
    job: tuple[str, str], tmp_path: Path
) -> None:
    """Without the quantiser, which would turn a last digit into another code now and then."""
    expected = run(job, tmp_path / "one", "")
    assert [line[0] for line in expected] == list(range(1, STEPS + 1))
    stopped(job, tmp_path / "stopped", "data=2,fsdp=2,tensor=2")
    for mesh in ("", "data=1,fsdp=4,tensor=2"):
        output = tmp_path / f"on {mesh}"
        shutil.copytree(tmp_path / "stopped", output)
        check_same_run(run(job, output, mesh), expected, 1e-5)
    stopped(job, tmp_path / "alone", "")
    check_same_run(run(job, tmp_path / "alone", "data=4,tensor=2"), expected, 1e-5)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_on_the_same_mesh(job: tuple[str, str], tmp_path: Path) -> None:
    mesh = "data=2,fsdp=2,tensor=2"
    whole = run(job, tmp_path / "whole", mesh, act_quant="per_token")
    stopped(job, tmp_path / "stopped", mesh, "per_token")
    assert run(job, tmp_path / "stopped", mesh, act_quant="per_token") == whole
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")
