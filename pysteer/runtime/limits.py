"""Bound on strengths: the change of a hidden state, in multiples of its typical norm.

A change far beyond the model's own activations leaves no text, and a change near the end of float32
overflows in a later layer, where its values would reach the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import llama_cpp
import numpy as np

from pysteer.errors import SteeringError, quoted
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.pack import SteeringPack
from pysteer.pack.vector import SteeringVector

MAX_RELATIVE_NORM = 32.0
"""Default bound. Text falls apart from a few times the typical norm on."""

_TEXT = b"The weather is calm today, and the children are playing near the old bridge."


def typical_norms(llm: HookedLlama, pack: SteeringPack) -> dict[int, float]:
    """Return the median L2 norm of the residual stream at each layer that a pack steers.

    Measured on a short text, without its first token, whose norm is unlike any other's. Empties the
    context. In a context of one token the pack's own norm counts; layers without
    either are left out.
    """
    steered = {layer for vector in pack.categories.values() for layer in vector.layers}
    found = {layer: norm for layer, norm in pack.residual_norm.items() if layer in steered}
    layers = sorted(steered & set(llm.sites["residual"]))
    tokens = [token % llm.n_vocab() for token in llm.tokenize(_TEXT)][: llm.n_ctx()]
    if layers and len(tokens) > 1:
        rows = llm.context.capture(tokens, layers=layers, pool="all")["residual"]
        llama_cpp.llama_perf_context_reset(llm.context.pointer)
        for layer, states in rows.items():
            lengths = np.linalg.norm(states[1:].astype(np.float64), axis=1)
            found[layer] = float(np.median(lengths))
    return found


class StrengthLimits:
    """Largest strengths of the categories of a pack.

    Args:
        norms: layer to the typical norm of the residual stream; layers without one have no bound.
        max_relative_norm: the bound, a multiple of these norms; positive.

    Raises:
        SteeringError: the bound is not a positive number.
    """

    def __init__(self, norms: Mapping[int, float], max_relative_norm: float) -> None:
        if type(max_relative_norm) not in (int, float) or not 0 < max_relative_norm < math.inf:
            raise SteeringError(
                f"max_relative_norm={quoted(max_relative_norm)}: give a positive number, or None "
                "for no bound"
            )
        self._norms = {layer: norm for layer, norm in norms.items() if norm > 0}
        self._most = float(max_relative_norm)
        self._largest: dict[str, tuple[float, int]] = {}

    def check(
        self, category: str, vector: SteeringVector, strength: float, factors: Iterable[float]
    ) -> None:
        """Check the strength of a category.

        Args:
            category: name of the category.
            vector: its vector, always the same for a name.
            strength: the strength.
            factors: the factors of the category's scope.

        Raises:
            SteeringError: the strength times the largest factor is beyond the bound.
        """
        if category not in self._largest:
            self._largest[category] = self._largest_strength(vector)
        largest, layer = self._largest[category]
        factor = max(map(abs, factors), default=1.0)
        if abs(strength) * factor <= largest:
            return
        allowed = math.copysign(_rounded_down(largest / factor), strength)
        times = f", with factors up to {factor:g} in its scope," if factor != 1 else ""
        raise SteeringError(
            f"the strength {strength:g} of {quoted(category)}{times} changes the hidden state of "
            f"layer {layer} by more than {self._most:g} times its typical norm "
            f"({self._norms[layer]:.3g}); the largest strength allowed is {allowed:g} "
            "(max_relative_norm= of the model sets the bound)"
        )

    def _largest_strength(self, vector: SteeringVector) -> tuple[float, int]:
        """Return the largest strength of a vector, and the layer that bounds it."""
        allowed = []
        for layer, rows in zip(vector.layers, vector.prepared, strict=True):
            norm = self._norms.get(layer)
            if norm is not None:
                change = vector.operator.largest_change(rows, norm)
                allowed.append((math.inf if change == 0 else self._most * norm / change, layer))
        return min(allowed, default=(math.inf, 0))


def _rounded_down(value: float) -> float:
    """Return a number of three digits, so that a strength copied from a message is allowed."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit
