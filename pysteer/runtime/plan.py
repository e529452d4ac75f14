"""From categories and strengths to what happens at each site and layer of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias

from pysteer import _native
from pysteer.errors import HookError, SteeringError, quoted
from pysteer.pack import SteeringPack
from pysteer.vector import finite

Mode: TypeAlias = Literal["auto", "resident", "hooked"]
MODES: tuple[Mode, ...] = ("auto", "resident", "hooked")

Key: TypeAlias = tuple[tuple[str, float], ...]
"""Digests of steering vectors with the strengths they are added at, in the order of addition."""


class CompiledPlan(NamedTuple):
    """Exactly what is added where, ready for the native hook.

    Attributes:
        native: the sums of directions per site and layer; None adds nothing.
        resident: written into llama.cpp's control-vector tensors, rather than hooked.
        key: what the logits depend on.
        cache_key: what the KV cache depends on. Keys and values are computed from the outputs of
            earlier blocks, so a vector that acts in the last block only is not part of it.
    """

    native: _native.Plan | None
    resident: bool
    key: Key
    cache_key: Key


_SITES = dict(_native.Site.__members__)

_CERTAINLY_FINITE = 1e38  # sums that stay below it in float64 do not overflow float32

UNSTEERED = CompiledPlan(None, False, (), ())


def check_strengths(pack: SteeringPack, steering: Mapping[str, float | str]) -> dict[str, float]:
    """The categories of `pack` to steer and how strongly; strength 0 is left out.

    Raises:
        UnknownCategoryError: a category that the pack lacks.
        SteeringError: a strength that is not a finite number.
    """
    strengths: dict[str, float] = {}
    for category, strength in steering.items():
        _ = pack[category]
        if type(strength) is float and math.isfinite(strength):  # nearly always; the rest is slow
            if strength != 0:
                strengths[category] = strength
            continue
        name = quoted(category)
        if isinstance(strength, str) and strength == "auto":
            raise SteeringError(
                f"category {name} is to be gated, and this version applies no router; "
                "give it a number as strength"
            )
        if not isinstance(strength, Real) or isinstance(strength, bool):
            raise SteeringError(f"the strength of {name} is {quoted(strength)}, not a number")
        number = finite(strength, f"the strength of {name} must be")
        if number != 0:
            strengths[category] = number
    return strengths


def compile_plan(
    pack: SteeringPack,
    strengths: Mapping[str, float],
    *,
    n_layer: int,
    n_embd: int,
    mode: Mode,
) -> CompiledPlan:
    """Sum what the categories add at each site and layer, and choose the way in.

    "auto" takes the resident way where it can express the plan, which is when everything acts on
    the residual of layers >= 1, and the hooked way otherwise.

    Args:
        pack: a pack that fits the model.
        strengths: from `check_strengths`; finite and not 0.
        n_layer: the model's number of blocks.
        n_embd: the model's width.
        mode: the way in, or "auto".

    Raises:
        SteeringError: a direction times its strength overflows float32.
        HookError: mode "resident" for a plan that llama.cpp's control vector cannot express.
    """
    if not strengths:
        return UNSTEERED
    native = _native.Plan(n_layer, n_embd)
    key: list[tuple[str, float]] = []
    cache_key: list[tuple[str, float]] = []
    bound = 0.0
    for category, strength in sorted(strengths.items()):
        vector = pack[category]
        try:
            native.add(_SITES[vector.site], vector.layer_indices, vector.matrix, strength)
        except ValueError as error:
            raise SteeringError(f"category {quoted(category)}: {error}") from None
        bound += abs(strength) * max(vector.peak, 1.0)
        key.append((vector.digest, strength))
        if vector.layers[0] < n_layer - 1:
            cache_key.append((vector.digest, strength))
    if mode == "resident" and not native.fits_resident:
        raise HookError(
            "mode 'resident' reaches the residual of layers >= 1 only; use 'auto' or 'hooked'"
        )
    if bound > _CERTAINLY_FINITE:  # a look at every sum, which a change between tokens can spare
        try:
            native.check_finite()
        except ValueError as error:
            raise SteeringError(f"category {', '.join(map(quoted, strengths))}: {error}") from None
    resident = mode == "resident" or (mode == "auto" and native.fits_resident)
    if not resident:
        native.keep_sums()
    return CompiledPlan(native, resident, tuple(key), tuple(cache_key))
