"""Settings classes: each field states its default, help text and range once.

A settings class is a frozen dataclass of `setting` fields, whose `__post_init__` calls `check`. The
command line makes its options from `described`.

Examples:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class ShareSettings:
    ...     share: float = setting(0.2, "Share of the prompts.", minimum=0, below=1)
    ...
    ...     def __post_init__(self) -> None:
    ...         check(self)
    >>> ShareSettings().share
    0.2
    >>> ShareSettings(share=1.0)
    Traceback (most recent call last):
    pysteer.errors.SteeringError: share must be at least 0 and below 1, not 1.0
"""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from pysteer.errors import SteeringError, quoted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KEY = "pysteer.setting"


@dataclass(frozen=True)
class Setting:
    """Description of one field of a settings class.

    Attributes:
        help: one or two sentences for a user.
        minimum: smallest value.
        maximum: largest value.
        above: largest number that is too small.
        below: smallest number that is too large.
        choices: all allowed values; None without such a list.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None


def setting(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """Return a dataclass field with a description; bounds and choices hold for each of a tuple.

    Args:
        default: the default; a dict or a list is copied for each instance.
        help: one or two sentences for a user.
        minimum: smallest value.
        maximum: largest value.
        above: largest number that is too small.
        below: smallest number that is too large.
        choices: all allowed values.
    """
    allowed = None if choices is None else tuple(choices)
    described = Setting(help, minimum, maximum, above, below, allowed)
    metadata = {_KEY: described}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def described(settings: type[DataclassInstance]) -> dict[str, Setting]:
    """Return the descriptions of a class's settings by name, in the order of declaration."""
    return {
        field.name: field.metadata[_KEY]
        for field in dataclasses.fields(settings)
        if _KEY in field.metadata
    }


def check(settings: DataclassInstance) -> None:
    """Check every setting against its type, range and choices.

    None passes where the annotation allows None. A number has to be finite, and an integer where
    the annotation has `int` without `float`. Each item of a tuple is checked by itself.

    Raises:
        SteeringError: the first setting that fails, with the expected values.
    """
    hints = _hints(type(settings))
    for name, description in described(type(settings)).items():
        value = getattr(settings, name)
        types = hints[name]
        if value is None and NoneType in types:
            continue
        several = isinstance(value, (tuple, list))
        for item in value if several else (value,):
            if description.choices is not None:
                one_of(f"item of {name}" if several else name, item, description.choices)
            _check(name, item, types, description)


def content(settings: DataclassInstance) -> dict[str, Any]:
    """Return all settings as JSON data, for provenance: tuples as lists, mappings as dicts."""
    names = [field.name for field in dataclasses.fields(settings)]
    return {name: _plain(getattr(settings, name)) for name in names}


def one_of(name: str, value: object, choices: Sequence[Any]) -> None:
    """Raise SteeringError unless a value is one of the choices."""
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice != "")
        raise SteeringError(f"unknown {name} {quoted(value)}; use one of {known}")


def _check(name: str, value: Any, types: frozenset[Any], description: Setting) -> None:
    if not types & {int, float} or (isinstance(value, str) and types & {str, value}):
        return
    if not isinstance(value, Real) or not math.isfinite(value):
        expected = "a finite number"
    elif float not in types and not isinstance(value, Integral):
        expected = "an integer"
    else:
        bounds = _bounds(description)
        if all(holds(value, bound) for bound, holds, _ in bounds):
            return
        expected = " and ".join(text.format(bound) for bound, _, text in bounds)
    raise SteeringError(f"{name} must be {expected}, not {quoted(value)}")


def _bounds(description: Setting) -> list[tuple[float, Callable[[Any, Any], bool], str]]:
    """Return each bound with its relation and a text for messages."""
    bounds = (
        (description.minimum, operator.ge, "at least {:g}"),
        (description.above, operator.gt, "above {:g}"),
        (description.maximum, operator.le, "at most {:g}"),
        (description.below, operator.lt, "below {:g}"),
    )
    return [(bound, holds, text) for bound, holds, text in bounds if bound is not None]


@cache
def _hints(settings: type[DataclassInstance]) -> dict[str, frozenset[Any]]:
    """Return the types and literal values of each setting and of the items of its tuples."""
    # Not of the whole class: other fields may have types that are imported for checking alone.
    annotations = {field.name: field.type for field in dataclasses.fields(settings)}
    part = SimpleNamespace(
        __annotations__={name: annotations[name] for name in described(settings)}
    )
    hints = get_type_hints(part, globalns=vars(sys.modules[settings.__module__]))
    return {name: _types(hint) for name, hint in hints.items()}


_TRANSPARENT = {Union, UnionType, Literal, tuple, list, Sequence}


def _types(hint: Any) -> frozenset[Any]:
    if get_origin(hint) not in _TRANSPARENT:
        return frozenset({hint})
    return frozenset().union(*map(_types, get_args(hint)))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return content(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value
