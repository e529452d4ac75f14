"""Conversion of operators, scopes and routers to their native counterparts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pysteer import _native
from pysteer.pack.operators import Operator
from pysteer.pack.router import WEIGHTS, Router
from pysteer.pack.scope import Scope

SITES = dict(_native.Site.__members__)

_END = 2**62  # beyond every position
_LARGEST = float(np.finfo(np.float32).max)


@lru_cache(maxsize=64)
def native_operator(operator: Operator) -> _native.Operator:
    """Return the operator for csrc/operators."""
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
    """Return the scope for csrc/scope, without its exclusion."""
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
    """Return the gate whose scores equal `router.scores(kind, h)`, for csrc/gate."""
    offsets: npt.ArrayLike = ()
    origin: npt.ArrayLike = ()
    allowances: npt.ArrayLike = ()
    weights = np.asarray(getattr(router, WEIGHTS[kind]), np.float64)
    if kind == "margin":
        offsets, allowances = _present(router.margin_bias), _present(router.allowances)
    elif kind == "multinomial":
        offsets = _present(router.bias)
    elif kind == "probe":
        offsets = _present(router.probe_bias)
    elif kind == "centroid":
        mean = weights.mean(axis=0)
        weights, origin = weights[1:] - mean, mean
    else:
        weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    return _native.Gate(
        SITES[router.site],
        [(read.layer, read.pooling != "last") for read in router.reads],
        _native.GateKind.__members__[kind],
        np.ascontiguousarray(weights),
        np.asarray(offsets, np.float64).tolist(),
        np.asarray(origin, np.float64).tolist(),
        np.asarray(allowances, np.float64).tolist(),
    )


def _present(values: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """Return an array that the router has for its kind of gate."""
    assert values is not None
    return values
