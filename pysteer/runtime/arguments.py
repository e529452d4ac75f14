"""The arguments `pack`, `steering` and `policy` of models and requests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from pysteer.pack.merge import PackSource, read_packs
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy

PackLike: TypeAlias = "PackSource | Sequence[PackSource]"
"""A pack, a pack file, a plain llama.cpp control-vector file, or several of them."""

PolicyLike: TypeAlias = "Policy | Mapping[str, Any] | str | os.PathLike[str]"
"""A policy, its data, or a YAML file."""


class Inherit:
    """Type of `INHERIT`."""

    def __repr__(self) -> str:
        return "INHERIT"


INHERIT: Final = Inherit()
"""The argument was left out: the `with llm.steering(...)` block or the policy decides."""


def read_pack(pack: PackLike | None) -> SteeringPack | None:
    """Return the pack of an argument.

    Raises:
        FormatError: a file is not a pack.
        SteeringError: several packs that cannot be one; see `pysteer.pack.merge.read_packs`.
    """
    if pack is None:
        return None
    return read_packs(pack if isinstance(pack, (list, tuple)) else [pack])  # type: ignore[list-item]


def read_policy(policy: PolicyLike | None) -> Policy | None:
    """Return the policy of an argument.

    Raises:
        FormatError: the file is not a policy.
        SteeringError: the data is not a policy.
    """
    if policy is None or isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_content(policy)
    return Policy.load(policy)
