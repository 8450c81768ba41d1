"""The Triton kernels of attention: interpreted on CPU, lowered for GPUs."""

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_kernels.attention import api, triton, xla
from fabric_kernels.attention.triton_kernels import Tile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_attention_tiles import NAMES, assert_close, exact, make_mask, operands, run
from tests.kernels.test_triton_kernel import lowered

TILES = triton.Tiles(
    forward=Tile(queries=16, keys=32, warps=4, stages=1),
    query_gradients=Tile(queries=16, keys=16, warps=4, stages=1),
    key_gradients=Tile(queries=32, keys=16, warps=4, stages=1),
)
SCALE = 0.3

Shape = tuple[int, int, int, int, int, int]


def mask_of(kind: str, t: int, s: int, seed: int = 0) -> np.ndarray:
    """[T, S]; queries are the last of all positions, as they are behind a cache."""
    position = np.arange(t) + max(s - t, 0)
    causal = np.arange(s)[None] <= position[:, None]
    if kind == "causal":
        return causal
    if kind == "segments":
        starts = np.random.default_rng(seed).integers(0, max(s, t), 3)
        segment = (np.arange(max(s, t))[:, None] >= starts).sum(-1)
        return causal & (segment[position][:, None] == segment[None, :s])
    if kind == "padding":  # the first positions are no tokens: their queries see nothing
        return causal & (np.arange(s)[None] >= s // 3)
    return make_mask(1, t, s, {"all": 2.0, "half": 0.5, "few": 0.03, "none": 0.0}[kind], seed)[0]


KINDS = ("causal", "segments", "padding", "all", "half", "few", "none")


@partial(jax.jit, static_argnames="tiles")
def kernels(
    inputs: list[jax.Array], mask: jax.Array, tiles: triton.Tiles | None = TILES
) -> list[jax.Array]:
    """The output and the gradients."""
    q, k, v, g = inputs
    call = partial(triton.attention, mask=mask, scale=SCALE, tiles=tiles)
    out, transpose = jax.vjp(call, q, k, v)
    return [out, *transpose(g)]


def check(inputs: list[jax.Array], mask: np.ndarray, tiles: triton.Tiles | None = TILES) -> None:
    found = kernels(inputs, jnp.asarray(mask), tiles)
    for name, one, expected in zip(NAMES, found, exact(inputs, mask, SCALE), strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, expected, name, 4e-6)


def test_masks() -> None:
    """Each row of the batch has a mask of another kind."""
    check(
        operands((len(KINDS), 67, 67, 2, 1, 16)),
        np.stack([mask_of(kind, 67, 67) for kind in KINDS]),
    )


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((2, 5, 41, 4, 2, 24), TILES),  # fewer queries than keys and than a tile; an odd width
        ((2, 64, 32, 2, 2, 16), TILES),  # whole tiles
        ((2, 33, 48, 3, 1, 80), None),
    ],
    ids=["fewer-queries", "whole-tiles", "own-tiles"],
)
def test_shapes(shape: Shape, tiles: triton.Tiles | None) -> None:
    mask = np.stack([mask_of(kind, *shape[1:3]) for kind in ("segments", "half")])
    check(operands(shape), mask, tiles)


@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 70)] * 4, st.booleans()), max_size=8),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_any_mask(boxes: list[tuple[int, int, int, int, bool]], seed: int) -> None:
    """Rectangles of keys that are seen or hidden: tiles of all sorts, in any order."""
    mask = np.zeros((1, 50, 70), bool)
    for a, b, c, d, seen in boxes:
        mask[0, min(a, b) : max(a, b), min(c, d) : max(c, d)] = seen
    check(operands((1, 50, 70, 2, 1, 16), seed), mask)


def test_bfloat16() -> None:
    """As near to float64 as plain jax is, which does not round what a score's gradient is."""
    inputs = operands((1, 40, 40, 2, 1, 32), dtype="bfloat16")
    mask = mask_of("segments", 40, 40)[None]
    found = kernels(inputs, jnp.asarray(mask))
    plain = run(partial(xla.attention, mask=jnp.asarray(mask), scale=SCALE), inputs)
    for name, x, y, wide in zip(NAMES, found, plain, exact(inputs, mask, SCALE), strict=True):
        assert x.dtype == jnp.bfloat16
        errors = [np.linalg.norm(np.asarray(one, np.float64) - wide) for one in (x, y)]
        assert errors[0] <= 2 * errors[1], name


def test_vmap() -> None:
    """Over queries and masks; keys and values are shared."""
    sets = [operands((1, 20, 20, 1, 1, 16), seed) for seed in range(2)]
    masks = np.stack([mask_of(kind, 20, 20)[None] for kind in ("segments", "half")])
    _, k, v, g = sets[0]
    queries = jnp.stack([q for q, *_ in sets])
    mapped = jax.jit(jax.vmap(lambda q, mask: kernels([q, k, v, g], mask)))(
        queries, jnp.asarray(masks)
    )
    for i, mask in enumerate(masks):
        rows = zip(NAMES, mapped, exact([queries[i], k, v, g], mask, SCALE), strict=True)
        for name, found, expected in rows:
            assert_close(found[i], expected, name, 4e-6)


def test_a_mask_that_pallas_would_misread() -> None:
    long = 50_000
    x = jax.ShapeDtypeStruct((1, long, 1, 16), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, long, long), jnp.bool_)
    with pytest.raises(NotImplementedError, match=r"\[1, 50000, 50000\]; use implementation xla"):
        jax.eval_shape(partial(triton.attention, scale=1.0), x, x, x, mask)


# ---- tiles that are skipped --------------------------------------------------------------------


@given(st.text("-.#", min_size=9, max_size=9))
@settings(max_examples=100, deadline=None)
def test_bounds_hold_every_tile_once(flags: str) -> None:
    """``-`` is a tile that holds nothing, ``#`` one that holds all."""
    some = np.array([[[flag != "-" for flag in flags]]])
    every = np.array([[[flag == "#" for flag in flags]]])
    found = np.asarray(jax.jit(triton.tile_bounds)(some, every))[0, 0]
    start, stop, whole_start, whole_stop = found.tolist()
    whole = list(range(whole_start, whole_stop))
    assert all(flags[i] == "#" for i in whole)
    assert bool(whole) == ("#" in flags)
    rest = [i + len(whole) if i >= whole_start else i for i in range(start, stop - len(whole))]
    assert sorted(whole + rest) == list(range(start, stop))
    assert flags[start:stop] == flags.strip("-")


def test_a_causal_mask_halves_the_work() -> None:
    """All tiles before the diagonal are whole, none behind it is read."""
    codes = triton.mask_codes(jnp.asarray(mask_of("causal", 64, 64)[None]))
    forward, queries, keys = (np.asarray(x)[0] for x in triton.survey(codes, TILES))
    np.testing.assert_array_equal(forward[:, 1] - forward[:, 0], [1, 1, 2, 2])
    for bounds, counts in ((forward, [0, 0, 1, 1]), (queries, [0, 1, 2, 3]), (keys, [1, 1, 0, 0])):
        np.testing.assert_array_equal(bounds[:, 3] - bounds[:, 2], counts)


# ---- lowering and choice -----------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bfloat16", (2, 512, 512, 4, 4, 64)), ("float32", (1, 100, 130, 4, 2, 80))],
)
def test_lowers_without_scores(platform: str, dtype: str, shape: Shape) -> None:
    b, t, s, h, k, width = shape
    sizes = ((b, t, h, width), (b, s, k, width), (b, s, k, width), (b, t, h, width))
    inputs = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    mask = jax.ShapeDtypeStruct((b, t, s), jnp.bool_)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowered(partial(kernels, tiles=None), inputs, mask, platform=platform)
    assert text.count("xla.gpu.triton") == 3
    assert f"{t}x{s}xi8" in text
    assert f"{t}x{s}xf" not in text


@pytest.mark.parametrize(
    ("backend", "capability", "queries", "expected"),
    [
        ("gpu", "9.0", 2, "triton"),
        ("gpu", "8.0", 2, "triton"),
        ("gpu", "7.5", 2, "xla"),
        ("gpu", "gfx942", 2, "xla"),
        ("gpu", "9.0", 1, "xla"),
        ("tpu", None, 2, "xla"),
    ],
)
def test_choice_by_the_device(
    backend: str,
    capability: str | None,
    queries: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert api.attention_implementation(None, queries=queries) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("triton", "triton"), ("mosaic_gpu", "triton"), ("mosaic_tpu", "xla"), ("xla", "xla")],
)
def test_choice_by_name(name: Any, expected: str) -> None:
    assert api.attention_implementation(name, queries=2) == expected
    assert api.attention_implementation(name, queries=1) == "xla"
    q, k, v, _ = operands((1, 3, 3, 2, 1, 16))
    mask = jnp.asarray(mask_of("causal", 3, 3)[None])
    program = jax.jit(partial(api.attention, implementation=name)).trace(q, k, v, mask)
    assert ("fabric_triton" in str(program.jaxpr)) == (expected == "triton")
