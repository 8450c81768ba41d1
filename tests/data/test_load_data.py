"""From a configuration to batches, on files like those of users and on the real ones."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_jax.data import Data, DataConfig, Tokenizer, load_data, load_evaluation, load_tokenizer
from fabric_jax.data.batch import Batch
from fabric_jax.data.split import split_rows
from fabric_jax.errors import FabricError

BYTES = load_tokenizer("")


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(
    source: str, *, tokenizer: Tokenizer = BYTES, accumulation: int = 1, **config: Any
) -> Data:
    return load_data(DataConfig(data=source, **config), tokenizer, accumulation=accumulation)


def trained_text(data: Data, tokenizer: Tokenizer = BYTES) -> list[str]:
    """The targets with a loss of each document, decoded."""
    texts = []
    for batch in data.train.epoch():
        fields = [
            np.asarray(x).reshape(-1, np.shape(x)[-1])
            for x in (batch.targets, batch.loss_mask, batch.segment_ids)
        ]
        for targets, mask, segments in zip(*fields, strict=True):
            for segment in range(1, segments.max() + 1):
                here = (segments == segment) & (mask > 0)
                texts.append(tokenizer.decode(targets[here].tolist()))
    return sorted(texts)


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "no"},
]
BIO = {"text": "Q: Is it?\nA: Yes. Rationale: so.", "label": "Yes", "question": "Is it?"}


@pytest.mark.parametrize(
    ("record", "train_on", "expected"),
    [
        ({"text": "abc"}, "auto", "abc<|eos|>"),
        ({"prompt": "P:", "completion": " c"}, "auto", " c<|eos|>"),
        ({"prompt": "P:", "completion": " c"}, "all", "P: c<|eos|>"),
        ({"question": "q", "answer": "a"}, "auto", " a<|eos|>"),
        (BIO, "auto", BIO["text"] + "<|eos|>"),
        (BIO, "completion", " Yes. Rationale: so.<|eos|>"),
        ({"messages": TALK}, "auto", " yo<|eos|> no<|eos|>"),
        ({"messages": TALK}, "assistant", " yo<|eos|> no<|eos|>"),
        ({"messages": TALK}, "completion", " no<|eos|>"),
        (
            {"messages": TALK[:2]},
            "all",
            "User: hi\nAssistant: yo<|eos|>",
        ),
    ],
)
def test_what_is_trained_on(tmp_path: Path, record: Any, train_on: Any, expected: str) -> None:
    data = load(write(tmp_path / "a.jsonl", record), train_on=train_on)
    assert trained_text(data) == [expected]
    assert data.summary.trainable_tokens == len(BYTES.encode(expected))


@pytest.mark.parametrize(
    ("records", "config", "message"),
    [
        ([{"text": "a"}], {"train_on": "assistant"}, r"line 1: a text row has no assistant turns"),
        ([{"text": "a"}], {"train_on": "completion"}, r"line 1: this text has no completion"),
        (
            [{"messages": TALK[:1]}] * 3,
            {},
            r"no trainable token in .*a\.jsonl.*3 rows, of which 3 nothing.*or train on all",
        ),
        (
            [{"text": "too long"}],
            {"long_rows": "drop", "max_length": 4},
            r"1 longer than 4 positions\. Raise max_length, or split long rows",
        ),
        (
            [{"prompt": "a long prompt", "completion": "c"}],
            {"max_length": 5},
            r"1 nothing to train on within 5 positions.*Raise max_length",
        ),
        ([{"text": ""}], {}, r"1 empty"),
        ([{"text": "a"}], {"eval_fraction": 0.5}, r"cannot set aside 0\.5 of 1 rows"),
        (
            [{"messages": [TALK[0], TALK[2]]}],
            {"chat": "{{ raise_exception('roles must alternate') }}"},
            r"line 1: the chat template fails on these messages: roles must alternate",
        ),
    ],
)
def test_data_that_is_refused(tmp_path: Path, records: Any, config: Any, message: str) -> None:
    source = write(tmp_path / "a.jsonl", *records)
    tokenizer = BYTES
    if template := config.pop("chat", ""):
        (tmp_path / "t.jinja").write_text(template)
        tokenizer = load_tokenizer("", chat_template=tmp_path / "t.jinja")
    with pytest.raises(FabricError, match=message):
        load(source, tokenizer=tokenizer, **config)


def test_summary_says_what_happened(tmp_path: Path) -> None:
    long = {"text": "x" * 100}
    source = write(
        tmp_path / "a.jsonl", {"text": "abc"}, long, {"messages": TALK[:1]}, {"text": ""}
    )
    summary = load(source, max_length=16).summary
    assert summary.kinds == {"text": 3, "messages": 1}
    assert (summary.rows_read, summary.rows_kept, summary.rows_truncated) == (4, 2, 1)
    assert summary.rows_dropped == {"nothing to train on": 1, "empty": 1}
    assert summary.text_tokens == 3 + 100 + len(BYTES.encode("<|bos|>User: hi\n"))
    assert (summary.longest_row, summary.documents, summary.packed_rows) == (102, 2, 2)
    assert (summary.tokens, summary.trainable_tokens) == (5 + 17, 4 + 16)
    assert summary.padding_share == pytest.approx(1 - 20 / 32)
    text = str(summary)
    assert "4 read (3 text, 1 messages), 2 kept" in text
    assert "default" in text
    assert "split" not in text
    split = load(source, max_length=16, long_rows="split").summary
    assert (split.rows_split, split.documents, split.trainable_tokens) == (1, 8, 4 + 101)


@given(
    st.lists(st.tuples(st.integers(0, 25), st.sampled_from(["a", "b", "c", None])), min_size=1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_split_is_stratified_and_apart(rows: list[Any], fraction: float, seed: int) -> None:
    keys = np.array([key * 4 + "abc-".find(label or "-") for key, label in rows], np.uint64)
    labels = [label for _, label in rows]
    groups = {
        label: {k for k, (_, other) in zip(keys.tolist(), rows, strict=True) if other == label}
        for label in labels
    }
    if all(len(group) < 2 for group in groups.values()):
        with pytest.raises(FabricError, match="cannot set aside"):
            split_rows(keys, labels, fraction, seed)
        return
    train, aside = split_rows(keys, labels, fraction, seed)
    assert sorted([*train.tolist(), *aside.tolist()]) == list(range(len(rows)))
    assert not set(keys[train].tolist()) & set(keys[aside].tolist())
    for label, group in groups.items():
        here = [i for i in aside.tolist() if labels[i] == label]
        if len(group) > 1:
            assert 0 < len(here) < labels.count(label)
    again = split_rows(keys, labels, fraction, seed)
    np.testing.assert_array_equal(aside, again[1])


def test_split_share(shared_data: Path) -> None:
    data = load(str(shared_data / "biomedqa" / "train.jsonl"), eval_fraction=0.1)
    assert Counter(row.label for row in data.labelled) == {"No": 9, "Uncertain": 9, "Yes": 9}
    assert data.evaluation_summary is not None
    assert (data.summary.rows_read, data.evaluation_summary.rows_read) == (237, 27)
    assert data.evaluation_summary.shared_with_training == 0


# The real files


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "vocab" / "llama-spm.gguf")


def biomedical(shared_data: Path, llama: Tokenizer, **config: Any) -> Data:
    folder = shared_data / "biomedqa"
    return load(
        str(folder / "train.jsonl"),
        tokenizer=llama,
        eval_data=str(folder / "validation.jsonl"),
        **{"max_length": 128, "batch_size": 4, **config},
    )


def test_biomedical_rows(shared_data: Path, llama: Tokenizer) -> None:
    data = biomedical(shared_data, llama, accumulation=2)
    summary, evaluation = data.summary, data.evaluation_summary
    assert evaluation is not None
    assert data.evaluation is not None
    assert (summary.rows_read, summary.text_tokens) == (264, 18_166)
    assert summary.trainable_tokens == 18_166 + 264  # with an end-of-text token a row
    assert summary.kinds == {"labelled text": 264}
    assert not summary.rows_dropped
    assert Counter(row.label for row in data.labelled) == {"No": 11, "Uncertain": 11, "Yes": 11}
    batches = list(data.train.epoch())
    assert all(b.tokens.shape == (2, 4, 128) for b in batches)
    assert sum(float(np.sum(b.loss_mask)) for b in batches) == summary.trainable_tokens
    assert next(data.evaluation.epoch()).tokens.shape == (4, 128)
    assert evaluation.rows_read == 33


def test_prompts_are_prefixes_of_what_is_trained_on(shared_data: Path, llama: Tokenizer) -> None:
    data = biomedical(shared_data, llama, train_on="completion", packing=False)
    assert data.evaluation is not None
    rows = [
        (tokens, mask)
        for batch in data.evaluation.epoch()
        for tokens, mask in zip(np.asarray(batch.tokens), np.asarray(batch.loss_mask), strict=True)
    ]
    for (tokens, mask), row in zip(rows, data.labelled, strict=False):
        assert row.prompt.endswith("\nA:")
        assert tuple(tokens[: len(row.prompt_ids)].tolist()) == row.prompt_ids
        assert int(mask.argmax()) == len(row.prompt_ids) - 1  # the first target is the answer's
        answer = llama.encode(row.prompt + row.separator + row.label, add_special=True)
        assert tuple(answer[: len(row.prompt_ids)]) == row.prompt_ids
        assert tokens[len(row.prompt_ids)] == answer[len(row.prompt_ids)]


def test_fingerprint_tells_data_and_settings_apart(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "two"}]
    source = write(tmp_path / "a.jsonl", *records)
    first = load(source)
    moved = load(write(tmp_path / "moved.jsonl", *records))
    assert moved.fingerprint == first.fingerprint
    others = [
        load(write(tmp_path / "b.jsonl", *records[::-1])),
        load(source, data_seed=1),
        load(source, max_length=8),
        load(source, accumulation=2),
        load(source, packing=False),
    ]
    assert first.fingerprint not in {other.fingerprint for other in others}
    with pytest.raises(FabricError, match="changed since the checkpoint"):
        others[0].train.set_state(first.train.get_state())


def test_rows_shared_with_training_are_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    other = write(tmp_path / "b.jsonl", {"text": "two"}, {"text": "three"})
    summary = load(train, eval_data=other).evaluation_summary
    assert summary is not None
    assert summary.shared_with_training == 1
    assert "also in training  1" in str(summary)


def test_evaluation_alone_reads_what_a_run_evaluates(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BIO, {"text": "x"})
    alone = load_evaluation(DataConfig(data=source, batch_size=2), BYTES)
    run = load(source, eval_data=source, batch_size=2)
    assert run.evaluation is not None
    assert alone.labelled == run.labelled
    for ours, theirs in zip(alone.batches.epoch(), run.evaluation.epoch(), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)


def test_labelled_conversations_are_asked_for_their_last_turn(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": TALK, "label": "no"}, {"text": "x"})
    rows = load(source, eval_data=source, train_on="all").labelled
    assert [row.prompt for row in rows] == [
        "<|bos|>User: hi\nAssistant: yo<|eos|>User: so?\nAssistant:"
    ]
    assert (rows[0].separator, rows[0].label) == (" ", "no")
    assert rows[0].prompt_ids == tuple(BYTES.encode(rows[0].prompt))


RESUME = """
import json, sys
import numpy as np
from fabric_jax.data import DataConfig, load_data, load_tokenizer
data = load_data(DataConfig(data=sys.argv[1], max_length=64, batch_size=2), load_tokenizer(""))
data.train.set_state(json.loads(sys.argv[2]))
tokens = [np.asarray(next(data.train).tokens) for _ in range(5)]
print(json.dumps(np.stack(tokens).tolist()))
"""


def test_another_process_goes_on_where_this_one_stopped(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *({"text": f"row {i} " * (i % 5 + 1)} for i in range(40)))
    stream = load(source, max_length=64, batch_size=2).train
    for _ in range(stream.batches_in_epoch(0) - 2):
        next(stream)
    state = json.dumps(stream.get_state())
    here: list[Batch] = [next(stream) for _ in range(5)]
    command = [sys.executable, "-c", RESUME, source, state]
    there = subprocess.run(command, capture_output=True, check=True, text=True)
    np.testing.assert_array_equal(json.loads(there.stdout), [b.tokens for b in here])


def test_missing_data_is_named() -> None:
    with pytest.raises(FabricError, match="no data given"):
        load("")
