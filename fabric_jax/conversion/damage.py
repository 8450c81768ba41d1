"""What a change of weights does to a model, measured on a text."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from numpy.typing import NDArray

from fabric_jax.data.tokenizer import Tokenizer
from fabric_jax.errors import FabricError
from fabric_jax.evaluation.divergence import BLOCK, Run, log_softmax, make_logits
from fabric_jax.models.decoder import DecoderDefinition
from fabric_jax.models.initialize import Tree


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A model before and after a change.

    Divergences are KL(before || after) of the next-token distributions, in nats, from float32
    logits in float64.

    Attributes:
        positions: next tokens predicted.
        kl_mean: over positions, as the next four.
        kl_median: half are below.
        kl_p99: 99 of 100 are below.
        kl_max: the largest.
        top1_agreement: share of positions with the same most likely token.
        perplexity_base: of the base without the adapter, on the text.
        perplexity_before: of the model before.
        perplexity_after: of the model after.
    """

    positions: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_base: float
    perplexity_before: float
    perplexity_after: float

    def to_dict(self) -> dict[str, Any]:
        """Field names and values."""
        return asdict(self)


def measure_damage(
    before: Run,
    after: Run,
    rows: Sequence[NDArray[np.int32]],
    report: Callable[[str], None] = lambda _: None,
) -> Damage:
    """Compares two models on rows of tokens.

    Args:
        before: the adapted model; with an adapter of zeros it is the base.
        after: the changed one.
        rows: tokens [T] of each row, the first of which is only read.
        report: called with a line of progress.
    """
    run_before, run_after = _make_hidden(before.definition), _make_hidden(after.definition)
    zeros = jax.tree.map(jnp.zeros_like, before.adapter)
    head_before, head_after = make_logits(before), make_logits(after)
    kl: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    losses: list[NDArray[np.float64]] = []
    # Filled up at the end, which no token before sees: one shape, one program.
    width = max(len(row) - 1 for row in rows)
    width += -width % BLOCK
    for number, row in enumerate(rows, 1):
        report(f"measuring: row {number} of {len(rows)}")
        tokens = jnp.asarray(np.pad(row[None, :-1], ((0, 0), (0, width + 1 - len(row)))))
        hidden = (
            run_before(before.base, zeros, tokens),
            run_before(before.base, before.adapter, tokens),
            run_after(after.base, after.adapter, tokens),
        )
        for start in range(0, len(row) - 1, BLOCK):
            part = slice(start, start + BLOCK)
            targets = row[1:][part]
            plain, p, q = (
                log_softmax(head(h[0, part])[: len(targets)])
                for head, h in zip((head_before, head_before, head_after), hidden, strict=True)
            )
            kl.append(np.sum(np.exp(p) * (p - q), axis=-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            where = np.arange(len(targets))
            losses.append(-np.stack([x[where, targets] for x in (plain, p, q)]))
    return _summary(np.concatenate(kl), np.concatenate(same), np.concatenate(losses, axis=1))


def text_rows(
    path: str | Path, tokenizer: Tokenizer, length: int, vocab_size: int
) -> list[NDArray[np.int32]]:
    """A text as rows of at most ``length`` + 1 tokens, of which ``length`` are predicted.

    Each row starts with the last token of the one before, the first with the tokenizer's
    begin-of-text token where it has one.

    Raises:
        FabricError: the file can't be read, or has too little text.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FabricError(f"cannot read {path}: {error}") from error
    ids = np.asarray(tokenizer.encode(text, add_special=True), np.int32)
    if len(ids) < 2:
        raise FabricError(f"{path} has too little text to measure on")
    if ids.max() >= vocab_size:
        raise FabricError(
            f"the tokenizer {tokenizer.source} has more tokens than the model",
            expected=f"at most {vocab_size}",
            found=str(tokenizer.vocab_size),
        )
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


def _make_hidden(
    definition: DecoderDefinition,
) -> Callable[[Tree, Tree, jax.Array], jax.Array]:
    """``(base, adapter, tokens [1, T]) -> final hidden states [1, T, D]``, compiled."""

    @jax.jit
    def hidden(base: Tree, adapter: Tree, tokens: Int32[Array, "1 T"]) -> jax.Array:
        decoder = definition.bind(base, adapter)
        row = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return decoder(tokens, row, jnp.ones_like(tokens))

    return hidden


def _summary(
    kl: NDArray[np.float64], same: NDArray[np.bool_], losses: NDArray[np.float64]
) -> Damage:
    """From values per position; ``losses`` [3, positions] of base, before and after."""
    with np.errstate(over="ignore"):
        base, before, after = np.exp(losses.mean(axis=1))
    return Damage(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        perplexity_base=float(base),
        perplexity_before=float(before),
        perplexity_after=float(after),
    )
