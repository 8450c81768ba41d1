"""Kernels let the launch after them begin, on GPUs that have the instruction for it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fabric_kernels import nvidia, triton_programs
from fabric_kernels.norm import rms_norm

from tests.kernels.test_triton_kernel import ON_GPU, lowered

LAUNCH = "griddepcontrol.launch_dependents"


@pytest.mark.skipif(ON_GPU, reason="a GPU lowers for itself")
@pytest.mark.parametrize(
    ("capability", "platform", "launches"),
    [
        ((9, 0), "cuda", True),
        ((10, 3), "cuda", True),
        ((8, 9), "cuda", False),
        ((9, 0), "rocm", False),
    ],
    ids=str,
)
def test_launches_dependents(
    capability: Any, platform: str, launches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_programs, "compute_capability", lambda: capability)
    x, gain = jnp.ones((64, 256), jnp.bfloat16), jnp.ones(256)
    norm = partial(rms_norm, eps=1e-5, implementation="triton")
    text = lowered(norm, x, gain, platform=platform)
    assert (LAUNCH in text) == launches


@pytest.mark.parametrize(
    ("backend", "found", "expected"),
    [
        ("gpu", "9.0", nvidia.HOPPER),
        ("gpu", "12.0", (12, 0)),
        ("gpu", "gfx942", nvidia.NONE),
        ("cpu", "", nvidia.NONE),
    ],
)
def test_compute_capability(
    backend: str, found: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        compute_capability = found

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert nvidia.compute_capability() == expected
