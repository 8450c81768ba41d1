"""Settings of an experiment with a command of its own, as flags."""

import argparse
from dataclasses import asdict, is_dataclass
from typing import Any


def add_settings(parser: argparse.ArgumentParser, defaults: Any) -> None:
    """A flag for each field of a dataclass; truth values as ``--name`` and ``--no-name``."""
    assert is_dataclass(defaults)
    assert not isinstance(defaults, type)
    for name, value in asdict(defaults).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value)
