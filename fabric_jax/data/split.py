"""Setting rows aside for evaluation."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fabric_jax.errors import FabricError


def split_rows(
    keys: NDArray[np.uint64], labels: Sequence[str | None], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits rows into training and evaluation rows, class by class.

    Equal rows stay on one side. Every class with two different rows is on both sides.

    Args:
        keys: uint64 [n], equal for equal rows.
        labels: [n] classes; None is a class too.
        fraction: share of each class to set aside.
        seed: chooses the rows, whatever their order.

    Returns:
        Indices of training rows and of evaluation rows, int64, ascending.

    Raises:
        FabricError: there are too few rows to set any aside.
    """
    classes: dict[str | None, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (key, label) in enumerate(zip(keys.tolist(), labels, strict=True)):
        classes[label][key].append(i)
    chosen: list[int] = []
    for groups in classes.values():
        if len(groups) < 2:
            continue
        order = sorted(groups, key=lambda key: _rank(seed, key))
        wanted = fraction * sum(len(rows) for rows in groups.values())
        taken: list[int] = []
        for key in order[:-1]:
            taken += groups[key]
            if len(taken) + 0.5 > wanted:
                break
        chosen += taken
    if not chosen:
        raise FabricError(
            f"cannot set aside {fraction:g} of {len(keys)} rows for evaluation",
            expected="at least two different rows of a class",
            fix="Give eval_data, or set eval_fraction to 0",
        )
    aside = np.zeros(len(keys), np.bool_)
    aside[chosen] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def _rank(seed: int, key: int) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
