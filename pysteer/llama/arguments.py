"""Names of the arguments that a model's constructor takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import llama_cpp

from pysteer.errors import SteeringError, nearest, quoted

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def require_known(given: Iterable[str], owner: type, *others: type) -> None:
    """Raise SteeringError at a name that no constructor takes: `llama_cpp.Llama` ignores such.

    Args:
        given: names of arguments.
        owner: class of the object under construction.
        *others: classes to which `owner` hands arguments.
    """
    known: set[str] = set()
    for each in (base for kind in (owner, *others) for base in kind.__mro__):
        parameters = inspect.signature(each).parameters.values()
        known |= {parameter.name for parameter in parameters if parameter.kind in _NAMED}
    known.discard("self")
    for name in given:
        if name not in known:
            raise SteeringError(
                f"neither {owner.__name__} nor llama_cpp.Llama {llama_cpp.__version__} has an "
                f"argument {quoted(name)}{nearest(name, sorted(known))}"
            )
