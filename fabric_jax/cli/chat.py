"""A conversation on a terminal."""

import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fabric_jax.cli.generate import GenerateConfig, print_stats
from fabric_jax.errors import FabricError

if TYPE_CHECKING:
    from fabric_jax.generation.session import Cached
    from fabric_jax.model import Model, Stream

PROMPT = "> "
HELP = """/reset          forget the conversation
/adapter NAME   answer with another of the adapters; none for the base alone
/exit           leave, as Ctrl-D does, and Ctrl-C twice
Ctrl-C stops an answer."""


@contextmanager
def interrupted() -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed since; a second one interrupts as ever.

    The first only sets a mark: what runs on the device comes to the end of its piece.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def chat(model: "Model", config: GenerateConfig) -> int:
    """Reads messages and streams answers until the user leaves."""
    with suppress(ImportError):
        # Lines can be edited and recalled where there is readline.
        import_module("readline")
    conversation = Conversation(model, config)
    conversation.warm_up()
    print(f"{model.config.name}. /help lists commands; Ctrl-D leaves.", file=sys.stderr)
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if line.strip() == "/exit":
                break
            conversation.command(line.strip())
            continue
        try:
            with interrupted() as stopped:
                conversation.answer(line, stopped)
        except FabricError as error:
            print(f"fabric-jax: error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            # The second one, in the middle of a computation: nothing of it is of use.
            conversation.abandon()
            print("\n[interrupted]", file=sys.stderr)
    return 0


def _read_line() -> str | None:
    """A line; None where the user leaves, with Ctrl-D or with Ctrl-C twice."""
    for again in (False, True):
        try:
            return input(PROMPT)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("" if again else "\n[Ctrl-C once more leaves]", file=sys.stderr)
    return None


class Conversation:
    """The turns so far and what the model's cache holds of them."""

    def __init__(self, model: "Model", config: GenerateConfig) -> None:
        """Begins with the system message, if there is one."""
        self._model = model
        self._config = config
        self._context = min(config.context, model.config.max_length)
        if config.max_new_tokens >= self._context:
            raise FabricError(
                f"answers of {config.max_new_tokens} tokens leave no room in a conversation",
                expected=f"a context of more than that, at most {model.config.max_length}",
                found=str(self._context),
                fix="Lower --max-new-tokens or raise --context",
            )
        self._adapter = model.adapter_names[0] if model.adapter_names else None
        self._cached: Cached | None = None
        self._turns = self._opening()

    def _opening(self) -> list[dict[str, str]]:
        system = self._config.system
        return [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> None:
        """Does what a line that begins with / says."""
        word, _, rest = line.partition(" ")
        names = self._model.adapter_names
        if word == "/reset":
            self._turns = self._opening()
        elif word == "/adapter" and rest in (*names, "none") and names:
            self._adapter, self._cached = None if rest == "none" else rest, None
        elif word == "/adapter":
            print(f"adapters: {', '.join((*names, 'none')) if names else 'none'}", file=sys.stderr)
        else:
            print(HELP, file=sys.stderr)

    def warm_up(self) -> None:
        """Compiles before the first message, so that its answer comes at once."""
        from rich.console import Console

        with Console(stderr=True).status("compiling"):
            options = {**self._config.options, "max_new_tokens": 2}
            stream = self._model.stream("a", adapter=self._adapter, **self._sized(options))
            for _ in stream:
                pass
            self._cached = stream.cached

    def abandon(self) -> None:
        """Forgets the last message, whose answer came to nothing."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()
        self._cached = None

    def answer(self, text: str, stopped: Callable[[], bool]) -> None:
        """Streams the answer to a message, until ``stopped``, and keeps both."""
        self._turns, stream = self._begun([*self._turns, {"role": "user", "content": text}])
        stream.cached, self._cached = self._cached, None
        for piece in stream:
            print(piece, end="", flush=True)
            if stopped():
                break
        print(" [interrupted]" if stopped() else "", flush=True)
        assert stream.stats is not None
        assert stream.completion is not None
        print_stats(stream.stats)
        self._cached = stream.cached
        self._turns.append({"role": "assistant", "content": stream.completion.text.strip()})

    def _begun(self, turns: list[dict[str, str]]) -> "tuple[list[dict[str, str]], Stream]":
        """As many of the newest turns as fit, and the stream of the answer to them.

        Raises:
            FabricError: the last message does not even fit alone; nothing is forgotten then.
        """
        first, forgotten = len(self._opening()), 0
        while True:
            try:
                stream = self._model.stream(
                    turns,
                    adapter=self._adapter,
                    stop_strings=self._config.stop,
                    **self._sized({**self._config.options}),
                )
                stream.check()
                break
            except FabricError:
                if len(turns) - first < 3:
                    raise
                # The oldest message and its answer.
                turns = [*turns[:first], *turns[first + 2 :]]
                forgotten += 1
        if forgotten:
            what = "turn was" if forgotten == 1 else f"{forgotten} turns were"
            print(f"[the conversation is full: its oldest {what} forgotten]", file=sys.stderr)
        return turns, stream

    def _sized(self, options: Any) -> Any:
        return {**options, "cache_length": self._context}
