"""The implementations and devices that products are tested on."""

import os

import jax
import pytest
from fabric_kernels import cpu_library
from fabric_kernels.ternary_matmul import Implementation


def need_cpu_kernels() -> None:
    """Skips where there are none, or fails if FABRIC_REQUIRE_CPU_KERNELS is 1."""
    status = cpu_library.status()
    if status.library is not None:
        return
    if os.environ.get("FABRIC_REQUIRE_CPU_KERNELS") == "1":
        pytest.fail(f"no CPU kernels: {status.problem}")
    pytest.skip(f"no CPU kernels: {status.problem}")


@pytest.fixture
def cpu_kernels() -> None:
    """For tests of what only these kernels do."""
    need_cpu_kernels()


@pytest.fixture(params=["xla", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "cpu":
        need_cpu_kernels()
    return request.param


@pytest.fixture
def cuda() -> None:
    """For tests of kernels that only CUDA's compiler and a device of it run; skips elsewhere."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA device")


@pytest.fixture
def hopper() -> None:
    """Skips where there is no GPU of compute capability 9.0."""
    need_hopper()


def need_hopper() -> None:
    """For kernels of Hopper's own instructions; skips on other devices."""
    device = jax.devices()[0]
    if device.platform != "gpu" or device.compute_capability != "9.0":
        pytest.skip("needs a GPU of compute capability 9.0")
