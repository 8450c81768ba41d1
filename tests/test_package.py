"""``import fabric_jax``: cheap, and complete."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import fabric_jax

PROBE = """
import sys, time
start = time.perf_counter()
import fabric_jax
print(time.perf_counter() - start, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_the_package_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert not {"jax", "jaxlib", "flax", "numpy", "datasets", "rich", "tyro"} & set(modules)
    # A tenth of a second on an idle machine, with room for a busy one.
    assert float(seconds) < 1


@pytest.mark.parametrize("name", fabric_jax.__all__)
def test_every_public_name_resolves(name):
    assert getattr(fabric_jax, name) is getattr(fabric_jax, name)
    assert name in dir(fabric_jax)


def test_public_names_are_what_they_say():
    from fabric_jax.model import load_model
    from fabric_jax.models.config import ModelConfig

    assert fabric_jax.load_model is load_model
    assert fabric_jax.ModelConfig is ModelConfig
    assert fabric_jax.__version__ == version("fabric-jax")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = fabric_jax.load_modle
