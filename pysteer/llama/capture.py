"""Requests for activations: tokens of sequences, at sites and layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import HookError, SteeringError
from pysteer.pack.vector import SITES

Pooling: TypeAlias = Literal["last", "mean", "all"]

Activations: TypeAlias = dict[str, dict[int, npt.NDArray[np.float32]]]
"""Site to layer to float32 rows."""


@dataclass(frozen=True)
class CaptureRequest:
    """Sequences to decode from an empty context, and the means to take meanwhile.

    Attributes:
        sequences: token sequences, each from position 0.
        groups: int32, for each row of the batch the number of its mean; -1: no mean.
        wanted: site to layers.
        shared: number of first tokens that all sequences share; decoded once.
    """

    sequences: Sequence[Sequence[int]]
    groups: npt.NDArray[np.int32]
    wanted: Mapping[str, Sequence[int]]
    shared: int = 0


def pooled_capture(
    tokens: Sequence[int],
    wanted: Mapping[str, Sequence[int]],
    pool: Pooling,
    span: tuple[int, int] | None,
) -> CaptureRequest:
    """Return the request for one sequence; see `HookedContext.capture`."""
    tokens = list(tokens)
    start, stop = span if span is not None else (0, len(tokens))
    groups = np.full(len(tokens), -1, np.int32)
    if tokens and not 0 <= start < stop <= len(tokens):
        raise SteeringError(
            f"the token range [{start}, {stop}) is empty or outside the {len(tokens)} tokens"
        )
    if pool == "last":
        groups[stop - 1 : stop] = 0
    elif pool == "mean":
        groups[start:stop] = 0
    elif pool == "all":
        groups[start:stop] = np.arange(stop - start)
    else:
        raise SteeringError(f"unknown pooling {pool!r}; use last, mean, all")
    return CaptureRequest([tokens], groups, wanted)


def spans_capture(
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    owners: Sequence[int] | None,
    wanted: Mapping[str, Sequence[int]],
    shared: int,
) -> CaptureRequest:
    """Return the request for several sequences; see `HookedContext.capture_means`."""
    owners = range(len(sequences)) if owners is None else owners
    groups = [np.full(len(tokens), -1, np.int32) for tokens in sequences]
    for span, (number, (start, stop)) in enumerate(zip(owners, spans, strict=True)):
        tokens = sequences[number]
        if not 0 <= start < stop <= len(tokens):
            raise SteeringError(
                f"the token range [{start}, {stop}) is empty or outside the {len(tokens)} "
                f"tokens of sequence {number}"
            )
        if not 0 <= shared <= start or tokens[:shared] != sequences[0][:shared]:
            raise SteeringError(
                f"sequence {number} does not share its first {shared} tokens, or its token range "
                "begins among them"
            )
        if (groups[number][start:stop] >= 0).any():
            raise SteeringError(f"token ranges of sequence {number} overlap")
        groups[number][start:stop] = span
    if set(owners) != set(range(len(sequences))):
        raise SteeringError("a sequence has no token range")
    rows = [np.full(shared, -1, np.int32), *(own[shared:] for own in groups)]
    return CaptureRequest(sequences, np.concatenate(rows), wanted, shared)


def wanted_layers(
    available: Mapping[str, tuple[int, ...]], sites: Iterable[str], layers: Iterable[int] | None
) -> dict[str, list[int]]:
    """Return site to layers, checked against the sites of the model.

    Raises:
        SteeringError: an unknown site, or no site or layer.
        HookError: the model lacks a site at some layer.
    """
    wanted: dict[str, list[int]] = {}
    asked = None if layers is None else sorted({int(layer) for layer in layers})
    for site in sites:
        if site not in available:
            raise SteeringError(f"unknown site {site!r}; use one of {', '.join(SITES)}")
        if not available[site]:
            raise HookError(f"this model's graph has no {site} site")
        wanted[site] = list(available[site]) if asked is None else asked
        missing = sorted(set(wanted[site]) - set(available[site]))
        if missing:
            raise HookError(f"this model's graph has no {site} site at layers {missing}")
    if not any(wanted.values()):
        raise SteeringError("nothing to capture: name at least one site and one layer")
    return wanted
