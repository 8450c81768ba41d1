"""The lengths of the 264 biomedical training rows that the published times are of.

Time does not depend on which tokens a row has, so a machine without the data set and a tokenizer
measures the same epoch with random tokens. Lengths are those of the field ``text`` of train.jsonl
(BiomedQA, github.com/tetherto/qvac-rnd-fabric-llm-bitnet) in LLaMA's 32,000 tokens, without those
that begin and end a document; 18,166 in all.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fabric_jax.data.packing import first_fit

_TEXT = """
92 69 73 64 77 84 65 66 58 49 109 94 90 69 57 74 73 64 84 87 60 60 83 73 76 40 64 57 68 82 85 70
117 93 67 80 82 69 48 78 75 61 53 68 77 53 82 78 64 67 76 78 62 70 64 72 84 93 54 39 63 79 63 70
62 66 68 73 72 53 86 61 67 96 81 82 71 64 72 53 48 84 42 61 58 60 60 63 64 86 53 66 48 63 53 70
63 73 55 68 61 51 49 59 58 56 71 39 58 75 63 68 84 61 56 54 55 70 49 57 88 82 55 61 70 63 77 73
59 42 54 96 56 70 75 55 53 68 52 49 89 48 70 85 61 54 74 73 42 56 56 75 60 76 68 70 69 77 40 70
67 67 68 50 73 44 56 52 69 69 61 62 80 92 69 56 59 60 67 75 81 62 64 56 68 81 74 79 84 75 50 65
82 98 87 81 73 77 87 54 48 62 75 83 60 98 78 106 93 66 71 101 83 74 76 76 58 65 79 101 50 68 88
59 63 66 104 71 52 68 56 71 58 68 89 80 64 67 100 68 62 54 40 74 57 76 104 65 76 83 56 77 76 83
76 68 73 69 83 50 61 96 57 48
"""
LENGTHS: tuple[int, ...] = tuple(int(word) for word in _TEXT.split())


def rows_of_an_epoch(length: int, *, packing: bool) -> list[list[int]]:
    """Positions of the documents in each row of ``length``.

    n tokens, one before and one after them, take n + 1 positions; longer documents are cut. Without
    packing a row has one document, as in the published system.
    """
    sizes = [min(n + 1, length) for n in LENGTHS]
    if not packing:
        return [[size] for size in sizes]
    bins = first_fit(sizes, length)
    rows: list[list[int]] = [[] for _ in range(int(bins.max()) + 1)]
    for size, row in zip(sizes, bins.tolist(), strict=True):
        rows[row].append(size)
    return rows


def batches_of_an_epoch(
    length: int, rows: int, *, packing: bool, vocabulary: int, seed: int = 0
) -> list[Any]:
    """An epoch as batches [1, rows, length] of random tokens; the last is filled with padding."""
    from fabric_jax.data.batch import Batch

    generator = np.random.default_rng(seed)
    documents = rows_of_an_epoch(length, packing=packing)
    batches: list[Any] = []
    for start in range(0, len(documents), rows):
        segments, positions = np.zeros((2, 1, rows, length), np.int32)
        for row, sizes in enumerate(documents[start : start + rows]):
            _fill(segments[0, row], positions[0, row], sizes)
        real = segments > 0
        tokens = generator.integers(3, vocabulary, real.shape, np.int32) * real
        fields: Any = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, -1) * real,
            "loss_mask": real.astype(np.float32),
            "segment_ids": segments,
            "positions": positions,
        }
        batches.append(Batch(**fields))
    return batches


def _fill(segments: NDArray[np.int32], positions: NDArray[np.int32], sizes: list[int]) -> None:
    at = 0
    for number, size in enumerate(sizes, 1):
        segments[at : at + size] = number
        positions[at : at + size] = np.arange(size)
        at += size
