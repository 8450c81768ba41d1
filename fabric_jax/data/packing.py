"""First-fit packing: which documents share a row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def first_fit(sizes: Sequence[int] | NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Puts each item, in order, into the first bin that has room for it.

    A tree of the largest room below each node finds that bin in O(log n) steps.

    Args:
        sizes: [n], each from 0 to ``capacity``.
        capacity: the room of an empty bin.

    Returns:
        The bin of each item, int64 [n]; bins count from 0 in the order they are opened.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins = np.empty(len(sizes), np.int64)
    for item, size in enumerate(np.asarray(sizes).tolist()):
        if not 0 <= size <= capacity:
            raise ValueError(f"item {item} of size {size} does not fit {capacity}")
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        bins[item] = node - leaves
        room[node] -= size
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return bins
