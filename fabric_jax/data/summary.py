"""What became of the rows: shown before the first step."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Counts over one part of the data.

    Attributes:
        source: where the rows came from.
        rows_read: rows of the source in this part.
        rows_kept: those that are trained on, in whole or in part.
        rows_truncated: kept ones that lost their end.
        rows_split: kept ones that became several documents.
        rows_dropped: reasons and numbers of the others.
        kinds: kinds of rows and their numbers.
        documents: documents that batches are made of.
        packed_rows: rows of batches in the first epoch.
        text_tokens: tokens of all rows read, without special tokens that were added.
        tokens: tokens of the documents.
        trainable_tokens: targets with a loss, in one epoch.
        padding_share: share of padding in the packed rows of the first epoch.
        longest_row: tokens of the longest row read, special tokens included.
        shared_with_training: rows that are also among the training rows.
        chat_template: where the template came from, None where no row is a conversation.
        tokenizer: where the vocabulary came from.
    """

    source: str
    rows_read: int
    rows_kept: int
    rows_truncated: int
    rows_split: int
    rows_dropped: dict[str, int] = field(default_factory=dict[str, int])
    kinds: dict[str, int] = field(default_factory=dict[str, int])
    documents: int
    packed_rows: int
    text_tokens: int
    tokens: int
    trainable_tokens: int
    padding_share: float
    longest_row: int
    shared_with_training: int = 0
    chat_template: str | None = None
    tokenizer: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for a table; what did not happen is left out."""
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.kinds.items())
        lines = [
            ("rows", f"{self.rows_read:,} read ({kinds}), {self.rows_kept:,} kept"),
            ("truncated", f"{self.rows_truncated:,}"),
            ("split", f"{self.rows_split:,}"),
            *((f"dropped: {reason}", f"{n:,}") for reason, n in self.rows_dropped.items()),
            ("documents", f"{self.documents:,} in {self.packed_rows:,} packed rows"),
            ("text tokens", f"{self.text_tokens:,}"),
            ("trainable tokens", f"{self.trainable_tokens:,} of {self.tokens:,}"),
            ("padding", f"{self.padding_share:.1%}"),
            ("longest row", f"{self.longest_row:,} tokens"),
            ("also in training", f"{self.shared_with_training:,}"),
            ("tokenizer", self.tokenizer),
            ("chat template", self.chat_template or ""),
        ]
        return [line for line in lines if line[1] not in ("", "0")]

    def __str__(self) -> str:
        """A plain table."""
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join([self.source, *(f"  {name:<{width}}  {value}" for name, value in lines)])
