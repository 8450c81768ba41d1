"""Training on eight virtual devices equals training on one, whatever the mesh."""

from typing import Any

import pytest

from fabric_jax.errors import FabricError
from fabric_jax.parallel.mesh import MeshShape, parse_mesh
from tests.parallel.virtual_devices import EVERY_MESH, run_program


def check(setting: str, text: str, found: dict[str, Any]) -> None:
    where = f"{setting} on {text}"
    mesh = parse_mesh(text, 8)
    assert found["loss"] < 1e-5, where
    # Adam divides by the size of a gradient, so that the smallest ones are mostly rounding.
    assert found["params"] < 0.5, where
    assert found["aliased"], where
    for name, (whole, *parts) in found["parts"].items():
        if setting != "1.6":  # 13 bytes a row are not cut in two.
            assert parts == [whole // (mesh.fsdp * mesh.tensor)], f"{name} of {where}"
    assert found["bytes_held"] == [found["bytes_on_device"]], where
    # Never those of two layers; what is gathered along both axes is counted half, and then whole.
    assert all(size < 2 * found["layer_bytes"] for size in found["gathered"]), where
    if mesh.fsdp == 1 and setting in ("xla", "cpu"):
        assert not found["gathered"], where
    if mesh.fsdp > 1 and setting in ("xla", "cpu"):
        # In the loops over layers, forward and backward: one layer's part of the axis tensor.
        assert found["gathered"] == [found["layer_bytes"] // mesh.tensor] * 2, where


@pytest.mark.slow
def test_a_mesh_of_all_axes_gives_the_losses_of_one_device() -> None:
    found = run_program("meshes", "xla", "data=2,fsdp=2,tensor=2")
    for text, result in found["xla"].items():
        check("xla", text, result)


@pytest.mark.long
@pytest.mark.parametrize("setting", ["xla", "cpu", "1.6", "float", "master"])
def test_every_mesh_gives_the_losses_of_one_device(setting: str) -> None:
    for text, result in run_program("meshes", setting, *EVERY_MESH)[setting].items():
        check(setting, text, result)


def test_a_mesh_is_read_by_names() -> None:
    assert parse_mesh("data=4,fsdp=2,tensor=2", 16) == MeshShape(data=4, fsdp=2, tensor=2)
    assert parse_mesh("tensor=2", 2) == MeshShape(tensor=2)
    assert parse_mesh("", 6) == MeshShape(data=6)
    assert str(parse_mesh("tensor=2, data=3", 6)) == "data=3,tensor=2"
    assert str(MeshShape()) == "data=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=4", "expected a product of 8"),
        ("data=8,tensor=2", "has 16 devices"),
        ("dta=8", "Did you mean 'data'"),
        ("data=4,data=2", "names data twice"),
        ("data=two", "no number of devices"),
        ("data=-8", "no number of devices"),
        ("data", "no number of devices"),
        ("data=0", "out of range"),
    ],
)
def test_a_wrong_mesh_is_refused(text: str, message: str) -> None:
    with pytest.raises(FabricError, match=message):
        parse_mesh(text, 8)
