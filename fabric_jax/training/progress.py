"""What the user sees during a run: a bar on a terminal, plain lines elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fabric_jax.training.metrics import StepRecord, perplexity


class RunProgress:
    """Progress of one run.

    Args:
        console: where to.
        total_steps: optimizer steps of the whole run.
        done: those of earlier sessions.
    """

    def __init__(self, console: Console, *, total_steps: int, done: int) -> None:
        """Shows nothing yet."""
        self._console = console
        self._total = total_steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=done)

    def __enter__(self) -> "RunProgress":
        """Starts the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to ``step``."""
        self._bar.update(self._task, completed=step)

    def show(self, record: StepRecord, seconds_per_step: float) -> None:
        """Shows a record: on the bar, or as a line."""
        text = describe(record)
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            left = (self._total - record.step) * seconds_per_step
            self.note(f"step {record.step}/{self._total}  {text}  left {duration(left)}")
        elif record.eval_loss is not None:
            self.note(f"step {record.step}: {_evaluation(record.eval_loss)}")

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(record: StepRecord) -> str:
    """The numbers of a record in one line."""
    rates = "/".join(
        f"{rate:,.0f}"
        for rate in (
            record.trainable_tokens_per_second,
            record.real_tokens_per_second,
            record.positions_per_second,
        )
    )
    parts = [
        f"loss {record.loss:.4f}",
        f"{rates} trained/real/padded tokens/s",
        f"lr {record.learning_rate:.2e}",
        f"peak {bytes_text(record.peak_bytes)}",
    ]
    if record.eval_loss is not None:
        parts.append(_evaluation(record.eval_loss))
    if record.eval_bits_per_byte is not None:
        parts.append(f"{record.eval_bits_per_byte:.4f} bits per byte")
    return "  ".join(parts)


def bytes_text(number: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _evaluation(loss: float) -> str:
    return f"eval loss {loss:.4f} (perplexity {perplexity(loss):.4g})"
