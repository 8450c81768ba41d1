"""Answers and evaluations on eight virtual devices equal those of one, whatever the mesh."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric_jax.cli.main import main
from fabric_jax.parallel.mesh import parse_mesh
from tests.parallel.virtual_devices import EVERY_MESH, run_program


def check(text: str, one: dict[str, Any], found: dict[str, Any]) -> None:
    """What is found on a mesh is what one device found."""
    mesh = parse_mesh(text, 8)
    assert one["q"][0] == one["q"][1]
    assert found["q"] == [one["q"][0], one["q"][0] // (mesh.fsdp * mesh.tensor)], text
    for name in one.keys() - {"q", "logits", "evaluation"}:
        assert found[name] == one[name], f"{name} on {text}"
    # Float sums over fewer rows may round otherwise, and turn an int8 code of a token over.
    apart = np.abs(np.subtract(found["logits"], one["logits"])).max(axis=-1)
    assert np.mean(apart < 1e-5) > 0.9, text
    assert apart.max() < 5e-3, text
    for name, value in one["evaluation"].items():
        if name.endswith("loss"):
            assert abs(found["evaluation"][name] - value) < 1e-5, f"{name} on {text}"
        else:
            assert found["evaluation"][name] == value, f"{name} on {text}"


@pytest.mark.slow
def test_a_mesh_of_all_axes_answers_as_one_device(tmp_path: Path) -> None:
    text = "data=2,fsdp=2,tensor=2"
    found = run_program("decode", str(tmp_path), "xla", "some", text)
    answers = found[""]["several"]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert max(len(set(answer)) for answer in answers) > 6  # not one token over and over
    check(text, found[""], found[text])


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_every_mesh_answers_as_one_device(implementation: str, tmp_path: Path) -> None:
    found = run_program("decode", str(tmp_path), implementation, "everything", *EVERY_MESH)
    for text in EVERY_MESH:
        check(text, found[""], found[text])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "bitnet-tiny", "a", "--mesh", "data=2"], "has 2 devices"),
        (["generate", "bitnet-tiny", "a", "--mesh", "rows=2"], "unknown mesh axis"),
        (
            ["generate", "bitnet-tiny", "--prompts", "p", "--out", "o", "--mesh", "data=3"],
            "8 rows in a batch can't be cut along the mesh data=3",
        ),
        (["evaluate", "--model", "m", "--data", "d", "--mesh", "fsdp=3"], "divisible by data"),
        (
            ["evaluate", "--model", "m", "--data", "d", "--mesh", "data=2", "--against", "dtype=x"],
            "compared on one device",
        ),
    ],
)
def test_what_a_mesh_cannot_do_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
