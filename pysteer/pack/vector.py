"""`SteeringVector`: a site, an operator, and a direction for each of some layers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from numbers import Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, naming, quoted
from pysteer.formats import gguf
from pysteer.pack.arrays import to_numpy
from pysteer.pack.operators import ADD, Operator

if TYPE_CHECKING:
    import os

SITES = ("residual", "attention", "mlp")
MAX_LAYER = 999_999


class SteeringVector:
    """Directions for some layers of one model, all used by the same operator at the same site.

    Immutable. Arithmetic (`+`, `-`, `*`, `/`, unary `-`) gives new vectors; layers that only one
    operand has count as zero in the other. Arithmetic is for the operator `add` alone, because the
    others do not scale with the length of a direction.

    Args:
        directions: layer (block index from 0, as in `l_out-N`, `direction.N` and transformers'
            `model.layers[N]`) to direction, any real dtype; stored as float32 in the units of the
            model's activations, so that strength 1.0 adds exactly this. Shape (n_embd,); for the
            operators `rotate` and `low_rank` (rows, n_embd), with the same number of rows at every
            layer.
        site: where in a block: "residual" (block output) or "attention" (attention output after
            its projection), or "mlp" (output of the feed-forward part after its projection).
        operator: changes the activations there; `pysteer.pack.operators` has the formulas.

    Raises:
        SteeringError: no layers, an invalid layer, an unknown site, differing widths, a shape that
            the operator cannot use, values that are not finite, or directions that the operator
            cannot act along (zero for `ablate`, `clamp` and `rotate`, two on one line for
            `rotate`).

    Examples:
        >>> import numpy as np
        >>> from pysteer import SteeringVector
        >>> vector = SteeringVector({8: np.ones(4), 9: np.zeros(4)})
        >>> vector
        SteeringVector(site='residual', layers=[8, 9], n_embd=4)
        >>> (0.5 * vector + SteeringVector({9: np.ones(4)})).direction(9)
        array([1., 1., 1., 1.], dtype=float32)
        >>> vector.save("vector.gguf")  # for llama.cpp's --control-vector too
        >>> SteeringVector.load("vector.gguf") == vector
        True
    """

    __slots__ = ("__dict__", "_layers", "_matrix", "_operator", "_site")

    def __init__(
        self,
        directions: Mapping[int, npt.ArrayLike],
        *,
        site: str = "residual",
        operator: Operator = ADD,
    ) -> None:
        if site not in SITES:
            raise SteeringError(f"unknown site {quoted(site)}; use one of {', '.join(SITES)}")
        if not isinstance(operator, Operator):
            raise SteeringError(f"{quoted(operator)} is not a pysteer.pack.operators.Operator")
        if not directions:
            raise SteeringError("a steering vector needs a direction for at least one layer")
        self._site = site
        self._operator = operator
        by_layer = {_layer(layer): direction for layer, direction in directions.items()}
        self._layers = tuple(sorted(by_layer))
        rows = [_row(layer, by_layer[layer]) for layer in self._layers]
        for layer, row in zip(self._layers, rows, strict=True):
            if not _fits(row.shape, operator) or row.shape != rows[0].shape:
                raise SteeringError(
                    f"the direction of layer {layer} has shape {row.shape}, "
                    f"the direction of layer {self._layers[0]} {rows[0].shape}; for the operator "
                    f"{operator.kind} all must be {_shape_for(operator)}"
                )
            if not np.isfinite(row).all():
                raise SteeringError(f"the direction of layer {layer} holds NaN or infinity")
        self._matrix = np.stack(rows)
        self._matrix.setflags(write=False)
        _ = self.prepared  # raises for directions that the operator cannot act along

    @property
    def site(self) -> str:
        """The steered site."""
        return self._site

    @property
    def operator(self) -> Operator:
        """The operator that changes the activations there."""
        return self._operator

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, ascending."""
        return self._layers

    @property
    def n_embd(self) -> int:
        """Width of each direction."""
        return int(self._matrix.shape[-1])

    @property
    def matrix(self) -> npt.NDArray[np.float32]:
        """All directions, float32, C-contiguous, read-only.

        Shape (len(layers), n_embd), or (len(layers), rows, n_embd) for `rotate` and `low_rank`.
        """
        return self._matrix

    @cached_property
    def prepared(self) -> npt.NDArray[np.float32]:
        """The rows that the native part reads: `matrix` in shape (len(layers), rows, n_embd).

        The directions themselves for `add` and `low_rank`, unit vectors for `ablate` and `clamp`,
        orthonormal pairs for `rotate`.
        """
        stored = self._matrix.reshape(len(self._layers), -1, self.n_embd)
        if not self._operator.takes_unit_rows:
            return stored
        rows = []
        for layer, of_layer in zip(self._layers, stored, strict=True):
            try:
                rows.append(self._operator.prepare(of_layer))
            except SteeringError as error:
                raise SteeringError(f"layer {layer}: {error}") from None
        prepared = np.stack(rows)
        prepared.setflags(write=False)
        return prepared

    @cached_property
    def layer_indices(self) -> npt.NDArray[np.int32]:
        """The layers as an array, shape (len(layers),), for the native part."""
        return np.asarray(self._layers, np.int32)

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of all that `==` compares: equal for equal vectors, in any process."""
        content = self._operator.content()
        operator = f" {json.dumps(content, sort_keys=True)}" if content else ""
        sha = hashlib.sha256(f"{self._site} {self._layers} {self.n_embd}{operator}".encode())
        sha.update(self._matrix.astype("<f4", copy=False).tobytes())
        return sha.hexdigest()

    def direction(self, layer: int) -> npt.NDArray[np.float32]:
        """Return the direction of one layer, read-only; KeyError for a layer without one.

        Shape (n_embd,), or (rows, n_embd) for `rotate` and `low_rank`.
        """
        if layer not in self._layers:
            raise KeyError(layer)
        row: npt.NDArray[np.float32] = self._matrix[self._layers.index(layer)]
        return row

    def items(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Return pairs of layer and direction, by ascending layer."""
        return zip(self._layers, self._matrix, strict=True)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        model_hint: str = "unknown",
        overwrite: bool = False,
    ) -> None:
        """Write a file that llama.cpp's `--control-vector` accepts.

        Args:
            path: the file; its name ends in .gguf. Replaced in one step, so that a failure leaves
                an older file whole.
            model_hint: the base model's architecture, kept as `controlvector.model_hint`.
            overwrite: replace any older file; otherwise packs, and control vectors by pysteer.

        Raises:
            SteeringError: the file cannot be written, or `model_hint` is empty; layer 0, which
                llama.cpp refuses; or another site than the residual stream, or another operator
                than plain addition, which llama.cpp would ignore. Save these vectors in a
                `SteeringPack`.
        """
        if not isinstance(model_hint, str) or not model_hint.strip():
            raise SteeringError(
                f"model_hint is {quoted(model_hint)}; give the architecture of the base model, "
                "such as 'llama', or leave the argument out"
            )
        if self.operator != ADD:
            raise SteeringError(
                f"llama.cpp would simply add a vector whose operator is {str(self.operator)!r}; "
                "save it in a SteeringPack"
            )
        if self.site != "residual":
            raise SteeringError(
                f"llama.cpp would add a vector of site {self.site!r} to the residual stream; "
                "save it in a SteeringPack"
            )
        if self.layers[0] == 0:
            raise SteeringError(
                "llama.cpp refuses control vectors with a direction for layer 0; "
                "leave that layer out, or save the vector in a SteeringPack"
            )
        from pysteer.formats import gguf_writer  # with the gguf package, and so with YAML

        gguf_writer.write_vector(
            Path(path), dict(self.items()), model_hint=model_hint, overwrite=overwrite
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Read a llama.cpp control-vector file.

        Raises:
            FormatError: the file is not a well-formed control vector.
        """
        path = Path(path)
        directions = gguf.read_vector(path)
        with naming(path):
            return cls(directions)

    def _check_arithmetic(self) -> None:
        if self._operator.kind != "add":
            raise SteeringError(
                f"arithmetic needs the operator add; the operator {self._operator.kind} does not "
                "scale with its directions: change the strength instead"
            )

    def _combine(self, other: SteeringVector, sign: float) -> SteeringVector:
        for operand in (self, other):
            operand._check_arithmetic()
        if self.operator != other.operator:
            raise SteeringError("cannot combine a vector with keep_norm and a vector without")
        if self.site != other.site or self.n_embd != other.n_embd:
            raise SteeringError(
                f"cannot combine a vector of site {self.site}, width {self.n_embd} "
                f"with a vector of site {other.site}, width {other.n_embd}"
            )
        total = dict(self.items())
        with np.errstate(over="ignore"):  # the constructor raises for an overflow
            for layer, row in other.items():
                total[layer] = total.get(layer, np.zeros(self.n_embd, np.float32)) + sign * row
        return SteeringVector(total, site=self.site, operator=self.operator)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._combine(other, 1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._combine(other, -1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __mul__(self, factor: float) -> SteeringVector:
        if not isinstance(factor, Real):
            return NotImplemented
        self._check_arithmetic()
        with np.errstate(over="ignore"):  # the constructor raises for an overflow
            scale = np.float32(finite(factor, "scale a steering vector by a finite number"))
            scaled = {layer: scale * row for layer, row in self.items()}
        return SteeringVector(scaled, site=self.site, operator=self.operator)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise SteeringError("cannot divide a steering vector by 0")
        return self * (1.0 / finite(divisor, "divide a steering vector by a finite number"))

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return (
            self.site == other.site
            and self.operator == other.operator
            and self.layers == other.layers
            and np.array_equal(self.matrix, other.matrix)
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[object, ...]:
        # Through the constructor, so that a copy is as read-only as the original.
        return _restore, (dict(self.items()), self.site, self.operator)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self._layers[:4])) + (", ..." if len(self._layers) > 4 else "")
        operator = f"operator={str(self._operator)!r}, " if self._operator != ADD else ""
        return (
            f"SteeringVector(site={self._site!r}, {operator}"
            f"layers=[{layers}], n_embd={self.n_embd})"
        )


def finite(value: Real | float, otherwise: str) -> float:
    """Return `value` as a float; SteeringError with `otherwise` if it is not finite."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise SteeringError(f"{number} is not finite; {otherwise}")
    return number


def _layer(layer: object) -> int:
    try:
        number = index(layer)  # type: ignore[arg-type]
    except TypeError:
        raise SteeringError(f"layer {quoted(layer)} is not an integer") from None
    if number < 0:
        raise SteeringError(f"layer {quoted(number)} is negative; layers count from 0")
    if number > MAX_LAYER:
        raise SteeringError(f"layer {quoted(number)} is above {MAX_LAYER}, the highest allowed")
    return number


def _fits(shape: tuple[int, ...], operator: Operator) -> bool:
    rows = operator.rows_per_layer
    if 0 in shape:
        return False
    if rows == 1:
        return len(shape) == 1
    return len(shape) == 2 and (shape[0] == rows if rows is not None else shape[0] % 2 == 0)


def _shape_for(operator: Operator) -> str:
    rows = operator.rows_per_layer
    if rows == 1:
        return "(n_embd,)"
    return f"({rows}, n_embd)" if rows is not None else "(2 r, n_embd): r columns of U, then r of V"


def _row(layer: int, direction: npt.ArrayLike) -> npt.NDArray[np.float32]:
    what = f"the direction of layer {layer} is"
    try:
        array = to_numpy(direction)
        if array.dtype.kind not in "biufO":
            raise SteeringError(f"{what} an array of type {array.dtype}, not of real numbers")
        with np.errstate(over="ignore", invalid="ignore"):  # the constructor checks
            # Plus zero: no negative zeros, so that equal vectors have equal bits.
            return np.asarray(array, dtype=np.float32) + np.float32(0)
    except SteeringError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise SteeringError(f"{what} not an array of numbers") from None


def _restore(
    directions: Mapping[int, npt.ArrayLike], site: str, operator: Operator
) -> SteeringVector:
    return SteeringVector(directions, site=site, operator=operator)
