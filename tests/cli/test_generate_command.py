"""``fabric-jax generate``: one prompt, files of prompts, and a conversation in a terminal."""

import io
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import pytest

from fabric_jax.cli import generate
from fabric_jax.cli.arguments import parse
from fabric_jax.cli.chat import Conversation
from fabric_jax.cli.generate import GenerateConfig
from fabric_jax.cli.prompt_file import PromptRow, read_prompts, write_answers
from fabric_jax.errors import FabricError
from fabric_jax.model import Completion
from tests.cli.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
STATS = re.compile(
    r"\[first token after [\d.]+ s; prefill ([\d,]+) tokens, [\d,.]+ tokens/s; "
    r"decode ([\d,]+) tokens, [\d,.]+ tokens/s"
)
QUICK = ("--max-new-tokens", "6")


def test_one_prompt_goes_to_standard_output_and_its_times_to_error(fabric):
    outcome = fabric("generate", "bitnet-tiny", "Hello", *QUICK)
    assert outcome.code == 0, outcome.err
    found = STATS.search(outcome.err)
    assert found is not None, outcome.err
    assert found.groups() == ("6", "6")
    assert "tokens/s" not in outcome.out


def test_a_file_of_prompts_is_answered_in_order(fabric, tuned: Path, tmp_path: Path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    adapter = str(tuned / "adapter")
    rows = [
        {"prompt": "Q: Is 4 even?\nA:", "id": 7},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "a much longer prompt than the others are", "adapter": None},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--prompts", prompts, "--out", out, "--log-probs", "--batch-size", "2", *QUICK)
    outcome = fabric("generate", "bitnet-tiny", *given)
    assert outcome.code == 0, outcome.err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        assert {name: answer[name] for name in row} == row
        assert len(answer["tokens"]) == len(answer["log_probs"]) <= 6
        assert all(value <= 0 for value in answer["log_probs"])
    assert STATS.search(outcome.err)
    # One adapter can be chosen, or not, as several can.
    prompts.write_text(
        "".join(json.dumps({**rows[0], "adapter": a}) + "\n" for a in (adapter, None))
    )
    assert fabric("generate", "bitnet-tiny", *given, "--adapter", adapter).code == 0
    texts = [json.loads(line)["tokens"] for line in out.read_text().splitlines()]
    assert texts[0] != texts[1] == answers[0]["tokens"]
    # An adapter that was not loaded is refused, and the file stays as it was.
    before = out.read_text()
    prompts.write_text(json.dumps({**rows[0], "adapter": adapter}) + "\n")
    outcome = fabric("generate", "bitnet-tiny", *given)
    assert (outcome.code, "is not given with --adapter" in outcome.err) == (2, True)
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bitnet-tiny", "a", "--prompts", "b", "--out", "c"), "one prompt and a file"),
        (("bitnet-tiny", "--prompts", "b"), "belong together"),
        (("bitnet-tiny", "a", "--log-probs"), "written to a file"),
        (("bitnet-tiny", "--prompts", "b", "--out", "c", "--chat"), "--chat and --system"),
        (("bitnet-tiny", "--prompts", "b", "--out", "c", "--system", "d"), "--chat and --system"),
        (("bitnet-tiny", "half \udcff"), "half of a surrogate pair"),
        (("bitnet-tiny", "a", "--temperature", "-1"), "temperature is out of range"),
        (("bitnet-tiny", "a", "--max-new-tokens", "600"), "512 positions that bitnet-tiny allows"),
        (("bitnet-tiny", "--prompts", "none.txt", "--out", "c"), "cannot read the prompts none"),
    ],
)
def test_wrong_input_is_one_message(refused, words, message):
    assert message in refused("generate", *words)


@pytest.mark.parametrize("prompt", ["-", "-5", "- one\n- two", "-x = 3", "--- a=b", "a=b --c=d"])
def test_a_prompt_may_begin_with_a_dash(prompt):
    config = parse(GenerateConfig, "generate", ["m", prompt, "--seed", "2", "--stop=- a"])
    assert (config.model, config.prompt, config.seed) == ("m", prompt, 2)
    assert config.stop == ("- a",)


@pytest.mark.parametrize("line", ["[1]", "{", '{"text": "a"}', '{"prompt": "a", "adapter": 3}'])
def test_a_malformed_row_is_named(refused, tmp_path: Path, line: str):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n' + line + "\n")
    given = ("--prompts", prompts, "--out", tmp_path / "out.jsonl")
    assert f"{prompts}, line 2" in refused("generate", "bitnet-tiny", *given)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffone\r\n \r\ntwo\u2028and\x0c\n", ["one", "two\u2028and\x0c"]),
        ("a.jsonl", '\ufeff{"prompt": "a\u2028\x85b"}\r\n\r\n', ["a\u2028\x85b"]),
        ("a.ndjson", '{"prompt": "a"}', ["a"]),
        ("a.json", '[\n {"prompt": "a"},\n {"prompt": "b"}\n]', ["a", "b"]),
    ],
)
def test_prompts_are_what_the_file_says(tmp_path: Path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert [row.prompt for row in read_prompts(str(path))] == expected


def test_answers_go_where_a_file_can_be(refused, tmp_path: Path, monkeypatch):
    prompts, folder, link = (tmp_path / name for name in ("prompts.txt", "folder", "link.jsonl"))
    prompts.write_text("a\n")
    folder.mkdir()
    monkeypatch.setattr(generate, "load", None)  # Nothing is computed that can't be written.
    os.mkfifo(tmp_path / "pipe")
    for place in (folder, tmp_path / "pipe"):
        words = ("--prompts", prompts, "--out", place)
        assert "is no file" in refused("generate", "bitnet-tiny", *words)
    # A link stays one: its file is written.
    link.symlink_to(folder / "answers.jsonl")
    row = PromptRow(prompt="a", adapter=None, given={"prompt": "a", "é": "half \ud83d"})
    write_answers(str(link), [row], [Completion(text="b", tokens=(98,), finish="length")])
    assert link.is_symlink()
    written = json.loads((folder / "answers.jsonl").read_text("utf-8"))
    assert written == {**row.given, "text": "b", "tokens": [98], "finish": "length"}


def test_input_that_is_no_text_is_one_message(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "standard input is no text" in refused("generate", "bitnet-tiny")


def test_a_full_conversation_forgets_its_oldest_turns_alone(capsys):
    config = GenerateConfig(model="bitnet-tiny", max_new_tokens=4, context=96)
    with jax.numpy_dtype_promotion("standard"):
        conversation = Conversation(generate.load(config), config)
        for text in ("first", "second", "third"):
            conversation.answer(text, lambda: False)
        capsys.readouterr()
        # What fits in no case costs nothing.
        before = [turn["content"] for turn in conversation._turns]
        with pytest.raises(FabricError, match="positions that the cache holds"):
            conversation.answer("x" * 200, lambda: False)
        assert [turn["content"] for turn in conversation._turns] == before
        assert "forgotten" not in capsys.readouterr().err
        conversation.answer("fourth" + 25 * ".", lambda: False)
    told = capsys.readouterr().err
    assert "2 turns were forgotten" in told
    assert conversation._turns[0]["content"].startswith("third")


def test_ctrl_c_stops_the_answer_of_one_prompt(fabric, monkeypatch):
    class Pressed:
        def __enter__(self):
            return lambda: True

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("fabric_jax.cli.chat.interrupted", Pressed)
    outcome = fabric("generate", "bitnet-tiny", "Hello", "--temperature", "1", "--seed", "3")
    assert outcome.code == generate.INTERRUPTED_CODE
    found = STATS.search(outcome.err)
    assert found is not None
    assert int(found[2]) < 256


@pytest.fixture
def terminal():
    """A conversation with a model that is slow enough to be interrupted."""
    words = [sys.executable, "-m", "fabric_jax.cli.main", "generate", "bitnet-tiny"]
    words += ["--temperature", "1", "--max-new-tokens", "440", "--context", "512", "--seed", "5"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    program = Terminal(words, {**os.environ, "PYTHONPATH": paths, "FABRIC_KERNELS_CPU": "0"})
    yield program
    program.close()


@pytest.mark.slow
def test_a_conversation_in_a_terminal(terminal: Terminal):
    terminal.wait_for("\n> ", 90)
    terminal.type("Hi\n")
    terminal.wait_for("Hi\r\n")
    time.sleep(0.1)
    terminal.type("\x03")
    stopped = terminal.wait_for("\n> ")
    assert "[interrupted]" in stopped, stopped
    found = STATS.search(stopped)
    assert found is not None, stopped
    assert int(found[2]) < 440
    terminal.type("Hi again\n")
    answer = terminal.wait_for("\n> ")
    assert STATS.search(answer), answer
    assert "Traceback" not in answer
    terminal.type("/nonsense\n")
    assert "/reset" in terminal.wait_for("\n> ")
    terminal.wait_until_it_reads()
    terminal.type("half a line\x03")
    assert "once more" in terminal.wait_for("\n> ")
    terminal.wait_until_it_reads()
    terminal.type("\x03")
    assert terminal.leave() == 0
