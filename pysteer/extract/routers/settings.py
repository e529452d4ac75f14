"""Settings of a router's fit, and its limits on prompts."""

from __future__ import annotations

from dataclasses import dataclass

from pysteer.errors import SteeringError
from pysteer.pack.router import CLASSIFIERS, GATES
from pysteer.settings import check, setting

FALSE_POSITIVE_RATE = 0.005
"""Default share of benign prompts that may open a margin gate."""

LOOK_ALIKE_RATE = 0.1
"""Default share of benign prompts that sound harmful and may open a margin gate. A stricter bound
would cost most of the harmful prompts that do not sound harmful."""

MAX_LEAK = 0.05
"""Default share of the other categories' prompts that may open a category's margin gate."""

MIN_PROMPTS = 5
"""Fewest prompts of a class that can be split: four to learn from, one to test with."""

FEW_UNSAFE = 20
"""Fewest prompts of a category without a warning."""

FEW_EVERYDAY = 100
"""Fewest everyday prompts without a warning: 0 of 100 leaves up to 4% false positives."""

MAX_PROMPTS = 5000
"""Most prompts of a fit; of more a sample is used. More hardly help, and the time is cubic."""


@dataclass(frozen=True)
class RouterSettings:
    """Settings of a router's fit.

    Attributes:
        gates: kinds of gate, of `pysteer.pack.router.GATES`, one of `CLASSIFIERS` among them.
        false_positive_rate: largest share of benign prompts that may open a gate; None is 0.005
            for the margin gate, and no limit for the others.
        max_leak: largest share of the other categories' prompts that may open a category's margin
            gate; but the gate of the best category opens for every harmful prompt.
        look_alike_rate: largest share of the look-alikes that may open a margin gate.
        folds: of the cross-validation; fewer if a class is smaller.
        seed: of the splits; the same seed gives the same router.

    Raises:
        SteeringError: a value out of range.
    """

    gates: tuple[str, ...] = setting(("margin",), "Kinds of gate.", choices=GATES)
    false_positive_rate: float | None = setting(
        None, "Largest share of benign prompts that may open a gate.", minimum=0, below=1
    )
    max_leak: float = setting(
        MAX_LEAK, "Largest share of other categories' prompts that may open a gate.", 0, 1
    )
    look_alike_rate: float = setting(
        LOOK_ALIKE_RATE, "Largest share of look-alikes that may open a gate.", 0, 1
    )
    folds: int = setting(5, "Folds of the cross-validation.", 2)
    seed: int = setting(0, "The same seed gives the same router.", 0)

    def __post_init__(self) -> None:
        check(self)
        if not set(self.gates) & set(CLASSIFIERS):
            raise SteeringError(
                f"a router needs a gate that is one of {', '.join(CLASSIFIERS)}; "
                f"given are {', '.join(self.gates) or 'no gates'}"
            )
