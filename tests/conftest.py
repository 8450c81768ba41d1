"""Shared set-up: strict JAX, the data folder beside the checkout, the oracles."""

import importlib
import os
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# The suite spends most of its time compiling small programs that run once, so it asks for what
# compiles fastest. `make test-slow` sets XLA_FLAGS to nothing: long tests run what users run.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    # Later versions end the process over this one, which they don't know.
    + " --xla_cpu_use_fusion_emitters=false"
    * version("jaxlib").startswith("0.10."),
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that need it skip without it."""
    folder = Path(os.environ.get("FABRIC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder} (set FABRIC_SHARED_DATA)")
    return folder


def require(*names: str) -> list[ModuleType]:
    """Imports oracles; without them the test skips, or fails if FABRIC_REQUIRE_ORACLES is set."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            if os.environ.get("FABRIC_REQUIRE_ORACLES"):
                raise
            pytest.skip(f"{error}; `make oracles` installs it")
    return modules


@pytest.fixture(scope="session")
def oracle():
    """``oracle("torch", "transformers")`` returns the modules or skips."""
    return require
