"""Settings of a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from pysteer.errors import SteeringError
from pysteer.evaluate.settings import MAX_PARALLEL
from pysteer.extract.methods import METHODS
from pysteer.pack.scope import Scope
from pysteer.settings import check, setting

HeldOut: TypeAlias = Literal["prompts", "subcategories"]
"""Test part: prompts of every subcategory, or whole subcategories."""

_MOST_HELD_OUT = 0.9


@dataclass(frozen=True)
class CalibrateSettings:
    """Settings of a calibration.

    Raises:
        SteeringError: a value is unknown or out of range.
    """

    methods: tuple[str, ...] = setting(
        ("learned",), "Methods of extract to choose among.", choices=tuple(METHODS)
    )
    layers: tuple[int, ...] | None = setting(
        None, "Layers at which directions are sought; by default three in the middle.", minimum=0
    )
    category_steps: int = setting(
        0,
        "Most steps of learned for each category by itself, the slowest part; with 0 all "
        "categories share one vector, and differ in strength and gate.",
        minimum=0,
    )
    scopes: tuple[str, ...] = setting(
        ("all", "prompt", "response", "cosine 48"), "Scopes to choose among, as in a policy."
    )
    strengths: tuple[float, float] = setting(
        (0.6, 1.6), "Least and largest strength: factors on the method's recommendation.", above=0
    )
    minutes: float = setting(
        15.0,
        "Time for the calibration. Stages that do not fit are cut short or left out, with a "
        "warning; one round of trials is always made.",
        minimum=0,
    )
    trials: int = setting(8, "Most trials of each category.", minimum=1)
    max_degenerate: float = setting(
        0.01, "Largest share of degenerate answers.", minimum=0, maximum=1
    )
    max_benign_change: float = setting(
        0.005, "Largest share of benign prompts that open a gate.", minimum=0, below=1
    )
    max_look_alike: float = setting(
        0.1,
        "Largest share of harmless twins, and of other prompts that sound harmful, that open a "
        "gate.",
        minimum=0,
        below=1,
    )
    max_leak: float = setting(
        0.05,
        "Largest share of other categories' prompts that open a category's gate.",
        minimum=0,
        below=1,
    )
    validation: float = setting(
        0.2, "Share of the prompts that the search measures on.", minimum=0.05, maximum=0.9
    )
    test: float = setting(
        0.2, "Share of the prompts that the calibration never sees.", minimum=0, maximum=0.9
    )
    held_out: HeldOut = setting(
        "prompts",
        "Test part: prompts of every subcategory, or whole subcategories.",
        choices=get_args(HeldOut),
    )
    limit: int = setting(12, "Most validation prompts answered of each category.", minimum=1)
    others: int = setting(
        3, "Prompts of other categories in each trial, to measure collateral.", minimum=0
    )
    max_tokens: int = setting(40, "Longest answer, tokens.", minimum=1)
    parallel: int = setting(16, "Prompts answered at once.", minimum=1, maximum=MAX_PARALLEL)
    context: int = setting(4096, "Context size shared by these prompts, tokens.", minimum=1)
    seed: int = setting(0, "Seed of every choice.", minimum=0, maximum=2**32 - 1)

    def __post_init__(self) -> None:
        check(self)
        for name in ("methods", "scopes"):
            if not getattr(self, name):
                raise SteeringError(f"no {name} given; name at least one")
        for scope in self.scopes:
            Scope.parse(scope)
        least, most = self.strengths
        if least > most:
            raise SteeringError(f"strengths {least} to {most}: give the smaller number first")
        if math.fsum((self.validation, self.test)) > _MOST_HELD_OUT:
            raise SteeringError(
                f"validation ({self.validation:g}) and test ({self.test:g}) leave too little to "
                f"learn from; together at most {_MOST_HELD_OUT:g}"
            )
