"""Orbax without its chatter."""

import logging
from functools import cache
from types import ModuleType


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
    return ocp
