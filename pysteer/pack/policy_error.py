"""`PolicyError`: a wrong setting of a policy, with its path, and its place if a file has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from pysteer.errors import FormatError, SteeringError, quoted

PolicyPath: TypeAlias = tuple[str, ...]
"""The keys that lead to a setting, such as ("categories", "malware", "mode")."""

Places: TypeAlias = "Mapping[PolicyPath, str | None]"
"""Setting to its place, such as "policy.yaml, line 9"; None for a setting from no file."""


class PolicyError(SteeringError):
    """A setting of a policy is wrong.

    Attributes:
        path: the keys that lead to the setting.
        reason: the fault.
    """

    def __init__(self, path: PolicyPath, reason: str) -> None:
        super().__init__(f"{_dotted(path)}: {reason}" if path else reason)
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[PolicyError], tuple[PolicyPath, str]]:
        return PolicyError, (self.path, self.reason)


def located(error: PolicyError, places: Places) -> SteeringError:
    """Return the error, as a FormatError with its place if the setting was read from a file."""
    for end in range(len(error.path), -1, -1):
        if error.path[:end] in places:
            place = places[error.path[:end]]
            return error if place is None else FormatError(at_place(place, error))
    return error


def at_place(place: str, error: PolicyError) -> str:
    """Return the message of an error behind its place in a file."""
    return f"{place}{', ' if error.path else ': '}{error}"


def _dotted(path: PolicyPath) -> str:
    return ".".join(part if re.fullmatch(r"[\w-]{1,80}", part) else quoted(part) for part in path)
