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
from pysteer.pack.vector import MAX_LAYER, SITES

Floats: TypeAlias = npt.NDArray[np.float64]

POOLINGS = ("last", "prompt", "user", "suffix")
"""Whose activations are averaged: the last prompt token's, all prompt tokens', those of the tokens
of the user's message, or those of what follows it up to the end of the prompt, which the chat
template puts there. Where the message cannot be found, "user" is the whole prompt; where nothing
follows it, "suffix" is the last token."""

GATES = ("margin", "multinomial", "probe", "centroid", "cast")
"""The kinds of gate that a router can have; `Router.scores` says what each of them looks at."""

CLASSIFIERS = ("margin", "multinomial")
"""Those that give each prompt one class, of which a router needs one."""

_RATES = ("true_positive_rates", "false_positive_rates", "leak_rates")
_ARRAYS = {
    "margin": ("margin_weight", "margin_bias", "allowances"),
    "multinomial": ("weight", "bias"),
    "probe": ("probe_weight", "probe_bias"),
    "centroid": ("centroids",),
    "cast": ("conditions",),
}
"""Kind of gate to the arrays of a router that it looks by."""

WEIGHTS = {kind: names[0] for kind, names in _ARRAYS.items()}
"""Kind of gate to the name of its matrix of width w."""

_TENSORS = {
    "margin_weight": "margin.weight",
    "margin_bias": "margin.bias",
    "allowances": "allowances",
    "weight": "weight",
    "bias": "bias",
    "probe_weight": "probe.weight",
    "probe_bias": "probe.bias",
    "centroids": "centroids",
    "conditions": "conditions",
}
_RULE = re.compile(r"(youden|fpr=[0-9.e+-]{1,24})(, margin fpr=[0-9.e+-]{1,24})?")
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


@dataclass(frozen=True)
class Read:
    """Where a router looks: a layer, and the tokens whose activations are averaged there.

    Attributes:
        layer: block index from 0.
        pooling: one of `POOLINGS`.

    Raises:
        SteeringError: there is no such layer or pooling.
    """

    layer: int
    pooling: str

    def __post_init__(self) -> None:
        if not _is_layer(self.layer):
            raise SteeringError(f"there is no layer {quoted(self.layer)} for the router to look at")
        if self.pooling not in POOLINGS:
            raise SteeringError(
                f"the router has the unknown pooling {quoted(self.pooling)}; "
                f"use one of {_list(POOLINGS)}"
            )


@dataclass(frozen=True, eq=False)
class Router(_Plain):
    """What tells k categories and benign prompts apart in the base model's activations.

    Everything looks at one vector h for each prompt: for each of `reads` the activations at `site`
    and its layer, averaged over the prompt tokens that its pooling names, in the units of the
    model's activations; all of them laid end to end, in the order of the reads. w is its width,
    len(reads) * n_embd. "Benign" is class 0, category i class i + 1. Immutable.

    The arrays of a kind of gate are there if `gates` has the kind, and None otherwise.

    Attributes:
        site: where in a block h is taken.
        reads: at which layers, over which tokens; at least one, none twice.
        categories: the k names; some or all of the pack's.
        gates: kind of gate (some of `GATES`, one of `CLASSIFIERS` among them) to its thresholds and
            held-out rates.
        confusion: int64 (k + 1, k + 1), held-out prompts by true class (row) and class that
            `classes` finds (column).
        threshold_rule: "youden", or "fpr=0.01" for a benign false-positive rate of at most that;
            followed by ", margin fpr=0.005" where the margin gate's is another.
        train_counts: int64 (k + 1,), prompts of each class that the router was fitted to.
        margin_weight: float32 (k + 1, w), one linear map: how harmless h is, and how much of each
            category: `margin_scores`.
        margin_bias: float32 (k + 1,).
        allowances: float32 (k,), at least 0: by how much a category may fall behind another.
        weight: float32 (k + 1, w), the multinomial logistic probe: `probabilities`.
        bias: float32 (k + 1,).
        probe_weight: float32 (k, w), one logistic probe for each category, trained against all
            other prompts: `probe_scores`.
        probe_bias: float32 (k,).
        centroids: float32 (k + 1, w), the mean h of each class: `centroid_cosine`.
        conditions: float32 (k, w), the condition vectors of CAST: `condition_similarity`.

    Raises:
        SteeringError: parts that do not fit each other, or values that are not finite.
    """

    site: str
    reads: Sequence[Read]
    categories: Sequence[str]
    gates: Mapping[str, Gate]
    confusion: npt.NDArray[np.int64]
    threshold_rule: str
    train_counts: npt.NDArray[np.int64]
    margin_weight: npt.NDArray[np.float32] | None = None
    margin_bias: npt.NDArray[np.float32] | None = None
    allowances: npt.NDArray[np.float32] | None = None
    weight: npt.NDArray[np.float32] | None = None
    bias: npt.NDArray[np.float32] | None = None
    probe_weight: npt.NDArray[np.float32] | None = None
    probe_bias: npt.NDArray[np.float32] | None = None
    centroids: npt.NDArray[np.float32] | None = None
    conditions: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise SteeringError(
                f"the router has the unknown site {quoted(self.site)}; use one of {_list(SITES)}"
            )
        if not isinstance(self.threshold_rule, str) or not _RULE.fullmatch(self.threshold_rule):
            raise SteeringError(f"unknown threshold rule {quoted(self.threshold_rule)}")
        self._check_reads()
        self._check_categories()
        self._check_gates()
        self._check_arrays()
        self._check_counts()

    def _check_reads(self) -> None:
        reads = self.reads
        if isinstance(reads, str) or not isinstance(reads, Sequence) or not reads:
            raise SteeringError("a router needs a list of at least one place to look at")
        for read in reads:
            if not isinstance(read, Read):
                raise SteeringError(f"{quoted(read)} is not a pysteer.pack.router.Read")
        if len(set(reads)) != len(reads):
            raise SteeringError("the router looks at the same tokens of a layer twice")
        object.__setattr__(self, "reads", tuple(reads))

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
        of_classes = ("margin_weight", "margin_bias", "weight", "bias", "centroids")
        flat = ("margin_bias", "allowances", "bias", "probe_bias")
        width: int | None = None
        for kind, names in _ARRAYS.items():
            for name in names:
                what = f"the router's {name.replace('_', ' ')}"
                value = getattr(self, name)
                if (value is not None) != (kind in self.gates):
                    there = "are missing" if value is None else "belong to a gate that it lacks"
                    raise SteeringError(f"{what} {there}")
                if value is None:
                    continue
                if name not in flat and width is None:
                    width = (np.shape(_array(value, "fiu", what)) or (0,))[-1]
                n_rows = k + 1 if name in of_classes else k
                shape = (n_rows,) if name in flat else (n_rows, width or 0)
                object.__setattr__(self, name, _floats(value, shape, what, np.float32))
        if not width or width % len(self.reads):
            raise SteeringError(
                f"the router's weights have width {width}, which {len(self.reads)} places of the "
                "same width do not make"
            )
        if self.conditions is not None and not self.conditions.any(axis=1).all():
            raise SteeringError("a condition vector of the router is zero")
        if self.allowances is not None and not (self.allowances >= 0).all():
            raise SteeringError("an allowance of the router is negative")

    def _check_counts(self) -> None:
        k = len(self.categories)
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
        if not isinstance(self.gates, Mapping) or not set(self.gates) & set(CLASSIFIERS):
            raise SteeringError(f"a router needs a gate that is one of {_list(CLASSIFIERS)}")
        for kind, gate in self.gates.items():
            if kind not in GATES:
                raise SteeringError(
                    f"unknown kind of gate {quoted(kind)}; use some of {_list(GATES)}"
                )
            if not isinstance(gate, Gate) or len(gate.thresholds) != len(self.categories):
                raise SteeringError(f"the {kind} gate has not one threshold for each category")
        gates = {kind: self.gates[kind] for kind in GATES if kind in self.gates}
        object.__setattr__(self, "gates", MappingProxyType(gates))

    def __repr__(self) -> str:
        where = ", ".join(f"{read.layer} {read.pooling}" for read in self.reads)
        return (
            f"Router(site={self.site!r}, reads=[{where}], gates={list(self.gates)}, "
            f"categories={quoted(list(self.categories))}, n_embd={self.n_embd})"
        )

    @property
    def width(self) -> int:
        """Width of h, what the router looks at."""
        kind = next(iter(self.gates))
        return int(getattr(self, WEIGHTS[kind]).shape[1])

    @property
    def n_embd(self) -> int:
        """Width of the model's activations."""
        return self.width // len(self.reads)

    @property
    def last_layer(self) -> int:
        """The highest layer that is looked at, where the router can decide."""
        return max(read.layer for read in self.reads)

    @property
    def category_accuracy(self) -> float:
        """Share of the held-out prompts of a category that `classes` gives that category."""
        return float(np.trace(self.confusion[1:, 1:]) / self.confusion[1:].sum())

    @property
    def benign_false_positive_rate(self) -> float:
        """Share of the held-out benign prompts that `classes` gives some category."""
        return float(self.confusion[0, 1:].sum() / self.confusion[0].sum())

    def classes(self, h: npt.ArrayLike) -> npt.NDArray[np.intp]:
        """The class of each hidden state: 0 for benign, i + 1 for category i.

        By the margin gate, if the router has one: benign where there is no harm, else the category
        that is ahead. Otherwise the most probable one by the multinomial probe.

        Args:
            h: shape (w,) or (rows, w).

        Returns:
            Integers of shape () or (rows,).
        """
        if self.margin_weight is None:
            return np.asarray(self.probabilities(h).argmax(axis=-1))
        r = self._linear(h)
        return np.where(r[..., 0] > 0, 0, 1 + r[..., 1:].argmax(axis=-1))

    def margin_scores(self, h: npt.ArrayLike) -> Floats:
        """The lesser of how harmful h is, and how far each category is ahead of all others.

        With r = W h + b, harm is -r_0, negative for what is benign, and the lead of category c is
        r_c minus the largest r of the other categories; 0 if there is no other. The score is
        min(harm, lead + allowance): a category's gate opens at 0 for prompts that are harmful and
        no further from the category than its allowance. As allowances are not negative, that of the
        best category opens for every harmful prompt.

        Args:
            h: shape (w,) or (rows, w).

        Returns:
            float64 (k,) or (rows, k).
        """
        r = self._linear(h)
        return np.minimum(-r[..., :1], self._leads(r))

    def ranks(self, kind: str, h: npt.ArrayLike) -> Floats:
        """What several open gates are compared by: `scores`, but for the margin gate.

        There it is lead + allowance, because the scores of all open gates are the harm, if that is
        the lesser.
        """
        return self._leads(self._linear(h)) if kind == "margin" else self.scores(kind, h)

    def _linear(self, h: npt.ArrayLike) -> Floats:
        weight, bias = self._array("margin_weight"), self._array("margin_bias")
        return np.asarray(self._rows(h) @ weight.T + bias)

    def _leads(self, r: Floats) -> Floats:
        """Lead plus allowance of each category."""
        r = r[..., 1:]
        leads = np.zeros_like(r)
        if r.shape[-1] > 1:
            ordered = np.sort(r, axis=-1)
            largest, second = ordered[..., -1:], ordered[..., -2:-1]
            leads = r - np.where(r == largest, second, largest)
        return np.asarray(leads + self._array("allowances"))

    def _array(self, name: str) -> Floats:
        """One of the arrays as float64.

        Raises:
            SteeringError: the router does not have that kind of gate.
        """
        values = getattr(self, name)
        if values is None:
            kind = next(kind for kind, names in _ARRAYS.items() if name in names)
            raise SteeringError(f"the router has no {kind} gate; it has {_list(list(self.gates))}")
        return np.asarray(values, np.float64)

    def probabilities(self, h: npt.ArrayLike) -> Floats:
        """Softmax of W h + b.

        Args:
            h: shape (w,) or (rows, w), any real dtype.

        Returns:
            float64 (k + 1,) or (rows, k + 1), rows that sum to 1, column 0 for benign.

        Raises:
            SteeringError: another width, values that are not finite, or the router does not have
                that kind of gate; so do all methods here.
        """
        logits = self._rows(h) @ self._array("weight").T + self._array("bias")
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))

    def probe_scores(self, h: npt.ArrayLike) -> Floats:
        """Log-odds w_c . h + b_c that h belongs to category c, each category for itself.

        Args:
            h: shape (w,) or (rows, w).

        Returns:
            float64 (k,) or (rows, k); 0 is a probability of one half.
        """
        weight, bias = self._array("probe_weight"), self._array("probe_bias")
        return np.asarray(self._rows(h) @ weight.T + bias)

    def centroid_cosine(self, h: npt.ArrayLike) -> Floats:
        """Cosine of h - m and m_c - m, with m_c the category's centroid, m the mean of all k + 1.

        Measured from m, because all activations of a layer share a large mean, which leaves cosines
        measured from zero all near 1.

        Args:
            h: shape (w,) or (rows, w).

        Returns:
            float64 (k,) or (rows, k), from -1 to 1; 0 where a length is 0.
        """
        centroids = self._array("centroids")
        origin = centroids.mean(axis=0)
        rows = self._rows(h) - origin
        return np.stack([_cosine(rows, own - origin) for own in centroids[1:]], axis=-1)

    def condition_similarity(self, h: npt.ArrayLike) -> Floats:
        """CAST's condition similarity, cosine(h, tanh((c c^T / c.c) h)), for each condition c.

        Source: arXiv 2409.05907, section 3. Neither the length nor the sign of c matters, so that a
        condition may hold below its threshold as well as above: `Gate.above`.

        Args:
            h: shape (w,) or (rows, w).

        Returns:
            float64 (k,) or (rows, k), from -1 to 1; 0 where a length is 0.
        """
        rows = self._rows(h)
        columns = []
        for c in self._array("conditions"):  # one at a time: rows x k x w can be large
            projected = np.multiply.outer(rows @ c / (c @ c), c)
            columns.append(_cosine(rows, np.tanh(projected)))
        return np.stack(columns, axis=-1)

    def scores(self, kind: str, h: npt.ArrayLike) -> Floats:
        """What the gate of that kind looks at, a column for each category.

        "margin": `margin_scores`; "multinomial": the categories' columns of `probabilities`;
        "probe": `probe_scores`; "centroid": `centroid_cosine`; "cast": `condition_similarity`.

        Args:
            kind: one of `GATES` that the router has.
            h: shape (w,) or (rows, w).

        Returns:
            float64 (k,) or (rows, k).
        """
        if kind == "margin":
            return self.margin_scores(h)
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
            layers=[read.layer for read in self.reads],
            poolings=[read.pooling for read in self.reads],
            categories=list(self.categories),
            tensors={
                tensor: getattr(self, name)
                for name, tensor in _TENSORS.items()
                if getattr(self, name) is not None
            },
            tables={
                "threshold_rule": self.threshold_rule,
                "gates": {
                    kind: {part.name: getattr(gate, part.name).tolist() for part in fields(gate)}
                    for kind, gate in self.gates.items()
                },
                "confusion": self.confusion.tolist(),
                "train_counts": self.train_counts.tolist(),
            },
        )

    @classmethod
    def from_content(cls, content: RouterContent) -> Router:
        """The router that `content` came from.

        Raises:
            SteeringError: the data is not that of a router.
        """
        tables = _object(content.tables, _TABLES, "the router's tables")
        gates = tables["gates"]
        if not isinstance(gates, dict):
            raise SteeringError("the router's gates are not an object")
        parts = tuple(part.name for part in fields(Gate))
        return cls(
            site=content.site,
            reads=[
                Read(layer, pooling)
                for layer, pooling in zip(content.layers, content.poolings, strict=True)
            ],
            categories=content.categories,
            gates={
                kind: Gate(**_object(gate, parts, f"the router's gate {quoted(kind)}"))
                for kind, gate in gates.items()
            },
            confusion=tables["confusion"],
            threshold_rule=tables["threshold_rule"],
            train_counts=tables["train_counts"],
            **{name: content.tensors.get(tensor) for name, tensor in _TENSORS.items()},
        )

    def _rows(self, h: npt.ArrayLike) -> Floats:
        rows = np.asarray(h, np.float64)
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.width:
            raise SteeringError(
                f"the router looks at hidden states of width {self.width}, this has the shape "
                f"{rows.shape}"
            )
        if not np.isfinite(rows).all():
            raise SteeringError("a hidden state to route by holds NaN or infinity")
        return rows


_TABLES = ("threshold_rule", "gates", "confusion", "train_counts")


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
