import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fabric_jax.checkpoints.arrays import Layout, is_finite
from fabric_jax.checkpoints.assemble import (
    _aligned,
    _to_device,
    assemble_base,
    in_form,
    quantize_matrix,
)
from fabric_jax.checkpoints.huggingface.read import open_huggingface
from fabric_jax.checkpoints.source import ALL_ROWS
from fabric_jax.errors import FabricError
from fabric_jax.models.decoder import DecoderOptions, define_decoder
from fabric_jax.models.packing import pack_stack
from tests.checkpoints import hf_folder
from tests.models.tiny_problems import make_problem


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 300, 1000)])
def test_on_cpu_a_leaf_is_its_buffer(shape, dtype):
    buffer = _aligned(Layout(shape=shape, dtype=dtype))
    buffer[...] = 1
    array = _to_device(buffer)
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
    assert array.shape == shape
    assert array.dtype == dtype


def test_a_leaf_outlives_its_buffer():
    buffer = _aligned(Layout(shape=(1000, 1000), dtype="float32"))
    buffer[...] = 7
    array = _to_device(buffer)
    del buffer
    others = [np.full((1000, 1000), 3.0, np.float32) for _ in range(8)]
    assert float(array.sum()) == 7e6
    del others


def test_a_donated_leaf():
    """Training from masters donates them: the program then copies, and nobody sees its result."""
    buffer = _aligned(Layout(shape=(512, 512), dtype="float32"))
    buffer[...] = 1
    array = _to_device(buffer)
    found = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    np.testing.assert_array_equal(found, np.full((512, 512), 2, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_matrix_is_quantised_as_a_stack_is(dtype):
    masters = np.random.default_rng(0).standard_normal((3, 20, 30)).astype(dtype)
    packed, scales = pack_stack(masters.astype(np.float32))
    for layer in range(3):
        found = quantize_matrix(masters[layer])
        np.testing.assert_array_equal(found.packed, packed[layer])
        assert found.scale == scales[layer]
        assert found.k == 30


@pytest.fixture
def source(tmp_path):
    hf_folder.write_problem(tmp_path, "bitnet-relu2-offline")
    return open_huggingface(tmp_path)


def test_another_mode(source):
    definition = define_decoder(source.config, DecoderOptions(mode="master"))
    with pytest.raises(FabricError, match="holds packed weights; expected the mode 'master'"):
        assemble_base(definition, source)
    for mode in ("master", "float"):
        with pytest.raises(FabricError, match=f"packed weights, which can't be .* {mode} ones"):
            in_form(source, mode)
    assert in_form(source, None) is source
    assert in_form(source, "packed") is source


def test_masters_are_no_plain_weights(tmp_path):
    hf_folder.write_problem(tmp_path, "bitnet-relu2-online")
    source = open_huggingface(tmp_path)
    with pytest.raises(FabricError, match="master weights, which can't be turned into float ones"):
        in_form(source, "float")


@dataclass
class Wrong:
    """A source that does not give the shapes it promised."""

    source: object

    def __getattr__(self, name):
        return getattr(self.source, name)

    def tensor(self, name, layer=None, *, rows=ALL_ROWS):
        return self.source.tensor(name, layer, rows=rows)[..., :-1]


def test_a_source_that_breaks_its_word(source):
    definition = define_decoder(source.config, DecoderOptions(mode="packed"))
    with pytest.raises(FabricError, match=r"another shape; expected \[.*16\]; found \[.*15\]"):
        assemble_base(definition, Wrong(source))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_found(dtype, value):
    largest = float(ml_dtypes.finfo(dtype).max)
    array = np.full((70_000, 2), largest, dtype)
    array[0, 0], array[3, 1] = -largest, 0
    assert is_finite(array)
    assert is_finite(jax.numpy.asarray(array))
    array[-1, 1] = value
    assert not is_finite(array)
    assert not is_finite(jax.numpy.asarray(array))
    assert not is_finite(array[-1, 1:].reshape(()))


MEASURE = """
import gc, sys
import jax
from fabric_jax.checkpoints.loading import load_base

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

load_base(sys.argv[1], dtype="bfloat16")
gc.collect()
idle = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
base = load_base(sys.argv[2], dtype="bfloat16").base
print(memory("VmHWM") - idle, sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_than_the_model(tmp_path):
    """Peak memory above the idle process, in a process of its own, and the bytes of the arrays."""
    layers, width, ffn, vocab = 4, 1024, 4096, 24_000
    problem = make_problem("bitnet-relu2-offline", hf_folder.TINY)
    hf_folder.write_problem(tmp_path / "small", "bitnet-relu2-offline")
    config = hf_folder.config_of(problem) | {
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    shapes = {"self_attn": dict.fromkeys("qkvo", (width, width))}
    shapes["mlp"] = {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}
    tensors = {"model.embed_tokens.weight": np.ones((vocab, width), ml_dtypes.bfloat16)}
    tensors["model.norm.weight"] = np.ones(width, ml_dtypes.bfloat16)
    for layer in range(layers):
        start = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm"):
            tensors[f"{start}.{name}.weight"] = np.ones(width, ml_dtypes.bfloat16)
        tensors[f"{start}.mlp.ffn_sub_norm.weight"] = np.ones(ffn, ml_dtypes.bfloat16)
        for part, linears in shapes.items():
            for name, (n, k) in linears.items():
                module = f"{start}.{part}.{name}_proj"
                tensors[f"{module}.weight"] = np.full((n // 4, k), 0b10_01_00_10, np.uint8)
                tensors[f"{module}.weight_scale"] = np.ones(1, ml_dtypes.bfloat16)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    paths = [str(tmp_path / "small"), str(tmp_path / "large")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    peak, arrays = map(int, done.stdout.split())
    assert arrays > 60e6
    # The constant is what threads and allocators keep, whatever the size.
    assert peak < 1.2 * arrays + 16e6, f"{peak / 1e6:.0f} MB for {arrays / 1e6:.0f} MB"
