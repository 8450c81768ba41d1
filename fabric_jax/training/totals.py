"""What a run has counted so far; saved with every checkpoint so that a resumed run goes on."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Counts:
    """Sums over steps.

    Attributes:
        steps: how many.
        loss: summed over trainable tokens, nats.
        trainable_tokens: targets with weight in the loss.
        real_tokens: positions that are not padding.
        positions: all positions.
        seconds: of training, without compilation, evaluation and saving.
    """

    steps: int = 0
    loss: float = 0.0
    trainable_tokens: int = 0
    real_tokens: int = 0
    positions: int = 0
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Nats a trainable token."""
        return self.loss / max(self.trainable_tokens, 1)

    def rate(self, tokens: int) -> float:
        """``tokens`` a second."""
        return tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(kw_only=True)
class Totals:
    """The counters of a run.

    Attributes:
        run: over all steps.
        window: over the steps since the last line of metrics.
        elapsed: wall seconds, everything included but loading and compilation.
        loss_first: of the first step.
        loss_last: of the newest step.
        grad_norm_last: of the newest step.
        eval_loss_first: before the first step.
        eval_loss_last: newest.
        eval_loss_best: lowest after a step.
        eval_bits_per_byte_last: newest; None where bytes aren't known.
        best_step: where that was.
        evaluated_step: the newest step after which there was an evaluation; -1 for none.
        logged_step: the newest step with a line of metrics.
        seconds_per_step: median of the newest session.
    """

    run: Counts = field(default_factory=Counts)
    window: Counts = field(default_factory=Counts)
    elapsed: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    grad_norm_last: float | None = None
    eval_loss_first: float | None = None
    eval_loss_last: float | None = None
    eval_loss_best: float | None = None
    eval_bits_per_byte_last: float | None = None
    best_step: int | None = None
    evaluated_step: int = -1
    logged_step: int = 0
    seconds_per_step: float | None = None

    def add_step(
        self,
        *,
        loss: float,
        grad_norm: float,
        trainable_tokens: int,
        real_tokens: int,
        positions: int,
        seconds: float,
    ) -> None:
        """Counts one step."""
        if self.loss_first is None:
            self.loss_first = loss
        self.loss_last, self.grad_norm_last = loss, grad_norm
        for counts in (self.run, self.window):
            counts.steps += 1
            counts.loss += loss * trainable_tokens
            counts.trainable_tokens += trainable_tokens
            counts.real_tokens += real_tokens
            counts.positions += positions
            counts.seconds += seconds

    def add_evaluation(self, step: int, loss: float) -> bool:
        """Counts an evaluation; whether it is the best one so far after a step."""
        if self.eval_loss_first is None:
            self.eval_loss_first = loss
        self.eval_loss_last, self.evaluated_step = loss, step
        if step == 0 or (self.eval_loss_best is not None and loss >= self.eval_loss_best):
            return False
        self.eval_loss_best, self.best_step = loss, step
        return True

    def close_window(self, step: int) -> None:
        """Starts the counts of the next line of metrics."""
        self.window, self.logged_step = Counts(), step

    def to_json(self) -> dict[str, Any]:
        """The counters as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Totals":
        """The inverse of :meth:`to_json`."""
        rest = {name: value for name, value in values.items() if name not in ("run", "window")}
        return cls(run=Counts(**values["run"]), window=Counts(**values["window"]), **rest)
