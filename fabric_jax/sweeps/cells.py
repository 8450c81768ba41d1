"""The cells of an experiment: grids, overrides from the command line, names and JSON.

A cell is a frozen dataclass whose values are text, numbers, truth values, None, or tuples of these.
"""

import dataclasses
import itertools
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from fabric_jax.errors import FabricError, unknown_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Cell = TypeVar("Cell", bound="DataclassInstance")
SCALARS = (str, int, float, bool, type(None))


def grid(base: Cell, **axes: Sequence[Any]) -> list[Cell]:
    """``base`` with each combination of the axes' values, the last axis varying fastest."""
    return [
        dataclasses.replace(base, **dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def select(
    base: Cell, cells: Callable[[Cell], Sequence[Cell]], overrides: Sequence[str]
) -> list[Cell]:
    """The cells that an experiment has under overrides ``key=value[,value...]``.

    An override holds in every cell that is returned: it is set in ``base`` first, and cells that
    the experiment then gives another value are left out. Several values are a further axis.

    Raises:
        FabricError: an unknown key, a value of the wrong type, or no cell is left.
    """
    chosen = parse_overrides(type(base), overrides)
    found: dict[str, Cell] = {}
    for values in itertools.product(*chosen.values()):
        given = dict(zip(chosen, values, strict=True))
        for cell in cells(dataclasses.replace(base, **given)):
            if all(getattr(cell, key) == value for key, value in given.items()):
                found[repr(cell)] = cell
    if not found:
        raise FabricError(
            f"no cell has {' '.join(overrides)}" if overrides else "the experiment has no cell",
            expected=_offered(cells(base)) if overrides else "at least one",
        )
    return list(found.values())


def parse_overrides(
    kind: "type[DataclassInstance]", overrides: Sequence[str]
) -> dict[str, list[Any]]:
    """Values by key. ``a,b`` is two values, ``a+b`` one tuple, ``none`` is None.

    Raises:
        FabricError: no ``=``, an unknown or repeated key, or a value of the wrong type.
    """
    hints = field_types(kind)
    chosen: dict[str, list[Any]] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise FabricError(f"override {word!r} has no value", expected="key=value")
        if key not in hints:
            raise unknown_name("setting of this experiment", key, hints)
        if key in chosen:
            raise FabricError(f"{key} is given twice", fix=f"Write {key}=one,other")
        pieces = text.replace("\\,", "\0").split(",")
        chosen[key] = [_parse(key, piece.replace("\0", ","), hints[key]) for piece in pieces]
    return chosen


def field_types(kind: "type[DataclassInstance]") -> dict[str, Any]:
    """The type of each field, resolved."""
    from typing import get_type_hints

    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def cell_to_json(cell: "DataclassInstance") -> dict[str, Any]:
    """Field to value; tuples become lists.

    Raises:
        FabricError: a value that a cell can't have.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cell):
        value = getattr(cell, field.name)
        parts: tuple[Any, ...] = (
            cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
        )
        if not all(isinstance(part, SCALARS) for part in parts):
            raise FabricError(
                f"cell setting {field.name} can't be recorded",
                expected="text, a number, true or false, none, or a tuple of these",
                found=repr(value),
            )
        values[field.name] = list(parts) if isinstance(value, tuple) else value
    return values


def cell_from_json(kind: type[Cell], values: Mapping[str, Any]) -> Cell:
    """The inverse of :func:`cell_to_json`."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def distinguishing(cells: Sequence["DataclassInstance"]) -> list[str]:
    """Fields that are not the same in all cells, in their order."""
    if not cells:
        return []
    names = [field.name for field in dataclasses.fields(cells[0])]
    return [name for name in names if len({repr(getattr(cell, name)) for cell in cells}) > 1]


def describe(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """``key=value`` for the keys given, as :func:`parse_overrides` reads it."""
    return " ".join(shlex.quote(f"{key}={_text(values[key])}") for key in keys)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_text(part) for part in cast(Sequence[Any], value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(",", "\\,")


def _parse(key: str, text: str, kind: Any) -> Any:
    """``text`` as a value of type ``kind``."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        found = [part for part in parts if str(part) == text]
        if not found:
            raise unknown_name(f"value of {key}", text, [str(part) for part in parts])
        return found[0]
    if origin is tuple:
        return tuple(_parse(key, piece, parts[0]) for piece in text.split("+") if piece)
    if origin in (Union, types.UnionType):
        return _parse_any(key, text, parts)
    if kind is type(None) and text == "none":
        return None
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    raise FabricError(f"{key}={text}", expected=names.get(kind, str(kind)), found=repr(text))


def _parse_any(key: str, text: str, kinds: Sequence[Any]) -> Any:
    """As the first type that takes it; text is tried last."""
    for kind in sorted(kinds, key=lambda one: one is str):
        try:
            return _parse(key, text, kind)
        except FabricError:
            continue
    raise FabricError(f"{key}={text}", expected=" or ".join(map(str, kinds)), found=repr(text))


def _offered(cells: Sequence["DataclassInstance"]) -> str:
    """What the cells vary, for a message."""
    offers: list[str] = []
    for name in distinguishing(cells):
        values = list(dict.fromkeys(_text(getattr(cell, name)) for cell in cells))
        offers.append(f"{name}={','.join(values[:12])}{',…' if len(values) > 12 else ''}")
    return "; ".join(offers) or "other values"
