"""What a calibration is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from pysteer.errors import SteeringError, quoted
from pysteer.extract.methods import METHODS
from pysteer.pack.scope import Scope

HeldOut: TypeAlias = Literal["prompts", "subcategories"]
"""What the test part holds: prompts of every subcategory, or whole subcategories."""


@dataclass(frozen=True)
class CalibrateSettings:
    """How a pack is searched for.

    Attributes:
        methods: of extraction; see `pysteer.extract.methods.METHODS`.
        layers: block indices that directions are sought at; None is three around the middle.
        category_steps: at most so many steps of `learned` for each category by itself, which take
            longer than all else; with 0 all categories share one vector, and differ in strength
            and gate.
        scopes: which tokens may be steered, as a policy writes them.
        strengths: the smallest and largest, as factors on what the method recommends.
        minutes: no trial begins later than that after the start. What is under way is finished, and
            then the chosen pack is validated.
        trials: at most so many for each category.
        max_degenerate: largest share of degenerate answers.
        max_benign_change: largest share of benign prompts that may open a gate.
        max_look_alike: largest share of the harmless twins, and of others that sound harmful, that
            may open a gate.
        max_leak: largest share of the other categories' prompts that may open a category's gate.
        validation: share of the prompts that the search measures on.
        test: share of the prompts that nothing of the calibration sees.
        held_out: what the test part holds.
        limit: at most so many validation prompts of a category are answered.
        others: prompts of other categories that each trial asks too, to see what a vector does to
            them.
        max_tokens: where an answer is cut.
        parallel: how many prompts are answered at once.
        context: tokens that these share.
        seed: of every choice.

    Raises:
        SteeringError: a value that does not exist or is out of its range.
    """

    methods: tuple[str, ...] = ("learned",)
    layers: tuple[int, ...] | None = None
    category_steps: int = 0
    scopes: tuple[str, ...] = ("all", "prompt", "response", "cosine 48")
    strengths: tuple[float, float] = (0.6, 1.6)
    minutes: float = 15.0
    trials: int = 8
    max_degenerate: float = 0.01
    max_benign_change: float = 0.005
    max_look_alike: float = 0.1
    max_leak: float = 0.05
    validation: float = 0.2
    test: float = 0.2
    held_out: HeldOut = "prompts"
    limit: int = 12
    others: int = 3
    max_tokens: int = 40
    parallel: int = 16
    context: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise SteeringError(
                    f"unknown method {quoted(method)}; use some of {', '.join(METHODS)}"
                )
        for name in ("methods", "scopes"):
            if not getattr(self, name):
                raise SteeringError(f"no {name} are named")
        for scope in self.scopes:
            Scope.parse(scope)
        if self.held_out not in get_args(HeldOut):
            raise SteeringError(
                f"unknown held_out {quoted(self.held_out)}; use one of "
                f"{', '.join(get_args(HeldOut))}"
            )
        least, most = self.strengths
        if not (0 < least <= most and math.isfinite(most)):
            raise SteeringError(f"the strengths {least} to {most} are no range above 0")
        below_one = math.nextafter(1, 0)
        ranges: dict[str, tuple[float, float]] = {
            "category_steps": (0, math.inf),
            "minutes": (0, math.inf),
            "trials": (1, math.inf),
            "max_degenerate": (0, 1),
            "max_benign_change": (0, below_one),
            "max_look_alike": (0, below_one),
            "max_leak": (0, below_one),
            "validation": (0.05, 0.9),
            "test": (0, 0.9),
            "limit": (1, math.inf),
            "others": (0, math.inf),
            "max_tokens": (1, math.inf),
            "parallel": (1, math.inf),
            "context": (1, math.inf),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise SteeringError(f"{name} cannot be {quoted(value)}")
        if self.validation + self.test > 0.9:
            raise SteeringError(
                f"validation ({self.validation:g}) and test ({self.test:g}) leave too little to "
                "learn from; together at most 0.9"
            )

    def content(self) -> dict[str, Any]:
        """As plain data, for the provenance."""
        content = asdict(self)
        for field in fields(self):
            if isinstance(content[field.name], tuple):
                content[field.name] = list(content[field.name])
        return content
