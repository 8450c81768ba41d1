"""Arrays in large pages: the same numbers, and the pages that the system says it gave."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels import large_pages
from fabric_kernels.large_pages import LEAST_BYTES, in_large_pages, move_to_large_pages


def made(dtype: jax.typing.DTypeLike, size: int = 4 * LEAST_BYTES) -> jax.Array:
    numbers = np.random.default_rng(0).integers(0, 128, size // jnp.dtype(dtype).itemsize)
    return jnp.asarray(numbers.reshape(2, -1), dtype)


def kilobytes_in_large_pages(x: jax.Array) -> int:
    """Of the mapping in which an array begins."""
    at, inside = x.unsafe_buffer_pointer(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= at < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("the array lies nowhere")


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_same_numbers_lie_in_large_pages(dtype: jax.typing.DTypeLike):
    x = made(dtype)
    before = np.asarray(x).copy()
    y = in_large_pages(x)
    x.delete()
    assert (y.dtype, y.shape) == (before.dtype, before.shape)
    np.testing.assert_array_equal(np.asarray(y), before)
    np.testing.assert_array_equal(jax.jit(lambda a: a + a)(y), before + before)
    if large_pages.are_for_asking():
        assert kilobytes_in_large_pages(y) >= y.nbytes // 1024


def test_what_is_small_or_divided_stays_where_it_is(monkeypatch: pytest.MonkeyPatch):
    small, large = made(jnp.uint8, LEAST_BYTES // 2), made(jnp.uint8)
    assert in_large_pages(small) is small
    monkeypatch.setattr(large_pages, "_is_whole_on_cpu", lambda _: False)
    assert in_large_pages(large) is large


def test_a_system_without_them_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    x = made(jnp.uint8)
    for text in ("always madvise [never]", "[always] madvise never"):
        (tmp_path / "enabled").write_text(text)
        monkeypatch.setattr(large_pages, "_SETTING", tmp_path / "enabled")
        assert in_large_pages(x) is x
    monkeypatch.setattr(large_pages, "_SETTING", tmp_path / "nothing")
    assert in_large_pages(x) is x


def test_a_tree_is_moved_in_place():
    tree = {"a": made(jnp.uint8), "b": {"c": made(jnp.float32), "d": None}}
    moved = tree["a"]
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).copy(), tree)
    move_to_large_pages(tree)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert (tree["a"] is not moved) == large_pages.are_for_asking()
