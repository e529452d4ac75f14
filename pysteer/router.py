"""`Router`: what a pack knows to decide, from the hidden state of a prompt, which categories act.

Data and pure functions of it, in numpy; `pysteer.extract.router` fits one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted
from pysteer.formats.gguf import RouterContent
from pysteer.vector import MAX_LAYER, SITES

Floats: TypeAlias = npt.NDArray[np.float64]

POOLINGS = ("last", "prompt", "user")
"""Whose activations are averaged: the last prompt token's, all prompt tokens', or those of the
tokens of the user's message."""

GATES = ("multinomial", "probe", "centroid", "cast")
"""The kinds of gate a router has; `Router.scores` says what each of them looks at."""

_RATES = ("true_positive_rates", "false_positive_rates", "leak_rates")
_TENSORS = {
    "weight": "weight",
    "bias": "bias",
    "probe_weight": "probe.weight",
    "probe_bias": "probe.bias",
    "centroids": "centroids",
    "conditions": "conditions",
}
_RULE = re.compile(r"youden|fpr=[0-9.e+-]{1,24}")
_MOST = 2**53  # the largest count that every JSON reader keeps exact


class _Plain:
    """Equality and copies for frozen dataclasses that hold arrays."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(mine, theirs) for mine, theirs in zip(_of(self), _of(other), strict=True))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Through the constructor: a copy is as read-only as the original.
        return type(self), tuple(
            dict(value) if isinstance(value, Mapping) else value for value in _of(self)
        )


@dataclass(frozen=True, eq=False)
class Gate(_Plain):
    """One kind of gate: a threshold for each of k categories, and how well it did.

    The rates are shares of held-out prompts, of which neither weights nor thresholds know.

    Attributes:
        thresholds: float64 (k,), in the unit of the score that the gate looks at.
        above: bool (k,); True where the gate opens at scores of at least the threshold, False where
            it opens at scores of at most the threshold.
        true_positive_rates: float64 (k,), of the category's own prompts that open its gate.
        false_positive_rates: float64 (k,), of the benign prompts that open it.
        leak_rates: float64 (k,), of the other categories' prompts that open it.

    Raises:
        SteeringError: differing lengths, thresholds that are not finite, rates outside 0 to 1.
    """

    thresholds: Floats
    above: npt.NDArray[np.bool_]
    true_positive_rates: Floats
    false_positive_rates: Floats
    leak_rates: Floats

    def __post_init__(self) -> None:
        above = np.array(_array(self.above, "b", "the sides on which a gate opens"), np.bool_)
        if above.ndim != 1 or above.size == 0:
            raise SteeringError("a gate needs a threshold for each category")
        above.setflags(write=False)
        object.__setattr__(self, "above", above)
        for name in ("thresholds", *_RATES):
            what = f"the {name.replace('_', ' ')} of a gate"
            values = _floats(getattr(self, name), above.shape, what, np.float64)
            if name in _RATES and not ((values >= 0) & (values <= 1)).all():
                raise SteeringError(f"{what} are not between 0 and 1")
            object.__setattr__(self, name, values)

    def opens(self, scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which gates open: bool, of the shape of `scores`, which is (k,) or (n, k)."""
        scores = np.asarray(scores, np.float64)
        return np.where(self.above, scores >= self.thresholds, scores <= self.thresholds)


@dataclass(frozen=True, eq=False)
class Router(_Plain):
    """What tells k categories and benign prompts apart at one layer of the base model.

    Everything looks at one vector h for each prompt: the activations at `site` and `layer`,
    averaged over the prompt tokens that `pooling` names, in the units of the model's activations.
    n is the width n_embd. "Benign" is class 0, category i class i + 1. Immutable.

    Attributes:
        site: where in a block h is taken.
        layer: block index from 0.
        pooling: "last", "prompt" or "user"; see `POOLINGS`.
        categories: the k names; some or all of the pack's.
        weight: float32 (k + 1, n), the multinomial logistic probe: `probabilities`.
        bias: float32 (k + 1,).
        probe_weight: float32 (k, n), one logistic probe for each category, trained against all
            other prompts: `probe_scores`.
        probe_bias: float32 (k,).
        centroids: float32 (k + 1, n), the mean h of each class: `centroid_cosine`.
        conditions: float32 (k, n), the condition vectors of CAST: `condition_similarity`.
        gates: kind of gate (each of `GATES`) to its thresholds and held-out rates.
        confusion: int64 (k + 1, k + 1), held-out prompts by true class (row) and class that the
            multinomial probe finds most probable (column).
        threshold_rule: "youden", or "fpr=0.01" for a benign false-positive rate of at most that.
        train_counts: int64 (k + 1,), prompts of each class that the router was fitted to.
        layer_scores: layer to balanced accuracy of the multinomial probe in cross-validation, for
            the layers that were tried; may be empty.

    Raises:
        SteeringError: parts that do not fit each other, or values that are not finite.
    """

    site: str
    layer: int
    pooling: str
    categories: Sequence[str]
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    probe_weight: npt.NDArray[np.float32]
    probe_bias: npt.NDArray[np.float32]
    centroids: npt.NDArray[np.float32]
    conditions: npt.NDArray[np.float32]
    gates: Mapping[str, Gate]
    confusion: npt.NDArray[np.int64]
    threshold_rule: str
    train_counts: npt.NDArray[np.int64]
    layer_scores: Mapping[int, float]

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise SteeringError(
                f"the router has the unknown site {quoted(self.site)}; use one of {_list(SITES)}"
            )
        if not _is_layer(self.layer):
            raise SteeringError(f"there is no layer {quoted(self.layer)} for the router to look at")
        if self.pooling not in POOLINGS:
            raise SteeringError(
                f"the router has the unknown pooling {quoted(self.pooling)}; "
                f"use one of {_list(POOLINGS)}"
            )
        if not isinstance(self.threshold_rule, str) or not _RULE.fullmatch(self.threshold_rule):
            raise SteeringError(f"unknown threshold rule {quoted(self.threshold_rule)}")
        self._check_categories()
        self._check_arrays()
        self._check_gates()
        self._check_layer_scores()

    def _check_categories(self) -> None:
        names = self.categories
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise SteeringError("a router needs a list of at least one category")
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise SteeringError(f"{quoted(name)} is not a category name")
        if len(set(names)) != len(names):
            raise SteeringError("the router has a category twice")
        object.__setattr__(self, "categories", tuple(names))

    def _check_arrays(self) -> None:
        k = len(self.categories)
        conditions = _array(self.conditions, "fiu", "the router's conditions")
        n = conditions.shape[-1] if conditions.ndim else 0
        shapes = {
            "weight": (k + 1, n),
            "bias": (k + 1,),
            "probe_weight": (k, n),
            "probe_bias": (k,),
            "centroids": (k + 1, n),
            "conditions": (k, n),
        }
        for name, shape in shapes.items():
            what = f"the router's {name.replace('_', ' ')}"
            object.__setattr__(self, name, _floats(getattr(self, name), shape, what, np.float32))
        if not self.conditions.any(axis=1).all():
            raise SteeringError("a condition vector of the router is zero")
        for name, shape in {"confusion": (k + 1, k + 1), "train_counts": (k + 1,)}.items():
            what = "the router's " + name.replace("_", " ")
            counts = np.array(_array(getattr(self, name), "iu", what))
            if counts.shape != shape or not ((counts >= 0) & (counts <= _MOST)).all():
                raise SteeringError(f"{what} are not {shape} counts")
            counts = counts.astype(np.int64)
            counts.setflags(write=False)
            object.__setattr__(self, name, counts)
        if not self.confusion.any(axis=1).all():
            raise SteeringError("the router's confusion has a class without a prompt")

    def _check_gates(self) -> None:
        if not isinstance(self.gates, Mapping) or set(self.gates) != set(GATES):
            raise SteeringError(f"a router needs the gates {_list(GATES)}")
        for kind, gate in self.gates.items():
            if not isinstance(gate, Gate) or len(gate.thresholds) != len(self.categories):
                raise SteeringError(f"the {kind} gate has not one threshold for each category")
        gates = {kind: self.gates[kind] for kind in GATES}
        object.__setattr__(self, "gates", MappingProxyType(gates))

    def _check_layer_scores(self) -> None:
        if not isinstance(self.layer_scores, Mapping):
            raise SteeringError("the router's layer scores are not a mapping")
        for layer, score in self.layer_scores.items():
            number = isinstance(score, (int, float)) and not isinstance(score, bool)
            if not _is_layer(layer) or not number or not 0 <= score <= 1:
                raise SteeringError(
                    f"the router's score of layer {quoted(layer)} is {quoted(score)}"
                )
        scores = {layer: float(score) for layer, score in sorted(self.layer_scores.items())}
        object.__setattr__(self, "layer_scores", MappingProxyType(scores))

    def __repr__(self) -> str:
        return (
            f"Router(site={self.site!r}, layer={self.layer}, pooling={self.pooling!r}, "
            f"categories={quoted(list(self.categories))}, n_embd={self.n_embd})"
        )

    @property
    def n_embd(self) -> int:
        """Width of the hidden state that the router looks at."""
        return int(self.conditions.shape[1])

    @property
    def category_accuracy(self) -> float:
        """Share of the held-out prompts of a category that `probabilities` gives that category."""
        return float(np.trace(self.confusion[1:, 1:]) / self.confusion[1:].sum())

    @property
    def benign_false_positive_rate(self) -> float:
        """Share of the held-out benign prompts that `probabilities` gives some category."""
        return float(self.confusion[0, 1:].sum() / self.confusion[0].sum())

    def probabilities(self, h: npt.ArrayLike) -> Floats:
        """Softmax of W h + b.

        Args:
            h: shape (n,) or (rows, n), any real dtype.

        Returns:
            float64 (k + 1,) or (rows, k + 1), rows that sum to 1, column 0 for benign.

        Raises:
            SteeringError: another width, or values that are not finite; so do all methods below.
        """
        logits = self._rows(h) @ self.weight.T.astype(np.float64) + self.bias
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))

    def probe_scores(self, h: npt.ArrayLike) -> Floats:
        """Log-odds w_c . h + b_c that h belongs to category c, each category for itself.

        Args:
            h: shape (n,) or (rows, n).

        Returns:
            float64 (k,) or (rows, k); 0 is a probability of one half.
        """
        return np.asarray(self._rows(h) @ self.probe_weight.T.astype(np.float64) + self.probe_bias)

    def centroid_cosine(self, h: npt.ArrayLike) -> Floats:
        """Cosine of h - m and m_c - m, with m_c the category's centroid, m the mean of all k + 1.

        Measured from m, because all activations of a layer share a large mean, which leaves cosines
        measured from zero all near 1.

        Args:
            h: shape (n,) or (rows, n).

        Returns:
            float64 (k,) or (rows, k), from -1 to 1; 0 where a length is 0.
        """
        centroids = self.centroids.astype(np.float64)
        origin = centroids.mean(axis=0)
        rows = self._rows(h) - origin
        return np.stack([_cosine(rows, own - origin) for own in centroids[1:]], axis=-1)

    def condition_similarity(self, h: npt.ArrayLike) -> Floats:
        """CAST's condition similarity, cosine(h, tanh((c c^T / c.c) h)), for each condition c.

        Source: arXiv 2409.05907, section 3. Neither the length nor the sign of c matters, so that a
        condition may hold below its threshold as well as above: `Gate.above`.

        Args:
            h: shape (n,) or (rows, n).

        Returns:
            float64 (k,) or (rows, k), from -1 to 1; 0 where a length is 0.
        """
        rows = self._rows(h)
        columns = []
        for c in self.conditions.astype(np.float64):  # one at a time: rows x k x n can be large
            projected = np.multiply.outer(rows @ c / (c @ c), c)
            columns.append(_cosine(rows, np.tanh(projected)))
        return np.stack(columns, axis=-1)

    def scores(self, kind: str, h: npt.ArrayLike) -> Floats:
        """What the gate of that kind looks at, a column for each category.

        "multinomial": the categories' columns of `probabilities`; "probe": `probe_scores`;
        "centroid": `centroid_cosine`; "cast": `condition_similarity`.

        Args:
            kind: one of `GATES`.
            h: shape (n,) or (rows, n).

        Returns:
            float64 (k,) or (rows, k).
        """
        if kind == "multinomial":
            return self.probabilities(h)[..., 1:]
        if kind == "probe":
            return self.probe_scores(h)
        if kind == "centroid":
            return self.centroid_cosine(h)
        if kind == "cast":
            return self.condition_similarity(h)
        raise SteeringError(f"unknown kind of gate {quoted(kind)}; use one of {_list(GATES)}")

    def opens(self, kind: str, h: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which categories' gates of one kind open: bool (k,) or (rows, k)."""
        scores = self.scores(kind, h)
        return self.gates[kind].opens(scores)

    def content(self) -> RouterContent:
        """The router as the plain data that a pack file holds."""
        return RouterContent(
            site=self.site,
            layer=self.layer,
            pooling=self.pooling,
            categories=list(self.categories),
            tensors={tensor: getattr(self, name) for name, tensor in _TENSORS.items()},
            tables={
                "threshold_rule": self.threshold_rule,
                "gates": {
                    kind: {part.name: getattr(gate, part.name).tolist() for part in fields(gate)}
                    for kind, gate in self.gates.items()
                },
                "confusion": self.confusion.tolist(),
                "train_counts": self.train_counts.tolist(),
                "layer_scores": [list(pair) for pair in self.layer_scores.items()],
            },
        )

    @classmethod
    def from_content(cls, content: RouterContent) -> Router:
        """The router that `content` came from.

        Raises:
            SteeringError: the data is not that of a router.
        """
        tables = _object(content.tables, _TABLES, "the router's tables")
        gates = _object(tables["gates"], GATES, "the router's gates")
        parts = tuple(part.name for part in fields(Gate))
        scores = tables["layer_scores"]
        if not isinstance(scores, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and _is_layer(pair[0]) for pair in scores
        ):
            raise SteeringError("the router's layer scores are not pairs of layer and number")
        if len({pair[0] for pair in scores}) != len(scores):
            raise SteeringError("the router's layer scores name a layer twice")
        return cls(
            site=content.site,
            layer=content.layer,
            pooling=content.pooling,
            categories=content.categories,
            gates={
                kind: Gate(**_object(gate, parts, f"the router's {kind} gate"))
                for kind, gate in gates.items()
            },
            confusion=tables["confusion"],
            threshold_rule=tables["threshold_rule"],
            train_counts=tables["train_counts"],
            layer_scores=dict(scores),
            **{name: content.tensors[tensor] for name, tensor in _TENSORS.items()},
        )

    def _rows(self, h: npt.ArrayLike) -> Floats:
        rows = np.asarray(h, np.float64)
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.n_embd:
            raise SteeringError(
                f"the router looks at hidden states of width {self.n_embd}, this has the shape "
                f"{rows.shape}"
            )
        if not np.isfinite(rows).all():
            raise SteeringError("a hidden state to route by holds NaN or infinity")
        return rows


_TABLES = ("threshold_rule", "gates", "confusion", "train_counts", "layer_scores")


def _cosine(a: Floats, b: Floats) -> Floats:
    """Cosine along the last axis; 0 where a length is 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = np.einsum("...i,...i->...", a, b)
    return np.asarray(np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0))


def _array(value: object, kinds: str, what: str) -> npt.NDArray[Any]:
    """`value` as an array whose dtype is of one of the kinds; text, None and objects are not."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        array = np.asarray(None)
    if array.dtype.kind not in kinds:
        raise SteeringError(f"{what} are not an array of the right kind of values")
    return array


def _floats(value: object, shape: tuple[int, ...], what: str, dtype: type) -> npt.NDArray[Any]:
    """A read-only copy of `value`; the right shape, at least one value, all finite."""
    array = _array(value, "fiu", what)
    if array.shape != shape or array.size == 0:
        raise SteeringError(f"{what} have the shape {quoted(array.shape)}, not {shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise SteeringError(f"{what} hold NaN or infinity")
    array = np.ascontiguousarray(array) + dtype(0)  # no negative zeros: equal values, equal bits
    array.setflags(write=False)
    return np.asarray(array)


def _object(value: object, keys: Sequence[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise SteeringError(f"{what} are not an object of {_list(keys)}")
    return value


def _is_layer(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_LAYER


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _of(instance: Any) -> list[Any]:
    return [getattr(instance, part.name) for part in fields(instance)]


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)
