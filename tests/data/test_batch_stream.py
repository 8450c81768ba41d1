"""Documents, packing and batches: nothing lost, nothing mixed, every position found again."""

import json
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.data.batch import Batch
from fabric_jax.data.batch_stream import BatchShape, BatchStream
from fabric_jax.data.documents import Documents, fit_documents, join_documents
from fabric_jax.data.packing import first_fit
from fabric_jax.errors import FabricError

PAD = 999_999


def make_documents(lengths: list[int], *, seed: int = 0, share: float = 0.6) -> Documents:
    """Documents whose tokens are all different, so that each can be recognised anywhere."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([1, *lengths])
    tokens = [np.arange(a, a + n, dtype=np.int32) for a, n in zip(starts, lengths, strict=False)]
    return join_documents(tokens, [rng.random(n) < share for n in lengths])


def make_stream(
    documents: Documents,
    *,
    seed: int | None = 7,
    packing: bool = True,
    rows: tuple[int, int | None] = (2, 3),
    max_length: int = 12,
) -> BatchStream:
    shape = BatchShape(
        max_length=max_length,
        batch_size=rows[0],
        accumulation=rows[1],
        packing=packing,
        pad_id=PAD,
    )
    return BatchStream(documents, shape, seed=seed, fingerprint="f")


def rows_of(batches: list[Batch], max_length: int = 12) -> list[dict[str, np.ndarray]]:
    """Every row of every batch, as arrays [T]."""
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    flat = [{n: np.asarray(getattr(b, n)).reshape(-1, max_length) for n in names} for b in batches]
    return [{n: b[n][i] for n in names} for b in flat for i in range(len(b["tokens"]))]


def documents_in(row: dict[str, np.ndarray]) -> list[tuple[list[int], list[bool]]]:
    """Tokens and mask of the documents that a row was made of, from the batch alone."""
    found = []
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == segment
        tokens, targets = row["tokens"][here], row["targets"][here]
        assert (tokens[1:] == targets[:-1]).all()
        assert (row["positions"][here] == np.arange(here.sum())).all()
        found.append(([*tokens.tolist(), int(targets[-1])], row["loss_mask"][here].tolist()))
    return found


# Packing


@given(st.lists(st.integers(0, 20), max_size=60))
def test_first_fit_equals_the_definition(sizes: list[int]) -> None:
    room: list[int] = []
    expected = []
    for size in sizes:
        bin_ = next((i for i, free in enumerate(room) if free >= size), len(room))
        if bin_ == len(room):
            room.append(20)
        room[bin_] -= size
        expected.append(bin_)
    assert first_fit(sizes, 20).tolist() == expected


def test_first_fit_equals_grains_packer() -> None:
    sizes = np.random.default_rng(0).integers(1, 33, 200)
    items = [{"item": np.full(n, i + 1)} for i, n in enumerate(sizes)]
    packed = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(items).to_iter_dataset(),
        length_struct={"item": 32},
        num_packing_bins=len(sizes),
        shuffle_bins=False,
    )
    theirs = [np.unique(row["item"][row["item"] > 0]).tolist() for row in packed]
    bins = first_fit(sizes, 32)
    ours = [(np.flatnonzero(bins == i) + 1).tolist() for i in range(bins.max() + 1)]
    assert ours == theirs


def test_first_fit_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="item 1 of size 9"):
        first_fit([3, 9], 8)


# Long rows

ROWS = st.lists(st.lists(st.booleans(), min_size=0, max_size=30), min_size=1, max_size=12)


@given(ROWS, st.integers(1, 12), st.sampled_from(["truncate", "split", "drop"]))
def test_fitting_rows(masks: list[list[bool]], max_length: int, policy) -> None:
    lengths = [len(mask) for mask in masks]
    ends = np.cumsum(lengths)
    rows = Documents(
        tokens=np.arange(ends[-1], dtype=np.int32),
        trainable=np.array([t for mask in masks for t in mask], bool),
        offsets=np.concatenate([[0], ends]),
    )
    fitted = fit_documents(rows, max_length, policy)
    documents = fitted.documents
    assert (documents.positions <= max_length).all()
    assert (documents.positions >= 1).all()
    assert (documents.trainable_targets >= 1).all()
    assert fitted.kept + sum(fitted.dropped.values()) == len(masks)
    targets = Counter[int]()
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        chunk = slice(start + 1, end)
        targets.update(documents.tokens[chunk][documents.trainable[chunk]].tolist())
        assert (np.diff(documents.tokens[start:end]) == 1).all()
    expected = Counter[int]()
    for start, mask in zip(rows.offsets, masks, strict=False):
        if policy == "drop" and len(mask) - 1 > max_length:
            continue
        limit = len(mask) if policy == "split" else max_length + 1
        expected.update(int(start) + i for i, t in enumerate(mask[:limit]) if t and i > 0)
    assert targets == expected  # each trainable token but a row's first is a target once


def test_fitting_counts_what_it_did() -> None:
    rows = make_documents([20, 5, 1, 13], share=2.0)
    truncated, split, dropped = (
        fit_documents(rows, 12, policy) for policy in ("truncate", "split", "drop")
    )
    assert (truncated.kept, truncated.truncated, truncated.split) == (3, 1, 0)
    assert (split.kept, split.truncated, split.split, len(split.documents)) == (3, 0, 1, 4)
    assert dropped.dropped == {"longer than 12 positions": 1, "empty": 1}
    late = Documents(
        tokens=np.arange(20, dtype=np.int32),
        trainable=np.arange(20) > 15,
        offsets=np.array([0, 20]),
    )
    assert fit_documents(late, 8, "truncate").dropped == {
        "nothing to train on within 8 positions": 1
    }
    untrained = make_documents([5], share=0)
    assert fit_documents(untrained, 8, "truncate").dropped == {"nothing to train on": 1}


# Batches

LENGTHS = st.lists(st.integers(2, 13), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.booleans(), st.sampled_from([None, 3, 11]), st.sampled_from([None, 1, 2]))
def test_an_epoch_holds_every_document_once(
    lengths: list[int], packing: bool, seed: int | None, accumulation: int | None
) -> None:
    documents = make_documents(lengths)
    stream = make_stream(documents, packing=packing, seed=seed, rows=(2, accumulation))
    batches = list(stream.epoch(1))
    shape = (2, 12) if accumulation is None else (accumulation, 2, 12)
    assert all(b.tokens.shape == shape for b in batches)
    assert len(batches) == stream.batches_in_epoch(1)
    found = []
    for row in rows_of(batches):
        padding = row["segment_ids"] == 0
        assert (row["tokens"][padding] == PAD).all()
        for name in ("targets", "loss_mask", "positions"):
            assert not row[name][padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all()  # padding is at the end
        inside = documents_in(row)
        assert packing or len(inside) <= 1
        found += inside
    expected = [
        (documents.tokens[a:b].tolist(), documents.trainable[a + 1 : b].tolist())
        for a, b in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    ]
    assert sorted(found) == sorted(expected)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    documents = make_documents([2 + i % 11 for i in range(60)])

    def order(seed: int | None, epoch: int) -> bytes:
        batches = make_stream(documents, seed=seed).epoch(epoch)
        return b"".join(np.asarray(b.tokens).tobytes() for b in batches)

    assert order(7, 3) == order(7, 3)
    different = [order(7, 0), order(7, 1), order(8, 0), order(8, 1), order(None, 0)]
    assert len(set(different)) == 5
    assert order(None, 0) == order(None, 4)


def test_order_is_the_documents_without_a_seed() -> None:
    documents = make_documents([4, 5, 6])
    stream = make_stream(documents, seed=None, packing=False, rows=(2, None))
    rows = rows_of(list(stream.epoch()))
    assert [row["tokens"][0] for row in rows] == [1, 5, 10, PAD]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.booleans(), st.sampled_from([None, 5]), st.integers(0, 20), st.integers(1, 6))
def test_resuming_anywhere_gives_the_same_batches(
    lengths: list[int], packing: bool, seed: int | None, before: int, after: int
) -> None:
    documents = make_documents(lengths)
    first = make_stream(documents, packing=packing, seed=seed)
    for _ in range(before):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = make_stream(make_documents(lengths), packing=packing, seed=seed)
    second.set_state(state)
    for _ in range(after):
        ours, theirs = next(first), next(second)
        for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert first.get_state() == second.get_state()


def test_the_stream_is_its_epochs_one_after_another() -> None:
    documents = make_documents([2 + i % 11 for i in range(50)])
    stream = make_stream(documents)
    total = stream.batches_in_epochs(3)
    assert total == sum(len(list(stream.epoch(e))) for e in range(3))
    streamed = [np.asarray(next(stream).tokens) for _ in range(total)]
    by_epoch = [np.asarray(b.tokens) for e in range(3) for b in make_stream(documents).epoch(e)]
    np.testing.assert_array_equal(streamed, by_epoch)
    assert stream.get_state() == {"epoch": 3, "batch": 0, "fingerprint": "f"}
    assert stream.batches_in_epochs(0.5) == -(-stream.batches_in_epoch(0) // 2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 0, "batch": 1, "fingerprint": "g"}, "the data, its settings or the tokenizer"),
        ({"epoch": 0, "batch": 99, "fingerprint": "f"}, "malformed position"),
        ({"epoch": -1, "batch": 0, "fingerprint": "f"}, "malformed position"),
        ({}, "malformed position"),
    ],
)
def test_foreign_positions_are_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        make_stream(make_documents([3, 4])).set_state(state)
