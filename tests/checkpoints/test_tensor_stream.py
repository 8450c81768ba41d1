"""The streaming safetensors writer against the library's reader."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fabric_jax.checkpoints.arrays import layout_of
from fabric_jax.checkpoints.tensor_file import open_tensors
from fabric_jax.checkpoints.tensor_stream import TensorStream, write_streams
from fabric_jax.errors import FabricError

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int8, np.int32)


def stream(array: np.ndarray, pieces: int = 1) -> TensorStream:
    return TensorStream(
        layout=layout_of(array), pieces=lambda: np.array_split(array.reshape(-1), pieces)
    )


arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(dtype),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tensors=st.dictionaries(names, arrays, min_size=1, max_size=5), pieces=st.integers(1, 4))
def test_the_library_reads_what_was_streamed(tmp_path_factory, tensors, pieces):
    path = tmp_path_factory.mktemp("stream") / "model.safetensors"
    write_streams(path, {name: stream(array, pieces) for name, array in tensors.items()})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert open_tensors(path).read(name).tobytes() == array.tobytes()
    with safe_open(path, framework="np") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    """Where both have the same order of tensors: wide dtypes first, then names."""
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, np.float32),
        "c": np.ones((2, 2), np.float16),
        "d": np.arange(5, dtype=np.uint8),
    }
    write_streams(tmp_path / "ours", {name: stream(array) for name, array in tensors.items()})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_wrong_pieces_are_an_error(tmp_path: Path) -> None:
    good = np.ones((2, 3), np.float32)
    short = TensorStream(layout=layout_of(good), pieces=lambda: [good[0]])
    with pytest.raises(ValueError, match="w has 12 bytes instead of 24"):
        write_streams(tmp_path / "m", {"w": short})
    narrow = TensorStream(layout=layout_of(good), pieces=lambda: [good.astype(np.float16)])
    with pytest.raises(ValueError, match="a piece of w is float16"):
        write_streams(tmp_path / "m", {"w": narrow})
    for value in (np.nan, np.inf):
        with pytest.raises(FabricError, match="w has values that are not finite"):
            write_streams(tmp_path / "m", {"w": stream(good * np.float32(value))})
