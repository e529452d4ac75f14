"""Options of a command from the fields of dataclasses.

The parameters of a command function may be dataclasses. `with_options` makes the function that
typer sees, with an option for each field, and gives the command function instances of the classes.
A field made by `pysteer.settings.setting` brings its default, help, range and choices; any other
field is annotated with a `typer.Option`, as a parameter would be. An instance as the parameter's
default replaces the fields' defaults. Every command also gets --debug.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from pysteer.cli import console
from pysteer.cli.spellings import COMMON, Spelling
from pysteer.errors import SteeringError
from pysteer.settings import Setting, described

_LONGEST_METAVAR = 30

Debug = Annotated[
    bool,
    typer.Option("--debug", callback=console.set_debug, is_eager=True, help="Show tracebacks."),
]


_METAVARS = {int: "N", float: "X", Path: "FILE"}


def with_options(
    *, leave_out: Iterable[str] = (), **spellings: Spelling
) -> Callable[[Callable[..., None]], Callable[..., Callable[[], None]]]:
    """Return a decorator that makes a command function's options from its dataclasses.

    The decorated function checks the options, and returns the command function with its arguments.

    Args:
        leave_out: settings without an option.
        **spellings: of settings, by name.
    """

    left_out = set(leave_out)

    def decorate(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        unknown = {*left_out, *spellings}
        plan: dict[str, _Group | None] = {}
        parameters: dict[str, inspect.Parameter] = {}
        for each in inspect.signature(function, eval_str=True).parameters.values():
            group = None
            if is_dataclass(each.annotation):
                default = None if each.default is inspect.Parameter.empty else each.default
                group = _Group(each.annotation, default, left_out, spellings)
                unknown -= group.names
            plan[each.name] = group
            for option in [each] if group is None else group.parameters():
                if option.name in parameters:
                    raise TypeError(f"{function.__name__} has two options {option.name}")
                parameters[option.name] = option.replace(kind=inspect.Parameter.KEYWORD_ONLY)

        if unknown:
            raise TypeError(f"{function.__name__} has no settings {', '.join(sorted(unknown))}")

        def command(**values: Any) -> Callable[[], None]:
            # Run after parsing: typer takes some errors for its own, such as EOFError.
            built = {
                name: values[name] if group is None else group.build(values)
                for name, group in plan.items()
            }
            return partial(function, **built)

        signature = [*parameters.values(), _parameter("debug", Debug, False)]
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        command.__module__ = function.__module__
        command.__annotations__ = {each.name: each.annotation for each in signature}
        command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        return command

    return decorate


class _Group:
    """Options for the fields of a dataclass.

    Args:
        kind: the dataclass.
        default: an instance with the options' defaults; None: the defaults of the fields.
        leave_out: names of fields without an option.
        spellings: of the fields, by name.
    """

    def __init__(
        self, kind: Any, default: Any, leave_out: set[str], spellings: Mapping[str, Spelling]
    ) -> None:
        self._kind = kind
        self._default = default
        self._groups: dict[str, _Group] = {}
        self._options: dict[str, _Option] = {}
        offered = [field for field in fields(kind) if field.name not in leave_out]
        hints = _hints(kind, offered)
        for field in offered:
            hint, value = hints[field.name], self._default_of(field)
            if is_dataclass(hint):
                self._groups[field.name] = _Group(hint, value, leave_out, spellings)
                continue
            spelling = spellings.get(field.name) or COMMON.get(field.name, Spelling())
            description = described(kind).get(field.name)
            self._options[field.name] = _Option(field.name, hint, value, description, spelling)

    @property
    def names(self) -> set[str]:
        """Names of all fields, also of inner dataclasses."""
        inner = [group.names for group in self._groups.values()]
        return {field.name for field in fields(self._kind)}.union(*inner)

    def _default_of(self, field: Field[Any]) -> Any:
        if self._default is not None:
            return getattr(self._default, field.name)
        if field.default_factory is not MISSING:
            return field.default_factory()
        return inspect.Parameter.empty if field.default is MISSING else field.default

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the parameters that typer makes options of, in the order of the fields."""
        for field in fields(self._kind):
            if field.name in self._groups:
                yield from self._groups[field.name].parameters()
            elif field.name in self._options:
                yield self._options[field.name].parameter

    def build(self, values: Mapping[str, Any]) -> Any:
        """Return an instance with the options' values.

        Raises:
            SteeringError: a value is not in its form, or the class refuses it.
        """
        given = {name: group.build(values) for name, group in self._groups.items()}
        given |= {name: option.value(values[name]) for name, option in self._options.items()}
        if self._default is not None:
            kept = {field.name: getattr(self._default, field.name) for field in fields(self._kind)}
            given = kept | given
        try:
            return self._kind(**given)
        except SteeringError as error:
            # Settings are named as in Python; the user knows the options.
            known = "|".join(self._options)
            named = re.match(rf"unknown (?:item of )?({known}) |({known}) must ", str(error))
            if named is None:
                raise
            name = named[1] or named[2]
            message = str(error).replace(f"{name} ", f"{self._options[name].flag} ", 1)
            raise SteeringError(message) from None


class _Option:
    """Option for a field.

    Args:
        name: of the field.
        hint: its type; complete with a `typer.Option` if there is no description.
        default: its default, or `inspect.Parameter.empty`.
        description: help, range and choices of a setting.
        spelling: of a setting.
    """

    def __init__(
        self, name: str, hint: Any, default: Any, description: Setting | None, spelling: Spelling
    ) -> None:
        self._spelling = spelling
        self._default = default
        self.flag = next(iter(spelling.flags), f"--{name.replace('_', '-')}")
        self._written = default
        if description is None:
            self.parameter = _parameter(name, hint, default)
            return
        kind: Any
        if spelling.read is None:
            kind = _plain_type(hint)
        else:
            kind = spelling.type
            self._written = spelling.write(default)
        option = _describe(description, spelling, kind, self._names(kind))
        kind = kind | None if self._written is None else kind
        self.parameter = _parameter(name, Annotated[kind, option], self._written)

    def _names(self, kind: Any) -> tuple[str, ...]:
        if kind is not bool:
            return (self.flag, *self._spelling.flags[1:])
        return (f"{self.flag}/--no-{self.flag[2:]}" if self._written else self.flag,)

    def value(self, given: Any) -> Any:
        """Return the field's value for the option's.

        Raises:
            SteeringError: a text is not in the form of the spelling.
        """
        if given == self._written:
            return self._default
        if self._spelling.read is None:
            return given
        try:
            return self._spelling.read(given)
        except ValueError:
            form = self._spelling.metavar
            example = f", as in {self._spelling.example}" if self._spelling.example else ""
            raise SteeringError(f"{self.flag} {given}: write {form}{example}") from None


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _describe(description: Setting, spelling: Spelling, kind: Any, names: tuple[str, ...]) -> Any:
    help, metavar = spelling.help or description.help, spelling.metavar
    choices = [str(choice) for choice in description.choices or () if choice != ""]
    if metavar is None:
        metavar = _METAVARS.get(kind)
    listed = f"[{'|'.join(choices)}]"
    if choices and metavar is None:
        metavar = listed if len(listed) <= _LONGEST_METAVAR else "NAME"
    if metavar != listed and not spelling.help and any(choice not in help for choice in choices):
        help = f"{help} Known: {', '.join(choices)}."
    numeric = kind in (int, float)
    return typer.Option(
        *names,
        help=help,
        metavar=metavar,
        min=description.minimum if numeric else None,
        max=description.maximum if numeric else None,
    )


def _hints(kind: Any, offered: Iterable[Field[Any]]) -> dict[str, Any]:
    # Types of other fields may be imported for type checking alone.
    part = SimpleNamespace(__annotations__={field.name: field.type for field in offered})
    module = vars(sys.modules[kind.__module__])
    return get_type_hints(part, globalns=module, include_extras=True)


def _plain_type(hint: Any) -> Any:
    """Return a hint's type without None; str for literals."""
    if get_origin(hint) in (Union, UnionType):
        [hint] = (part for part in get_args(hint) if part is not NoneType)
    return str if get_origin(hint) is Literal else hint
