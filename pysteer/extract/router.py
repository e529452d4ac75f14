"""Fitting a router: where it looks, its gates, and how well they do on prompts kept aside."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]
from sklearn.model_selection import (  # type: ignore[import-untyped]
    StratifiedGroupKFold,
    StratifiedKFold,
    train_test_split,
)

from pysteer.errors import SteeringError, quoted
from pysteer.extract.margin import (
    FALSE_POSITIVE_RATE,
    LOOK_ALIKE_RATE,
    MAX_LEAK,
    Fold,
    Indices,
    fit_margin,
)
from pysteer.extract.probes import choose_thresholds, fit_probes
from pysteer.pack.router import CLASSIFIERS, GATES, Floats, Gate, Read, Router

logger = logging.getLogger(__name__)

MIN_PROMPTS = 5
"""The fewest prompts of a class that can be split: four to learn from, one to test with."""

MAX_PROMPTS = 5000
"""Of more than so many a sample does: more hardly help, and the time grows with their cube."""

HELD_OUT = 0.2
"""The share of every class that the confusion table and the rates come from."""

_USER_DEPTHS = (0.0, 2 / 15, 1 / 3, 7 / 15, 3 / 5)
_SUFFIX_DEPTHS = (4 / 15, 2 / 5, 8 / 15)


def default_reads(n_layer: int) -> tuple[Read, ...]:
    """Where a router looks, unless told otherwise, in a model of `n_layer` layers.

    The user's message at five layers from the lowest to the upper middle, and the tokens of the
    chat template behind it, which sum up what was asked, at three. Words are best seen low, topics
    in the middle. Which layers exactly makes no difference that can be measured, so none are
    searched; several together tell categories apart better than any one. Never the last layer,
    where llama.cpp computes only the rows whose logits are asked for, unless there is no other.
    """
    last = max(n_layer - 2, 0)
    user = {min(last, round(depth * n_layer)) for depth in _USER_DEPTHS}
    suffix = {min(last, round(depth * n_layer)) for depth in _SUFFIX_DEPTHS}
    return (
        *(Read(layer, "user") for layer in sorted(user)),
        *(Read(layer, "suffix") for layer in sorted(suffix)),
    )


def fit_router(
    activations: npt.NDArray[Any],
    labels: Sequence[str],
    *,
    reads: Sequence[Read],
    site: str,
    kinds: Sequence[str] = ("margin",),
    groups: Sequence[Hashable] | None = None,
    look_alikes: npt.ArrayLike | None = None,
    false_positive_rate: float | None = None,
    max_leak: float = MAX_LEAK,
    look_alike_rate: float = LOOK_ALIKE_RATE,
    folds: int = 5,
    seed: int = 0,
) -> Router:
    """Learn which categories a prompt belongs to from its activations.

    A fit chooses weights and thresholds: each prompt is scored by weights fitted without its fold
    of a stratified cross-validation, and the thresholds are chosen on those scores, as
    scikit-learn's `TunedThresholdClassifierCV` does; then the weights are fitted to all prompts.
    That is done twice:

    - to 80 % of the prompts of every class (benign, and each category), drawn by `seed`. The other
      20 %, which none of its weights and thresholds know, give the confusion table and all rates of
      the router.
    - to all prompts. These are the weights and thresholds of the router. It has seen a quarter more
      than the one that was measured, so it is a little better than its rates, if anything.

    What is fitted, with `Router`'s formulas:

    - *margin*: see `pysteer.extract.margin.fit_margin`.
    - *multinomial* and *probe*: `LogisticRegression` (L2 penalty, C = 0.1, balanced classes) on
      activations standardised by `StandardScaler`, which is folded into the weights. Dimensions
      that hardly vary are not blown up: scales below 0.001 of the median scale are raised to it.
    - *centroid*: mean of each class.
    - *cast*: the condition vector of a category is its mean minus the mean of all other prompts, at
      unit length (arXiv 2409.05907 takes the first principal component of paired examples instead,
      which needs pairs).

    But for the margin gate, a category's threshold is the one with the largest Youden J: the share
    of its own prompts whose gate opens minus the share of all other prompts (benign, and of the
    other categories) for which it does. With `false_positive_rate`, only thresholds count at which
    at most that share of the benign prompts opens the gate. It is put halfway to the next score
    beyond.

    Memory: a few times the activations as float64.

    Args:
        activations: shape (n, len(reads), n_embd), float32 or any real dtype, or a `np.memmap`;
            pooled as the reads say, in the units of the model's activations.
        labels: the category of each of the n prompts, "" for benign.
        reads: where the activations are from; kept in the router.
        site: where in a block they were taken.
        kinds: the kinds of gate, of `pysteer.pack.router.GATES`, one of `CLASSIFIERS` among them.
        groups: prompts of the same group (twins, paraphrases) are learned from or tested with
            together; None: each for itself.
        look_alikes: bool (n,), benign prompts that sound harmful: how many of them may open the
            margin gate is bounded apart from the others. None for none.
        false_positive_rate: largest share of benign prompts that may open a gate, from 0 to below
            1; None is 0.005 for the margin gate, and no limit for the others.
        max_leak: largest share of the other categories' prompts that may open a category's margin
            gate, from 0 to 1; but the gate of the best category opens for every harmful prompt.
        look_alike_rate: largest share of the look-alikes that may open a margin gate, from 0 to 1.
        folds: of the cross-validation; fewer if a class is smaller.
        seed: of the splits; the same seed gives the same router.

    Returns:
        The router. It lacks categories with fewer than `MIN_PROMPTS` prompts, which are logged as a
        warning and whose prompts are not used. Of more than `MAX_PROMPTS` prompts a stratified
        sample is used, which is logged too.

    Raises:
        SteeringError: shapes that do not belong together, NaN or infinity, fewer than `MIN_PROMPTS`
            benign prompts, no category with as many, unknown kinds.
    """
    activations, reads = _checked(activations, labels, reads)
    kinds = _checked_kinds(kinds)
    if false_positive_rate is not None and not 0 <= false_positive_rate < 1:
        raise SteeringError(
            f"a false-positive rate of {quoted(false_positive_rate)} is not from 0 to below 1"
        )
    for what, rate in (("leak", max_leak), ("look-alike", look_alike_rate)):
        if not 0 <= rate <= 1:
            raise SteeringError(f"a {what} rate of {quoted(rate)} is not from 0 to 1")
    if folds < 2:
        raise SteeringError(f"cross-validation needs 2 folds or more, not {quoted(folds)}")
    categories, rows, classes = _classes(labels)
    if len(rows) > MAX_PROMPTS:
        logger.warning(
            "the router is fitted to a sample of %d of %d prompts", MAX_PROMPTS, len(rows)
        )
        chosen = _sample(classes, MAX_PROMPTS, seed)
        rows, classes = rows[chosen], classes[chosen]
    fitter = _Fitter(
        site=site,
        reads=reads,
        kinds=kinds,
        categories=categories,
        false_positive_rate=false_positive_rate,
        max_leak=max_leak,
        look_alike_rate=look_alike_rate,
        folds=folds,
        seed=seed,
        h=_all_reads(activations, reads, rows),
        classes=classes,
        groups=_numbered(groups, rows, len(labels)),
        look_alikes=_flags(look_alikes, len(labels))[rows],
    )
    train, held_out = split(classes, seed, fitter.groups)
    measured = fitter.fit(train)
    of, h = classes[held_out], fitter.h[held_out]
    found = measured.classes(h)
    confusion = confusion_matrix(of, found, labels=range(len(categories) + 1))
    rates = {kind: _rates(measured.opens(kind, h), of) for kind in kinds}
    router = fitter.fit(np.arange(len(classes)), confusion, rates)
    logger.info(
        "router: held-out category accuracy %.3f, benign false-positive rate %.3f",
        router.category_accuracy,
        router.benign_false_positive_rate,
    )
    return router


@dataclass
class _Fitter:
    """What all fits of a router have in common."""

    site: str
    reads: tuple[Read, ...]
    kinds: tuple[str, ...]
    categories: list[str]
    false_positive_rate: float | None
    max_leak: float
    look_alike_rate: float
    folds: int
    seed: int
    h: Floats
    classes: Indices
    groups: Indices | None
    look_alikes: npt.NDArray[np.bool_]

    def fit(
        self,
        rows: Indices,
        confusion: npt.NDArray[np.int64] | None = None,
        rates: dict[str, dict[str, Floats]] | None = None,
    ) -> Router:
        """The router of these rows, weights and thresholds, with the figures given."""
        h, classes = self.h[rows], self.classes[rows]
        groups = None if self.groups is None else self.groups[rows]
        folds = list(_folds(classes, self.folds, self.seed, groups))
        arrays: dict[str, Any] = {}
        gates: dict[str, Gate] = {}
        k = len(self.categories)
        none = np.zeros(k)
        if "margin" in self.kinds:
            margin = fit_margin(
                h,
                classes,
                folds,
                false_positive_rate=self.false_positive_rate,
                max_leak=self.max_leak,
                look_alikes=self.look_alikes[rows],
                look_alike_rate=self.look_alike_rate,
            )
            arrays |= {
                "margin_weight": margin.weight,
                "margin_bias": margin.bias,
                "allowances": margin.allowances,
            }
            gates["margin"] = Gate(none, none == 0, none, none, none)
        others = tuple(kind for kind in self.kinds if kind != "margin")
        if others:
            scores = self._out_of_fold(others, h, classes, folds)
            arrays |= fit_probes(others, h, classes)
            for kind in others:
                thresholds, above = choose_thresholds(
                    kind, scores[kind], classes, self.categories, self.false_positive_rate
                )
                gates[kind] = Gate(thresholds, above, none, none, none)
        if rates is not None:
            gates = {
                kind: Gate(gate.thresholds, gate.above, **rates[kind])
                for kind, gate in gates.items()
            }
        return Router(
            site=self.site,
            reads=self.reads,
            categories=self.categories,
            gates=gates,
            confusion=np.eye(k + 1, dtype=np.int64) if confusion is None else confusion,
            threshold_rule=self._rule(),
            train_counts=np.bincount(classes),
            **arrays,
        )

    def _rule(self) -> str:
        given = self.false_positive_rate
        margin = f"fpr={FALSE_POSITIVE_RATE if given is None else given:g}"
        if "margin" not in self.kinds:
            return "youden" if given is None else f"fpr={given:g}"
        if self.kinds == ("margin",) or given is not None:
            return margin
        return f"youden, margin {margin}"

    def _out_of_fold(
        self, kinds: tuple[str, ...], h: Floats, classes: Indices, folds: Sequence[Fold]
    ) -> dict[str, Floats]:
        """What each kind of gate sees of each prompt when fitted without the prompt's fold."""
        k = len(self.categories)
        none = np.zeros(k)
        scores = {kind: np.empty((len(h), k)) for kind in kinds}
        # A router needs one gate of this kind; this one says nothing.
        nothing: dict[str, Any] = {
            "margin_weight": np.zeros((k + 1, h.shape[1])),
            "margin_bias": np.zeros(k + 1),
            "allowances": none,
        }
        gates = dict.fromkeys(("margin", *kinds), Gate(none, none == 0, none, none, none))
        for fit, test in folds:
            router = Router(
                site=self.site,
                reads=self.reads,
                categories=self.categories,
                gates=gates,
                confusion=np.eye(k + 1, dtype=np.int64),
                threshold_rule="youden",
                train_counts=np.bincount(classes),
                **nothing,
                **fit_probes(kinds, h[fit], classes[fit]),
            )
            for kind, found in scores.items():
                found[test] = router.scores(kind, h[test])
        return scores


def split(
    classes: npt.ArrayLike, seed: int, groups: npt.ArrayLike | None = None
) -> tuple[Indices, Indices]:
    """Split prompts into a training and a held-out part, each class in the same proportion.

    Args:
        classes: class of each prompt, (n,); every class at least `MIN_PROMPTS` times.
        seed: decides which.
        groups: group of each prompt, (n,), none of which is in both parts; None: each for itself.
            Where the groups leave a class without a prompt in one of the parts, they do not count,
            which is logged.

    Returns:
        Two ascending arrays of indices.
    """
    classes = np.asarray(classes)
    if groups is not None:
        splitter = StratifiedGroupKFold(round(1 / HELD_OUT), shuffle=True, random_state=seed)
        there = np.unique(classes)
        for train, held_out in splitter.split(classes, classes, np.asarray(groups)):
            if all(np.array_equal(np.unique(classes[part]), there) for part in (train, held_out)):
                return train, held_out
        logger.warning(
            "a class has too few groups to be split by them: prompts of one group are both learned "
            "from and tested with, and the router's rates are too good"
        )
    train, held_out = train_test_split(
        np.arange(len(classes)), test_size=HELD_OUT, stratify=classes, random_state=seed
    )
    return np.sort(train), np.sort(held_out)


def _rates(opens: npt.NDArray[np.bool_], classes: Indices) -> dict[str, Floats]:
    """What a `Gate` says of itself, from the gates that opened on held-out prompts, (n, k)."""
    own = classes[:, None] == np.arange(1, opens.shape[1] + 1)
    others = (classes[:, None] != 0) & ~own
    return {
        "true_positive_rates": _share(opens, own),
        "false_positive_rates": _share(opens, classes[:, None] == 0),
        "leak_rates": _share(opens, others),
    }


def _share(opens: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_]) -> Floats:
    """Share of the rows of each column that are open, among those asked about; 0 if none are."""
    return np.asarray((opens & among).sum(axis=0) / np.maximum(among.sum(axis=0), 1))


def _folds(classes: Indices, folds: int, seed: int, groups: Indices | None) -> Iterator[Fold]:
    """Stratified folds of a cross-validation, by group where there are groups."""
    if groups is None:
        folds = max(2, min(folds, int(np.bincount(classes).min())))
        yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(classes, classes)
        return
    fewest = min(len(np.unique(groups[classes == c])) for c in np.unique(classes))
    if fewest >= 2:
        splitter = StratifiedGroupKFold(min(folds, fewest), shuffle=True, random_state=seed)
        found = list(splitter.split(classes, classes, groups))
        there = np.unique(classes)
        if all(np.array_equal(np.unique(classes[fit]), there) for fit, _ in found):
            yield from found
            return
    # Without some class there is nothing to fit; `split` has said so.
    yield from _folds(classes, folds, seed, None)


def _sample(classes: Indices, size: int, seed: int) -> Indices:
    """Indices of a stratified sample, in which every class keeps at least `MIN_PROMPTS`."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in np.unique(classes):
        (of_class,) = np.nonzero(classes == c)
        count = max(MIN_PROMPTS, int(size * len(of_class) / len(classes)))
        chosen.append(rng.permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))


def _all_reads(activations: npt.NDArray[Any], reads: tuple[Read, ...], rows: Indices) -> Floats:
    """Activations of the rows, the reads laid end to end: (len(rows), w)."""
    h = np.asarray(activations[rows], np.float64)
    for index, read in enumerate(reads):
        if not np.isfinite(h[:, index]).all():
            raise SteeringError(f"the activations of layer {read.layer} hold NaN or infinity")
    if (h == h[0]).all():
        raise SteeringError(
            "the activations of all prompts are the same; there is nothing to tell apart"
        )
    return h.reshape(len(rows), -1)


def _numbered(groups: Sequence[Hashable] | None, rows: Indices, n: int) -> Indices | None:
    """The groups of the rows as numbers."""
    if groups is None:
        return None
    if len(groups) != n:
        raise SteeringError(f"{len(groups)} groups do not belong to {n} prompts")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(groups[row], len(numbers)) for row in rows], np.intp)


def _flags(values: npt.ArrayLike | None, n: int) -> npt.NDArray[np.bool_]:
    flags = np.zeros(n, bool) if values is None else np.asarray(values)
    if flags.shape != (n,) or flags.dtype != np.bool_:
        raise SteeringError(f"look_alikes is not an array of {n} truth values")
    return flags


def _checked(
    activations: npt.NDArray[Any], labels: Sequence[str], reads: Sequence[Read]
) -> tuple[npt.NDArray[Any], tuple[Read, ...]]:
    if not isinstance(activations, np.ndarray):
        activations = np.asarray(activations)
    if activations.ndim != 3 or activations.dtype.kind not in "fiu" or not activations.size:
        raise SteeringError(
            f"the activations have shape {activations.shape} and type {activations.dtype}; "
            "numbers of shape (prompts, reads, n_embd) are needed"
        )
    reads = tuple(reads)
    if len(labels) != len(activations) or len(reads) != activations.shape[1]:
        raise SteeringError(
            f"{len(labels)} labels and {len(reads)} reads do not belong to activations of shape "
            f"{activations.shape}"
        )
    return activations, reads


def _checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    unknown = [kind for kind in kinds if kind not in GATES]
    if unknown:
        raise SteeringError(
            f"unknown kind of gate {quoted(unknown[0])}; use some of {', '.join(GATES)}"
        )
    if not set(kinds) & set(CLASSIFIERS):
        raise SteeringError(f"a router needs a gate that is one of {', '.join(CLASSIFIERS)}")
    return tuple(kind for kind in GATES if kind in kinds)


def _classes(labels: Sequence[str]) -> tuple[list[str], Indices, Indices]:
    """The categories that can be told apart, the rows to use, and the class of each of these."""
    names = np.asarray(labels, dtype=object)
    counts: dict[str, int] = {}
    for name in labels:
        counts[name] = counts.get(name, 0) + 1
    benign = counts.pop("", 0)
    if benign < MIN_PROMPTS:
        raise SteeringError(
            f"a router needs at least {MIN_PROMPTS} benign prompts to tell categories from; "
            f"there are {benign}: add harmless ones"
        )
    few = {name: count for name, count in counts.items() if count < MIN_PROMPTS}
    for name, count in few.items():
        logger.warning(
            "category %s has %d prompts of the %d that a router needs to learn and test it: "
            "left out of the router",
            name,
            count,
            MIN_PROMPTS,
        )
    categories = [name for name in counts if name not in few]
    if not categories:
        raise SteeringError(
            f"no category has the {MIN_PROMPTS} prompts that a router needs "
            f"({quoted(counts)}); add prompts"
        )
    number = {"": 0, **{name: i + 1 for i, name in enumerate(categories)}}
    (rows,) = np.nonzero([name in number for name in names])
    return categories, rows, np.array([number[names[row]] for row in rows], np.intp)
