"""The one error that users see: what was expected, what was found, what to do."""

import difflib
from collections.abc import Iterable


class FabricError(Exception):
    """Wrong input or an impossible request; the command line prints it and exits non-zero.

    Args:
        problem: what went wrong, naming the file, key or value ("rank 2048 is too large").
        expected: what would have been right.
        found: what was there instead.
        fix: what the reader can do now.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Joins the parts that are given into one message."""
        parts = [problem.rstrip(".")]
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        message = "; ".join(parts) + "."
        if fix is not None:
            message += f" {fix}" if fix.endswith("?") else f" {fix.rstrip('.')}."
        super().__init__(message)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> FabricError:
    """An error for a name that is not among ``known``, offering the closest one."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    fix = f"Did you mean {close[0]!r}?" if close else None
    return FabricError(f"unknown {kind} {name!r}", expected=f"one of {', '.join(names)}", fix=fix)
