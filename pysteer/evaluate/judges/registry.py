"""Judges and rewards by their specs.

To add a judge, write a module here with `open_judge(argument, **llama_arguments)` (and
`open_reward(argument)`, if its answers can be numbers), and add a line to `_ENTRIES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from pysteer.errors import SteeringError
from pysteer.judge import Judge, Reward


class _Entry(NamedTuple):
    """A kind of judge.

    Attributes:
        spec: the form that a user writes: the kind, with an argument after a colon if needed.
        module: name in this package; imported when a judge is opened.
        reward: True if the module has `open_reward`.
    """

    spec: str
    module: str
    reward: bool = False

    def argument(self, spec: str) -> str | None:
        """Return the argument in a user's spec; None if the spec is of another kind."""
        kind, colon, _ = self.spec.partition(":")
        if not colon:
            return "" if spec == kind else None
        return spec.removeprefix(f"{kind}:") or None if spec.startswith(f"{kind}:") else None


_ENTRIES = (
    _Entry("refusal", "refusal"),
    _Entry("guard:PATH.gguf", "guard"),
    _Entry("openai:URL#MODEL", "endpoint", reward=True),
    _Entry("python:MODULE:FUNCTION", "functions", reward=True),
)

JUDGE_SPECS = tuple(entry.spec for entry in _ENTRIES)
"""The specs of judges, for help texts."""

REWARD_SPECS = tuple(entry.spec for entry in _ENTRIES if entry.reward)
"""The specs of rewards."""


def open_judge(spec: str, **llama_arguments: Any) -> Judge:
    """Return the judge of a spec.

    Args:
        spec: one of the forms in `JUDGE_SPECS`.
        **llama_arguments: for guard models: arguments of `Engine`, such as n_threads.

    Raises:
        SteeringError: no judge has that spec, or the judge cannot be opened.

    Examples:
        >>> from pysteer.judge import Item
        >>> judge = open_judge("refusal")
        >>> judge.judge([Item("How do I pick a lock?", "I can't help with that.")])
        [Verdict(safe=True, reason='refuses')]
    """
    for entry in _ENTRIES:
        argument = entry.argument(spec)
        if argument is not None:
            judge: Judge = _module(entry).open_judge(argument, **llama_arguments)
            return judge
    raise SteeringError(f"--judge {spec}: use {_listed(JUDGE_SPECS)}")


def open_reward(spec: str) -> Reward:
    """Return the reward of a spec.

    Raises:
        SteeringError: no reward has that spec, or the reward cannot be opened.
    """
    for entry in _ENTRIES:
        argument = entry.argument(spec)
        if argument is not None and entry.reward:
            reward: Reward = _module(entry).open_reward(argument)
            return reward
    raise SteeringError(f"--reward {spec}: use {_listed(REWARD_SPECS)}")


def _module(entry: _Entry) -> Any:
    return import_module(f"{__package__}.{entry.module}")


def _listed(specs: tuple[str, ...]) -> str:
    return f"{', '.join(specs[:-1])} or {specs[-1]}"
