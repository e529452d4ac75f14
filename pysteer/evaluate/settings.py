"""Settings of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from pysteer.settings import check, setting

if TYPE_CHECKING:
    from pysteer.evaluate.steering import ArmSteering

IsolationMode: TypeAlias = Literal["gated", "forced"]
"""Switch of a category for the isolation matrix: by its gate, or forced."""

MAX_PARALLEL = 256
"""Sequences that llama.cpp decodes at once, at most."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler."""

    max_tokens: int = setting(64, "Longest answer, tokens.", minimum=1)
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", minimum=0)
    seed: int = setting(0, "Seed for temperatures above 0.", minimum=0)

    def __post_init__(self) -> None:
        check(self)

    def seed_of(self, prompt: str) -> int:
        """Return the seed of a prompt, which depends on this seed and the text alone."""
        digest = hashlib.sha256(f"{self.seed}\n{prompt}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of an evaluation.

    Attributes:
        sampling: how answers are drawn.
        steering: steering of the steered arm; None: the policy's if the policy switches a category
            on, else each prompt's own category, forced.

    Raises:
        SteeringError: a value is out of range.
    """

    sampling: Sampling = field(default_factory=Sampling)
    steering: ArmSteering = None
    strengths: Sequence[float] = setting(
        (), "More strengths for the trade-off curves: factors on the steered arm's."
    )
    isolation: Sequence[IsolationMode] | None = setting(
        None,
        "Isolation matrices: gated, forced (slow), both or none; by default gated if the pack has "
        "a router.",
        choices=get_args(IsolationMode),
    )
    fluency: bool = setting(True, "Measure log-likelihoods under the unsteered model.")
    limit: int | None = setting(
        None, "Most prompts of each category, and most benign prompts.", minimum=1
    )
    parallel: int = setting(
        8, "Prompts answered at once; the text depends on it.", minimum=1, maximum=MAX_PARALLEL
    )
    context: int = setting(4096, "Context size shared by these prompts, tokens.", minimum=1)

    def __post_init__(self) -> None:
        check(self)
