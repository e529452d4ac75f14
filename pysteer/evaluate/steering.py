"""Steering of an arm: as a request takes it, or each prompt's own category."""

from __future__ import annotations

from typing import Final, TypeAlias

from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import Inherit


class OwnCategory:
    """Type of `OWN_CATEGORY`."""

    def __repr__(self) -> str:
        return "own"


OWN_CATEGORY: Final = OwnCategory()
"""Steering that forces each prompt's own category."""

ArmSteering: TypeAlias = "Steering | Inherit | OwnCategory"
"""Steering as a request takes it; `INHERIT`: by the policy; `OWN_CATEGORY`."""
