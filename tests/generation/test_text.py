"""Growing text: nothing that was shown changes, and nothing is lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_jax.data.tokenizer import byte_tokenizer
from fabric_jax.generation.text import TextStream

BYTES = byte_tokenizer()
PROMPT = BYTES.encode("Q: é\nA:", add_special=True)


def pieces(tokens, **options) -> list[str]:
    stream = TextStream(tokenizer=BYTES, prompt=PROMPT, **options)
    shown = [stream.add([token]) for token in tokens]
    shown.append(stream.finish())
    assert stream.text == "".join(shown)
    return shown


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=60, deadline=None)
def test_characters_come_when_their_last_byte_does(text):
    shown = pieces(BYTES.encode(text))
    assert "".join(shown) == text
    # Each piece is whole characters: no replacement is ever shown for half a one.
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_bytes_that_are_no_text_are_shown_in_the_end():
    assert "".join(pieces([0xE2, 0x82])) == "\ufffd"
    assert "".join(pieces([65, 0xFF, 66])) == "A\ufffdB"
    assert "".join(pieces([0xFF] * 40)).startswith("\ufffd" * 16)


def test_special_tokens_are_left_out():
    assert "".join(pieces([72, BYTES.pad_id, 105, BYTES.eos_id])) == "Hi"


@given(
    text=st.text("ab\n", max_size=20),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=2),
    size=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_text_ends_before_the_first_stop_string(text, stops, size):
    stream = TextStream(tokenizer=BYTES, prompt=PROMPT, stop_strings=tuple(stops))
    tokens = BYTES.encode(text)
    shown = ""
    for start in range(0, len(tokens), size):
        shown += stream.add(tokens[start : start + size])
        assert text.startswith(shown)
    shown += stream.finish()
    # The one that is complete first; of several the one that began first.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if not ends:
        assert not stream.stopped
        assert shown == text
        assert stream.taken == len(tokens)
        return
    until = text[: ends[0]]
    assert stream.stopped
    assert shown == until[: min(until.find(s) for s in stops if s in until)]
    assert stream.taken == ends[0]
