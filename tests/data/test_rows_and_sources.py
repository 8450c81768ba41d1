"""Rows by their keys, files by their suffix, and what is said about malformed ones."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from fabric_jax.data.config import DataConfig
from fabric_jax.data.load import read_rows
from fabric_jax.data.rows import parse_columns, parse_row
from fabric_jax.data.sources import parse_hub_id, read_records, records_of
from fabric_jax.errors import FabricError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("record", "kind", "text", "answer"),
    [
        ({"text": "abc", "id": 3}, "text", "abc", None),
        ({"prompt": "P:", "completion": " c"}, "prompt/completion", "P: c", " c"),
        ({"question": "q?", "answer": "a"}, "question/answer", "Q: q?\nA: a", " a"),
        (
            {"text": "Q: q?\nA: Yes. So.", "label": "Yes", "question": "q?", "source": "s"},
            "labelled text",
            "Q: q?\nA: Yes. So.",
            " Yes. So.",
        ),
        ({"messages": TURNS, "prompt": "hi", "text": None}, "messages", "", None),
        ({"text": None}, "text", "", None),
    ],
    ids=["text", "completion", "answer", "biomedical", "messages first", "null text"],
)
def test_kinds(record: dict[str, Any], kind: str, text: str, answer: str | None) -> None:
    row = parse_row(record, "here")
    assert (row.kind, row.text) == (kind, text)
    assert (None if row.answer_start is None else row.text[row.answer_start :]) == answer


def test_messages_are_cleaned() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = parse_row(
        {
            "messages": [
                {"role": "user", "content": parts, "name": None},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
            ],
            "tools": [],
            "label": 1,
        },
        "here",
    )
    assert row.messages[0] == {"role": "user", "content": "ab"}
    assert row.messages[1] == {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert (row.tools, row.label) == (None, "1")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"mesages": TURNS}, "Did you mean 'messages' for 'mesages'"),
        ({"body": "x"}, "no known column; expected messages, prompt and completion"),
        ({}, "found an empty row"),
        ({"prompt": "a", "completions": "b"}, "prompt without completion. Did you mean"),
        ({"question": "a", "answr": "b"}, "question without answer"),
        ({"text": 3}, "text is not text; expected a string; found a number"),
        ({"prompt": TURNS, "completion": TURNS}, "Give conversations as messages"),
        ({"messages": []}, "found an empty list"),
        ({"messages": "hi"}, "expected a list of messages; found a string"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no role; found keys content"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "message 2 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is not text; found a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "isn't text"),
        ({"messages": TURNS, "tools": "f"}, "tools is not a list"),
    ],
)
def test_rows_that_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=re.escape(message)) as caught:
        parse_row(record, "x.jsonl, line 7")
    assert str(caught.value).startswith("x.jsonl, line 7")


def rows_of(source: Path | str, **config: Any) -> list[str]:
    settings = DataConfig(data=str(source), **config)
    return [row.text for row in read_rows(settings.data, settings, split="train")]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    records = [{"text": "a é", "id": "x"}, {"text": "b\n", "id": "2"}]
    lines = write_jsonl(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text(lines.read_text())
    (tmp_path / "d.jsonl").write_text("\ufeff\n" + lines.read_text().replace("\n", "\r\n\n"))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl", "e.parquet"):
        assert rows_of(tmp_path / name) == ["a é", "b\n"], name
    assert len(rows_of(tmp_path)) == 10


def test_columns_that_arrow_refuses_are_no_obstacle(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"id": 1, "text": "a"}, {"id": "x", "text": "b"})
    assert rows_of(path) == ["a", "b"]


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    for name in ("train-00", "train-01", "val", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    assert rows_of(tmp_path) == ["train-00", "train-01"]
    assert rows_of(f"{tmp_path}:validation") == ["val"]
    with pytest.raises(FabricError, match="unknown part"):
        rows_of(f"{tmp_path}:tset")


def test_columns_are_renamed(tmp_path: Path) -> None:
    record = {"subject": "S", "body": "B", "text": "T", "kind": "k"}
    path = write_jsonl(tmp_path / "a.jsonl", record)
    assert rows_of(path, columns=("prompt=subject", "completion=body")) == ["SB"]
    assert rows_of(path, columns=("text=body",)) == ["B"]
    (row,) = read_rows(
        str(path), DataConfig(data="x", columns=("label=kind", "text=body")), split="train"
    )
    assert row.label == "k"
    with pytest.raises(FabricError, match=r"line 1.*Did you mean 'body'"):
        rows_of(path, columns=("text=boddy",))
    with pytest.raises(FabricError, match="Did you mean 'text'"):
        parse_columns(["txt=body"])
    with pytest.raises(FabricError, match="expected known=column"):
        parse_columns(["body"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON: Expecting ',' delimiter"),
        (b'{"text": "a"}\n\xff\n', "line 2 is not JSON: byte 1 is not UTF-8"),
        (b'{"text": "a"}\n\n[1]\n', "line 3 is not a row; expected an object"),
        (b'"text"\n', "line 1 is not a row"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON: nested too deeply"),
        (b"\n \n", "no rows in"),
        (b"", "no rows in"),
    ],
    ids=["cut off", "bytes", "array", "string", "deep", "blank", "empty"],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(FabricError, match=re.escape(message)) as caught:
        rows_of(path)
    assert "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {]', "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2 is not a row"),
        ("a.json", b"[\xff]", "is not UTF-8"),
        ("a.json", b"[" * 100_000, "is not JSON: nested too deeply"),
        ("a.json", b'[{"text": "\\ude00"}]', r"row 1 holds half of a surrogate pair"),
        ("a.jsonl", b'\n{"text": "x\\uD83D."}', "line 2 holds half of a surrogate pair"),
        ("a.jsonl", b'{"id": ' + b"1" * 5000 + b"}", "line 1 is not JSON: Exceeds the limit"),
        ("a.parquet", b"PAR1nothing", "expected a Parquet file"),
        ("a.csv", b"text\na\n", "expected a name ending in .jsonl"),
    ],
)
def test_other_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FabricError, match=re.escape(message)):
        rows_of(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", "no file none.jsonl"),
        ("./folder/none.parquet", "no file ./folder/none.parquet"),
        ("nobody/nothing@v1:train", "cannot load nobody/nothing@v1:train from the hub"),
    ],
)
def test_missing_sources(tmp_path: Path, monkeypatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FabricError, match=re.escape(message)):
        rows_of(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/b", ("a/b", None, None, "train")),
        ("a/b:test[:10%]", ("a/b", None, None, "test[:10%]")),
        ("a/b/en@v1.0:dev", ("a/b", "en", "v1.0", "dev")),
        ("a/b@refs/pr/1", ("a/b", None, "refs/pr/1", "train")),
        ("a/b.jsonl", None),
        ("../a", None),
        ("/abs/olute", None),
    ],
)
def test_hub_ids(source: str, expected: tuple[str | None, ...] | None) -> None:
    assert parse_hub_id(source, split="train") == expected


def test_class_numbers_become_names() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    assert [r.values["label"] for r in records_of(table, "n")] == ["yes", "no", None]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricError, match="no data files in"):
        list(read_records(str(tmp_path), split="train"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_length": 0}, "max_length is too small; expected 1 or more; found 0"),
        ({"batch_size": -1}, "batch_size is too small"),
        ({"eval_fraction": 1.0}, "eval_fraction is out of range"),
        ({"eval_fraction": 0.1, "eval_data": "x"}, "both given"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        DataConfig(data="x", **values)


def test_whole_pairs_of_escapes_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00 \\ud83d"}')
    assert rows_of(tmp_path / "a.jsonl") == ["\U0001f600 \\ud83d"]
