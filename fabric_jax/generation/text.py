"""Answers as text while they grow: characters whose bytes are all there, stop strings cut."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fabric_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no character, or not yet one."""
MOST_PENDING = 16
"""Tokens that may wait for the rest of a character; longer runs are no text."""


@dataclass(kw_only=True)
class TextStream:
    """Turns the tokens of an answer into text, as they come.

    What was returned once never changes. A character is returned when its last byte has come, and
    what may be the beginning of a stop string when it has turned out not to be one.

    Attributes:
        tokenizer: of the model.
        prompt: token ids before the answer: vocabularies that mark spaces drop the first of a text.
        stop_strings: texts that end the answer and are no part of it.
        text: all that was returned.
        stopped: whether a stop string has come.
        taken: tokens added so far, up to that which completed a stop string.
    """

    tokenizer: Tokenizer
    prompt: Sequence[int]
    stop_strings: tuple[str, ...] = ()
    text: str = ""
    stopped: bool = False
    taken: int = 0
    _before: list[int] = field(init=False)
    _waiting: list[int] = field(default_factory=list[int])
    _given: int = 0
    _held: str = ""

    def __post_init__(self) -> None:
        """The answer starts behind the prompt."""
        self._before = list(self.prompt)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add; none after a stop string."""
        parts: list[str] = []
        for token in tokens:
            if self.stopped:
                break
            self.taken += 1
            self._waiting.append(token)
            parts.append(self._take(self._decoded(last=False)))
        return "".join(parts)

    def finish(self) -> str:
        """What was still held back; the answer has ended."""
        rest = "" if self.stopped else self._take(self._decoded(last=True))
        if not self.stopped:
            rest += self._held
            self.text += self._held
        self._held = ""
        return rest

    def _decoded(self, *, last: bool) -> str:
        """Text of the waiting tokens that was not decoded before."""
        if not self._waiting:
            return ""
        before = self.tokenizer.decode(self._before, skip_special=True)
        whole = self.tokenizer.decode([*self._before, *self._waiting], skip_special=True)
        if not whole.startswith(before):
            before, whole = "", self.tokenizer.decode(self._waiting, skip_special=True)
        new = whole[len(before) :]
        clean = not new.endswith(REPLACEMENT) or len(self._waiting) >= MOST_PENDING
        if not clean and not last:
            new = new.rstrip(REPLACEMENT)
        fresh, self._given = new[self._given :], max(self._given, len(new))
        if clean or last:
            # A few tokens are context enough from here on.
            self._before, self._waiting, self._given = self._context(new), [], 0
        return fresh

    def _context(self, new: str) -> list[int]:
        """What the next tokens are decoded behind: the last ones, if they are text."""
        return self._waiting if new.strip() else [*self._before, *self._waiting]

    def _take(self, fresh: str) -> str:
        """What of the held and the fresh text is certain."""
        held = self._held + fresh
        found = [at for stop in self.stop_strings if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = held[: min(found)], ""
        else:
            keep = max((_overlap(held, stop) for stop in self.stop_strings), default=0)
            certain, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
