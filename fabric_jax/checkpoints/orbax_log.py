"""Orbax without its chatter."""

import logging
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class _DropOrbax(logging.Filter):
    """Drops what orbax logs through absl: its errors also arrive as exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for records made in orbax's files."""
        return "/orbax/checkpoint/" not in record.pathname.replace("\\", "/")


@cache
def import_orbax() -> ModuleType:
    """``orbax.checkpoint``, imported on first use since that takes a second or two."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_DropOrbax())
    _drop_late_callbacks()
    return ocp


def _drop_late_callbacks() -> None:
    """Keeps quiet what Python prints where a callback of tensorstore has nobody to tell.

    When one array of a checkpoint fails, orbax raises and closes its event loop; tensorstore then
    reports of the other arrays to a loop that is closed, from threads of its own.
    """
    others = sys.unraisablehook

    def hook(args: "UnraisableHookArgs") -> None:
        late = isinstance(args.exc_value, RuntimeError) and args.object is None
        if not (late and str(args.exc_value) == "Event loop is closed"):
            others(args)

    sys.unraisablehook = hook
