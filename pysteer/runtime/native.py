"""The pieces of a plan in the native part's own terms."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pysteer import _native
from pysteer.operators import Operator
from pysteer.router import Router
from pysteer.scope import Scope

SITES = dict(_native.Site.__members__)

_END = 2**62  # beyond every position
_LARGEST = float(np.finfo(np.float32).max)


@lru_cache(maxsize=64)
def native_operator(operator: Operator) -> _native.Operator:
    """What csrc/operators applies to a row."""
    return _native.Operator(
        _native.OperatorKind.__members__[operator.kind],
        keep_norm=operator.keep_norm,
        one_sided=operator.one_sided,
        target=operator.target,
        low=-_LARGEST if operator.low is None else operator.low,
        high=_LARGEST if operator.high is None else operator.high,
        angle=operator.angle,
    )


@lru_cache(maxsize=64)
def native_scope(scope: Scope) -> _native.Scope:
    """What csrc/scope gives each token a factor by. Exclusion is not part of it."""
    kind = _native.ScopeKind
    if scope.kind == "all":
        return _native.Scope(kind.all)
    if scope.kind == "prompt":
        return _native.Scope(kind.response, -_END, 1)
    if scope.kind == "response":
        return _native.Scope(kind.response, 0, _END)
    if scope.kind == "first":
        return _native.Scope(kind.response, 0, scope.length)
    if scope.kind == "range":
        return _native.Scope(
            kind.positions, scope.start, _END if scope.stop is None else scope.stop
        )
    if scope.kind == "values":
        return _native.Scope(kind.values, values=list(scope.values))
    return _native.Scope(kind.__members__[scope.kind], 0, scope.length)  # linear, cosine


def native_gate(router: Router, kind: str) -> _native.Gate:
    """What csrc/gate computes the scores of `router.scores(kind, h)` with."""
    none: list[float] = []
    origin = none
    offsets = none
    if kind == "multinomial":
        weights, offsets = router.weight, router.bias.tolist()
    elif kind == "probe":
        weights, offsets = router.probe_weight, router.probe_bias.tolist()
    elif kind == "centroid":
        centroids = router.centroids.astype(np.float64)
        mean = centroids.mean(axis=0)
        weights, origin = centroids[1:] - mean, mean.tolist()
    else:
        conditions = router.conditions.astype(np.float64)
        weights = conditions / np.linalg.norm(conditions, axis=1, keepdims=True)
    return _native.Gate(
        SITES[router.site],
        router.layer,
        _native.GateKind.__members__[kind],
        np.ascontiguousarray(weights, np.float64),
        offsets,
        origin,
    )
