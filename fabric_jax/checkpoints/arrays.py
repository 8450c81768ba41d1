"""Trees of arrays as files know them: by dotted names, shapes, dtypes and digests."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

HostArray = npt.NDArray[Any]

SHOWN = 5
"""Differences spelt out in one message."""
PIECE_ELEMENTS, CACHED_ELEMENTS = 1 << 22, 1 << 16
# All ones in NaN and the infinities alone.
EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their dotted paths, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_leaves(like: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree built like ``like`` from the leaves of the same names."""
    return jax.tree.unflatten(
        jax.tree.structure(like), [leaves[name] for name in named_leaves(like)]
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def layout_of(array: Any) -> Layout:
    """Shape and dtype of anything that has them."""
    return Layout(shape=tuple(array.shape), dtype=np.dtype(array.dtype).name)


def layouts(tree: Any) -> dict[str, Layout]:
    """Shape and dtype of each leaf, by dotted name; abstract leaves will do."""
    return {name: layout_of(leaf) for name, leaf in named_leaves(tree).items()}


def layout_differences(expected: Mapping[str, Layout], found: Mapping[str, Layout]) -> list[str]:
    """What keeps ``found`` from being ``expected``, one phrase a tensor; empty if nothing does."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    unexpected = [f"{name} is unexpected" for name in found if name not in expected]
    wrong = [
        f"{name} is {found[name]} instead of {layout}"
        for name, layout in expected.items()
        if name in found and found[name] != layout
    ]
    return wrong + missing + unexpected


def summarize(phrases: Iterable[str]) -> str:
    """The first few phrases, and how many more there are."""
    listed = list(phrases)
    rest = len(listed) - SHOWN
    return "; ".join(listed[:SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def digest(array: HostArray) -> str:
    """SHA-256 of the elements' bytes in C order."""
    # A view as bytes: bfloat16 arrays have no buffer interface of their own.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def is_finite(array: Any) -> bool:
    """Whether no element is NaN or infinite; integers always are."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    if isinstance(array, np.ndarray):
        return _is_finite(cast(HostArray, array))
    if array.ndim == 0:
        return _is_finite(np.asarray(array))
    # Piece by piece: on another device the whole would be copied to the host at once.
    rows = max(1, PIECE_ELEMENTS // max(1, array.size // max(1, array.shape[0])))
    pieces = (array[start : start + rows] for start in range(0, array.shape[0], rows))
    return all(_is_finite(np.asarray(piece)) for piece in pieces)


def _is_finite(array: HostArray) -> bool:
    """The same on the host, in pieces that stay in the caches with their masks."""
    flat = array.reshape(-1)
    exponent = EXPONENTS.get(array.dtype.name)
    for start in range(0, flat.size, CACHED_ELEMENTS):
        piece = flat[start : start + CACHED_ELEMENTS]
        if exponent is None:
            finite = np.isfinite(piece).all()
        else:  # Several times as fast as isfinite, which goes through float32.
            finite = ((piece.view(np.uint16) & exponent) != exponent).all()
        if not finite:
            return False
    return True


def snapshot(tree: Any) -> dict[str, HostArray]:
    """Copies of all leaves in host memory, by dotted name.

    The copies share nothing with the tree, so that its buffers may be donated at once.
    """
    leaves = named_leaves(tree)
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # np.asarray of an array on the CPU is a view of the very buffer that donation overwrites.
    return {name: np.array(leaf, copy=True) for name, leaf in leaves.items()}


def place_like(like: Any, array: HostArray) -> jax.Array:
    """``array`` on the devices where ``like`` is, in memory of its own."""
    where = like.sharding if isinstance(like, jax.Array) and like.committed else None
    return jax.device_put(array, where, may_alias=False)
