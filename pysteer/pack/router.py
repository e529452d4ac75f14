"""`Router`: decides from the hidden state of a prompt the categories that act.

Data, and pure functions of the data in numpy; `pysteer.extract.routers` fits a router.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.category import check_category
from pysteer.errors import SteeringError, quoted
from pysteer.formats.gguf import RouterContent
from pysteer.pack import gate_scores
from pysteer.pack.arrays import ArrayData, Floats, as_array, as_counts, as_floats
from pysteer.pack.vector import MAX_LAYER, SITES

POOLINGS = ("last", "prompt", "user", "suffix")
"""The tokens whose activations are averaged.

"last": the last prompt token. "prompt": all prompt tokens. "user": the tokens of the user's
message; the whole prompt where the message cannot be found. "suffix": the tokens that the chat
template puts behind the user's message; the last token where nothing follows the message.
"""

GATES = ("margin", "multinomial", "probe", "centroid", "cast")
"""The kinds of gate; `Router.scores` has their scores."""

CLASSIFIERS = ("margin", "multinomial")
"""The kinds of gate that give each prompt one class. A router needs at least one of them."""

_RATES = ("true_positive_rates", "false_positive_rates", "leak_rates")
_ARRAYS = {
    "margin": ("margin_weight", "margin_bias", "allowances"),
    "multinomial": ("weight", "bias"),
    "probe": ("probe_weight", "probe_bias"),
    "centroid": ("centroids",),
    "cast": ("conditions",),
}
"""Kind of gate to the router's arrays for it."""

_OF_CLASSES = ("margin_weight", "margin_bias", "weight", "bias", "centroids")  # k + 1 rows, not k
_FLAT = ("margin_bias", "allowances", "bias", "probe_bias")  # without an axis of width w

WEIGHTS = {kind: names[0] for kind, names in _ARRAYS.items()}
"""Kind of gate to the name of its matrix of width w."""

_TENSORS = {name.replace("_", "."): name for names in _ARRAYS.values() for name in names}
"""Tensor of a pack file, without `router.`, to array."""

_TABLES = ("threshold_rule", "gates", "confusion", "train_counts")
_RULE = re.compile(r"(youden|fpr=[0-9.e+-]{1,24})(, margin fpr=[0-9.e+-]{1,24})?")


@dataclass(frozen=True, eq=False)
class Gate(ArrayData):
    """One kind of gate: a threshold for each of k categories, with its held-out rates.

    The rates are shares of prompts that neither weights nor thresholds were fitted to.

    Attributes:
        thresholds: float64 (k,), in the unit of the gate's score.
        above: bool (k,); True where the gate opens at scores of at least the threshold, False where
            it opens at scores of at most the threshold.
        true_positive_rates: float64 (k,), of the category's own prompts that open its gate.
        false_positive_rates: float64 (k,), of benign prompts that open the gate.
        leak_rates: float64 (k,), of other categories' prompts that open the gate.

    Raises:
        SteeringError: differing lengths, thresholds that are not finite, rates outside 0 to 1.
    """

    thresholds: Floats
    above: npt.NDArray[np.bool_]
    true_positive_rates: Floats
    false_positive_rates: Floats
    leak_rates: Floats

    def __post_init__(self) -> None:
        above = np.array(as_array(self.above, "b", "the sides on which a gate opens"), np.bool_)
        if above.ndim != 1 or above.size == 0:
            raise SteeringError("a gate needs a threshold for each category")
        above.setflags(write=False)
        object.__setattr__(self, "above", above)
        for name in ("thresholds", *_RATES):
            what = f"the {name.replace('_', ' ')} of a gate"
            values = as_floats(getattr(self, name), above.shape, what, np.float64)
            if name in _RATES and not ((values >= 0) & (values <= 1)).all():
                raise SteeringError(f"{what} are not between 0 and 1")
            object.__setattr__(self, name, values)

    def opens(self, scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return the gates that open: bool, of the shape of `scores`, which is (k,) or (n, k)."""
        scores = np.asarray(scores, np.float64)
        return np.where(self.above, scores >= self.thresholds, scores <= self.thresholds)


@dataclass(frozen=True)
class Read:
    """One place that a router reads: a layer, and the tokens to average over.

    Attributes:
        layer: block index from 0.
        pooling: one of `POOLINGS`.

    Raises:
        SteeringError: an invalid layer, or an unknown pooling.
    """

    layer: int
    pooling: str

    def __post_init__(self) -> None:
        if type(self.layer) is not int or not 0 <= self.layer <= MAX_LAYER:
            raise SteeringError(f"the router reads the invalid layer {quoted(self.layer)}")
        if self.pooling not in POOLINGS:
            raise SteeringError(
                f"the router has the unknown pooling {quoted(self.pooling)}; "
                f"use one of {', '.join(POOLINGS)}"
            )


@dataclass(frozen=True, eq=False)
class Router(ArrayData):
    """Tells k categories and benign prompts apart in the base model's activations. Immutable.

    All gates score one vector h for each prompt. h is the concatenation of the reads, in their
    order: each read is the activations at `site` and the read's layer, averaged over the prompt
    tokens of the read's pooling, in the units of the model's activations. The width of h is
    w = len(reads) * n_embd. "Benign" is class 0, category i is class i + 1.

    The arrays of a kind of gate are there if `gates` has the kind, and None otherwise.

    Methods take h of shape (w,) or (rows, w) and any real dtype; the results have the shape (k,)
    or (rows, k) unless a method says otherwise. They raise a SteeringError for another width, for
    values that are not finite, and for a kind of gate that the router does not have.

    Attributes:
        site: where in a block h is taken.
        reads: layers and tokens; at least one read, no read twice.
        categories: the k names; some or all of the pack's.
        gates: kind of gate (some of `GATES`, one of `CLASSIFIERS` among them) to its thresholds and
            held-out rates.
        confusion: int64 (k + 1, k + 1), held-out prompts by true class (row) and class that
            `classes` finds (column).
        threshold_rule: "youden", or "fpr=0.01" for a benign false-positive rate of at most 0.01;
            followed by ", margin fpr=0.005" where the margin gate has another.
        train_counts: int64 (k + 1,), prompts of each class that the router was fitted to.
        margin_weight: float32 (k + 1, w), one linear map to harmlessness and to each category:
            `margin_scores`.
        margin_bias: float32 (k + 1,).
        allowances: float32 (k,), at least 0: the distance that a category may fall behind another.
        weight: float32 (k + 1, w), the multinomial logistic probe: `probabilities`.
        bias: float32 (k + 1,).
        probe_weight: float32 (k, w), one logistic probe for each category, trained against all
            other prompts: `probe_scores`.
        probe_bias: float32 (k,).
        centroids: float32 (k + 1, w), the mean h of each class: `centroid_cosine`.
        conditions: float32 (k, w), the condition vectors of CAST: `condition_similarity`.

    Raises:
        SteeringError: parts that do not fit each other, or values that are not finite.

    Examples:
        A router that finds one category in the first value of h and harmless prompts in the second:

        >>> import numpy as np
        >>> from pysteer.pack.router import Gate, Read, Router
        >>> half = np.array([0.5])
        >>> router = Router(
        ...     site="residual",
        ...     reads=[Read(layer=3, pooling="last")],
        ...     categories=["malware"],
        ...     gates={"multinomial": Gate(half, half > 0, half, half, half)},
        ...     confusion=np.eye(2, dtype=int),
        ...     threshold_rule="youden",
        ...     train_counts=[10, 10],
        ...     weight=[[0.0, 1.0], [1.0, 0.0]],
        ...     bias=[0.0, 0.0],
        ... )
        >>> router.scores("multinomial", [[3.0, 0.0], [0.0, 3.0]]).round(2)
        array([[0.95],
               [0.05]])
        >>> router.opens("multinomial", [3.0, 0.0])
        array([ True])
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
                f"the router has the unknown site {quoted(self.site)}; "
                f"use one of {', '.join(SITES)}"
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
            raise SteeringError("a router needs a list of at least one read")
        for read in reads:
            if not isinstance(read, Read):
                raise SteeringError(f"{quoted(read)} is not a pysteer.pack.router.Read")
        if len(set(reads)) != len(reads):
            raise SteeringError("the router reads the same tokens of a layer twice")
        object.__setattr__(self, "reads", tuple(reads))

    def _check_categories(self) -> None:
        names = self.categories
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise SteeringError("a router needs a list of at least one category")
        for name in names:
            check_category(name)
        if len(set(names)) != len(names):
            raise SteeringError("the router has a category twice")
        object.__setattr__(self, "categories", tuple(names))

    def _check_gates(self) -> None:
        if not isinstance(self.gates, Mapping) or not set(self.gates) & set(CLASSIFIERS):
            raise SteeringError(f"a router needs a gate that is one of {', '.join(CLASSIFIERS)}")
        for kind, gate in self.gates.items():
            if kind not in GATES:
                raise SteeringError(
                    f"unknown kind of gate {quoted(kind)}; use some of {', '.join(GATES)}"
                )
            if not isinstance(gate, Gate) or len(gate.thresholds) != len(self.categories):
                raise SteeringError(f"the {kind} gate needs one threshold for each category")
        gates = {kind: self.gates[kind] for kind in GATES if kind in self.gates}
        object.__setattr__(self, "gates", MappingProxyType(gates))

    def _check_arrays(self) -> None:
        k = len(self.categories)
        width: int | None = None
        for kind, names in _ARRAYS.items():
            for name in names:
                what = f"the router's {name.replace('_', ' ')}"
                value = getattr(self, name)
                if (value is not None) != (kind in self.gates):
                    fault = "are missing" if value is None else "belong to a gate that it lacks"
                    raise SteeringError(f"{what} {fault}")
                if value is None:
                    continue
                if name not in _FLAT and width is None:
                    width = (np.shape(as_array(value, "fiu", what)) or (0,))[-1]
                n_rows = k + 1 if name in _OF_CLASSES else k
                shape = (n_rows,) if name in _FLAT else (n_rows, width or 0)
                object.__setattr__(self, name, as_floats(value, shape, what, np.float32))
        if not width or width % len(self.reads):
            raise SteeringError(
                f"the router's weights have width {width}, which is not a multiple of the number "
                f"of its reads, {len(self.reads)}"
            )
        if self.conditions is not None and not self.conditions.any(axis=1).all():
            raise SteeringError("a condition vector of the router is zero")
        if self.allowances is not None and not (self.allowances >= 0).all():
            raise SteeringError("an allowance of the router is negative")

    def _check_counts(self) -> None:
        k = len(self.categories)
        for name, shape in {"confusion": (k + 1, k + 1), "train_counts": (k + 1,)}.items():
            what = "the router's " + name.replace("_", " ")
            object.__setattr__(self, name, as_counts(getattr(self, name), shape, what))
        if not self.confusion.any(axis=1).all():
            raise SteeringError("the router's confusion has a class without a prompt")

    def __repr__(self) -> str:
        where = ", ".join(f"{read.layer} {read.pooling}" for read in self.reads)
        return (
            f"Router(site={self.site!r}, reads=[{where}], gates={list(self.gates)}, "
            f"categories={quoted(list(self.categories))}, n_embd={self.n_embd})"
        )

    @property
    def width(self) -> int:
        """Width of h."""
        kind = next(iter(self.gates))
        return int(getattr(self, WEIGHTS[kind]).shape[1])

    @property
    def n_embd(self) -> int:
        """Width of the model's activations."""
        return self.width // len(self.reads)

    @property
    def last_layer(self) -> int:
        """The highest layer that is read, where the router can decide."""
        return max(read.layer for read in self.reads)

    @property
    def category_accuracy(self) -> float:
        """Share of the held-out prompts of the categories that `classes` classifies correctly."""
        return float(np.trace(self.confusion[1:, 1:]) / self.confusion[1:].sum())

    @property
    def benign_false_positive_rate(self) -> float:
        """Share of the held-out benign prompts that `classes` assigns to a category."""
        return float(self.confusion[0, 1:].sum() / self.confusion[0].sum())

    def classes(self, h: npt.ArrayLike) -> npt.NDArray[np.intp]:
        """Return the class of each hidden state, of shape () or (rows,): 0 is benign.

        By the margin gate, if the router has it: benign where there is no harm, else the category
        that is ahead. Otherwise the most probable class by the multinomial probe.
        """
        if self.margin_weight is None:
            return np.asarray(self.probabilities(h).argmax(axis=-1))
        r = self._linear("margin", h)
        return np.where(r[..., 0] > 0, 0, 1 + r[..., 1:].argmax(axis=-1))

    def margin_scores(self, h: npt.ArrayLike) -> Floats:
        """Return the lesser of the harm of h and the lead of each category over all others.

        With r = W h + b, harm is -r_0, negative for benign h, and the lead of category c is
        r_c minus the largest r of the other categories; 0 if there is no other. The score is
        min(harm, lead + allowance): a category's gate opens at 0 for prompts that are harmful and
        no further from the category than its allowance. As allowances are not negative, the gate of
        the best category opens for every harmful prompt.
        """
        return gate_scores.margin(self._linear("margin", h), self._array("allowances"))

    def ranks(self, kind: str, h: npt.ArrayLike) -> Floats:
        """Return the values that rank several open gates.

        The ranks equal `scores`, except for margin gates: their rank is lead + allowance, because
        the scores of all open gates equal the harm where harm is the lesser.
        """
        if kind == "margin":
            return gate_scores.lead(self._linear("margin", h), self._array("allowances"))
        return self.scores(kind, h)

    def probabilities(self, h: npt.ArrayLike) -> Floats:
        """Return the softmax of W h + b: shape (k + 1,) or (rows, k + 1), column 0 for benign."""
        return gate_scores.softmax(self._linear("multinomial", h))

    def probe_scores(self, h: npt.ArrayLike) -> Floats:
        """Return the log-odds w_c . h + b_c that h belongs to category c, independently for each c.

        0 is a probability of one half.
        """
        return self._linear("probe", h)

    def centroid_cosine(self, h: npt.ArrayLike) -> Floats:
        """Return the cosine of h and each centroid, both measured from the centroids' mean.

        See `pysteer.pack.gate_scores.centroid_cosine`.
        """
        return gate_scores.centroid_cosine(self._rows(h), self._array("centroids"))

    def condition_similarity(self, h: npt.ArrayLike) -> Floats:
        """Return CAST's condition similarity; see `pysteer.pack.gate_scores.condition_similarity`.

        Neither the length nor the sign of a condition matters, so that a condition may hold below
        its threshold as well as above: `Gate.above`.
        """
        return gate_scores.condition_similarity(self._rows(h), self._array("conditions"))

    def scores(self, kind: str, h: npt.ArrayLike) -> Floats:
        """Return the scores of a kind of gate.

        "margin": `margin_scores`; "multinomial": the categories' columns of `probabilities`;
        "probe": `probe_scores`; "centroid": `centroid_cosine`; "cast": `condition_similarity`.
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
        raise SteeringError(f"unknown kind of gate {quoted(kind)}; use one of {', '.join(GATES)}")

    def opens(self, kind: str, h: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return the categories whose gates of one kind open: bool (k,) or (rows, k)."""
        found = self.scores(kind, h)
        return self.gates[kind].opens(found)

    def _linear(self, kind: str, h: npt.ArrayLike) -> Floats:
        """Return W h + b by the weights and biases of a kind of gate."""
        weight, bias = _ARRAYS[kind][:2]
        return np.asarray(self._rows(h) @ self._array(weight).T + self._array(bias))

    def _array(self, name: str) -> Floats:
        """Return one of the arrays as float64; SteeringError if the router lacks the gate."""
        values = getattr(self, name)
        if values is None:
            kind = next(kind for kind, names in _ARRAYS.items() if name in names)
            raise SteeringError(f"the router has no {kind} gate; it has {', '.join(self.gates)}")
        return np.asarray(values, np.float64)

    def _rows(self, h: npt.ArrayLike) -> Floats:
        rows = np.asarray(h, np.float64)
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.width:
            raise SteeringError(
                f"the router reads hidden states of width {self.width}, not of the shape "
                f"{rows.shape}"
            )
        if not np.isfinite(rows).all():
            raise SteeringError("the hidden state holds NaN or infinity")
        return rows

    def content(self) -> RouterContent:
        """Return the router as the plain data of a pack file."""
        return RouterContent(
            site=self.site,
            layers=[read.layer for read in self.reads],
            poolings=[read.pooling for read in self.reads],
            categories=list(self.categories),
            tensors={
                tensor: getattr(self, name)
                for tensor, name in _TENSORS.items()
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
        """Return the router of a pack file's plain data.

        Raises:
            SteeringError: the data is not a router.
        """
        tables = _object(content.tables, _TABLES, "the router's tables")
        gates = tables["gates"]
        if not isinstance(gates, dict):
            raise SteeringError("the router's gates are not an object")
        for tensor in content.tensors:
            if tensor not in _TENSORS:
                raise SteeringError(f"tensor {quoted('router.' + tensor)} belongs to no gate")
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
            **{_TENSORS[tensor]: values for tensor, values in content.tensors.items()},
        )


def _object(value: object, keys: Sequence[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise SteeringError(f"{what} are not an object of {', '.join(keys)}")
    return value
