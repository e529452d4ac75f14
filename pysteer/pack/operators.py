"""`Operator`: the change of one row of activations by a steering vector, as data.

The native part (csrc/operators) applies the operators by these formulas. h is one row at the
vector's site and layer, d the stored direction, e = d / |d|, and s the strength times the factor of
the scope at that row. A row where s = 0 is not touched.

- `add`: h + s d. Activation addition; the method of arXiv 2410.01174.
- `ablate`: h - s (h.e) e. Directional ablation, arXiv 2406.11717: s = 1 removes the component along
  d, s < 1 part of it. `one_sided`: only where h.e > 0 (asked for in llama.cpp #8060).
- `clamp`: with p = h.e, h + s (clip(p, low, high) - p) e. Brings the projection into a range, or,
  where low equals high, to a value (in the units of the model's activations).
- `rotate`: turns h in the plane of two directions, arXiv 2510.26243 (angular steering) and
  2601.19375 (selective steering). b1 = d1 / |d1|, b2 = d2 made orthonormal to b1, c1 = h.b1,
  c2 = h.b2, a = s angle. The part of h in the plane, c1 b1 + c2 b2, becomes

  - (cos a c1 - sin a c2) b1 + (sin a c1 + cos a c2) b2: turned by a, from b1 towards b2;
  - with `target`, |c| (cos a b1 + sin a b2), |c|^2 = c1^2 + c2^2: brought to the angle a from b1.

  The part outside of the plane stays, and so does the norm of h. s multiplies the angle.
- `low_rank`: h + s U (V^T h), with U and V of shape (n_embd, r). Any linear map of rank r, such as
  the null-space-constrained maps of AlphaSteer, arXiv 2506.07022.

`keep_norm`, with any operator: the row is scaled back to its norm before.

Categories with alike changes at one place share their strength; csrc/shares.hpp has the formula.

Stored per layer, as rows of n_embd values: `add`, `ablate`, `clamp`: d. `rotate`: d1, then d2.
`low_rank`: the r columns of U, then the r columns of V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted


class _Kind(NamedTuple):
    """One kind of operator.

    Attributes:
        rows: number of rows of n_embd values for each layer; None for any even number.
        unit_rows: the native part takes orthonormal rows, not the rows as stored.
        options: the options of this kind alone.
    """

    rows: int | None
    unit_rows: bool
    options: tuple[str, ...] = ()


_KINDS = {
    "add": _Kind(1, unit_rows=False),
    "ablate": _Kind(1, unit_rows=True, options=("one_sided",)),
    "clamp": _Kind(1, unit_rows=True, options=("low", "high")),
    "rotate": _Kind(2, unit_rows=True, options=("angle", "target")),
    "low_rank": _Kind(None, unit_rows=False),
}
_KIND_OF = {option: name for name, kind in _KINDS.items() for option in kind.options}

OPERATORS = tuple(_KINDS)
"""The kinds of operators."""

# The sine of the angle between two directions below which float32 cannot tell their plane from
# rounding.
_PARALLEL = 1e-5


@dataclass(frozen=True)
class Operator:
    """One operator and its options. Immutable; the module has the formulas.

    Attributes:
        kind: one of `OPERATORS`.
        keep_norm: rescale each steered row to its norm before; any kind.
        one_sided: `ablate` only: act only where the projection is positive.
        low: `clamp` only: the smallest projection, in the units of the model's activations; None
            for no bound.
        high: `clamp` only: the largest.
        angle: `rotate` only: radians at strength 1.
        target: `rotate` only: True if `angle` is measured from the first direction, not from h.

    Raises:
        SteeringError: an unknown kind, an option of another kind, `clamp` without low and high or
            with low > high, `rotate` with the angle 0, or a number that is not finite
            in float32.
    """

    kind: str = "add"
    keep_norm: bool = False
    one_sided: bool = False
    low: float | None = None
    high: float | None = None
    angle: float = 0.0
    target: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in OPERATORS:
            raise SteeringError(
                f"unknown operator {quoted(self.kind)}; use one of {', '.join(OPERATORS)}"
            )
        for field in fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise SteeringError(
                        f"{name} of an operator is {quoted(value)}, not True or False"
                    )
            elif value is not None or field.default is not None:
                object.__setattr__(self, name, _number(value, name))
            kind = _KIND_OF.get(name, self.kind)
            if kind != self.kind and getattr(self, name) != field.default:
                raise SteeringError(
                    f"the operator {self.kind} has no {name}; {name} belongs to {kind}"
                )
        if self.kind == "clamp":
            self._check_range()
        if self.kind == "rotate" and self.angle == 0:
            raise SteeringError(
                "the operator rotate needs an angle (in radians) other than 0; "
                "as a target, 2 pi is the first direction itself"
            )

    def _check_range(self) -> None:
        if self.low is None and self.high is None:
            raise SteeringError("the operator clamp needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise SteeringError(
                f"the operator clamp has low {self.low} above high {self.high}; swap them"
            )

    def __str__(self) -> str:
        """Return the operator in short, such as "add" or "clamp, low -1, high 2"."""
        options = {key: value for key, value in self.content().items() if key != "kind"}
        texts = [key if value is True else f"{key} {value:.4g}" for key, value in options.items()]
        return ", ".join([self.kind, *texts])

    @property
    def rows_per_layer(self) -> int | None:
        """Number of rows of n_embd values that each layer needs; None for any even number."""
        return _KINDS[self.kind].rows

    @property
    def takes_unit_rows(self) -> bool:
        """True if `prepare` makes the rows of a layer orthonormal; False if it changes nothing."""
        return _KINDS[self.kind].unit_rows

    def content(self) -> dict[str, Any]:
        """Return the options that differ from the default as JSON data; {} for a plain `add`."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_content(cls, content: object) -> Operator:
        """Return the operator that `content()` describes.

        Raises:
            SteeringError: not a mapping, an unknown option, or as for the class.
        """
        if not isinstance(content, Mapping):
            raise SteeringError(f"{quoted(content)} does not describe an operator")
        known = [field.name for field in fields(cls)]
        for name in content:
            if name not in known:
                raise SteeringError(
                    f"{quoted(name)} is not an option of operators; there are {', '.join(known)}"
                )
        return cls(**content)

    def largest_change(self, rows: npt.NDArray[np.float32], norm: float) -> float:
        """Return the most that strength 1 changes an h with |h| <= `norm`, as an L2 norm.

        Before `keep_norm`, which undoes a change of length. Other strengths change h in proportion.
        0 for `rotate`, which keeps the norm at any strength.

        Args:
            rows: one layer's rows as `prepare` returns them, (rows, n_embd).
            norm: a norm of h.
        """
        if self.kind == "ablate":
            return norm
        if self.kind == "clamp":
            low = -norm if self.low is None else self.low
            high = norm if self.high is None else self.high
            return max(low + norm, norm - high, 0.0)
        if self.kind == "rotate":
            return 0.0
        wide = rows.astype(np.float64)
        return float(np.linalg.norm(wide)) if self.kind == "add" else norm * _spectral_norm(wide)

    def prepare(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return one layer's stored rows as the native part reads them.

        Args:
            rows: shape (rows, n_embd), finite.

        Returns:
            The same shape, float32: for `ablate` and `clamp` unit rows, for `rotate` an orthonormal
            pair, for `add` and `low_rank` the rows unchanged.

        Raises:
            SteeringError: `ablate`, `clamp` or `rotate` with a zero direction, or `rotate` with two
                parallel directions.
        """
        if not self.takes_unit_rows:
            return rows
        basis: list[npt.NDArray[np.float64]] = []
        for row in rows.astype(np.float64):
            length = np.linalg.norm(row)
            if length == 0:
                raise SteeringError(f"cannot {self.kind} along a zero direction")
            unit = row / length
            for other in basis * 2:  # the second pass removes the first one's rounding
                unit = unit - (unit @ other) * other
            left = np.linalg.norm(unit)
            if left < _PARALLEL:
                raise SteeringError(
                    f"cannot {self.kind} in the plane of two parallel directions; give two others"
                )
            basis.append(unit / left)
        return np.stack(basis).astype(np.float32)


def _spectral_norm(rows: npt.NDArray[np.float64]) -> float:
    """Return the largest singular value of U V^T; rows: the columns of U, then those of V."""
    u, v = np.split(rows, 2)
    # U = Q R: the singular values of U V^T are those of the small matrix R_u R_v^T.
    small = np.linalg.qr(u.T)[1] @ np.linalg.qr(v.T)[1].T
    return float(np.linalg.norm(small, 2))


def _number(value: object, name: str) -> float:
    try:
        if isinstance(value, Real) and not isinstance(value, bool):
            with np.errstate(over="ignore"):
                if np.isfinite(np.float32(float(value))):
                    return float(value) + 0.0  # no negative zero: equal operators, equal content
    except OverflowError:
        pass
    raise SteeringError(f"{name} of an operator is {quoted(value)}, not a finite number")


ADD = Operator()
"""Plain addition, as by llama.cpp's control vectors; the default."""
