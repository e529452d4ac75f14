"""Fit of a router: its gates, and their rates on held-out prompts.

A fit chooses weights and thresholds: each prompt is scored by weights fitted without its fold of a
stratified cross-validation, and the thresholds are chosen on those scores, as scikit-learn's
`TunedThresholdClassifierCV` does; then the weights are fitted to all prompts. With the formulas of
`pysteer.pack.router.Router`, the kinds of gate are fitted so:

- *margin*: see `pysteer.extract.routers.margin.fit_margin`.
- *multinomial* and *probe*: `LogisticRegression` (L2 penalty, C = 0.1, balanced classes) on
  activations standardised by `StandardScaler`, which is folded into the weights. Dimensions that
  hardly vary are not blown up: scales below 0.001 of the median scale are raised to it.
- *centroid*: mean of each class.
- *cast*: the condition vector of a category is its mean minus the mean of all other prompts, at
  unit length (arXiv 2409.05907 takes the first principal component of paired examples instead,
  which needs pairs).

Except for the margin gate, a category's threshold is the one with the largest Youden J: the share
of its own prompts that open the gate minus the share of all other prompts (benign, and of the other
categories) that open the gate. With `false_positive_rate`, only thresholds count at which at most
that share of the benign prompts opens the gate. The threshold is put halfway to the next score.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]

from pysteer.errors import SteeringError, quoted
from pysteer.extract.routers.margin import Fold, Indices, fit_margin
from pysteer.extract.routers.probes import choose_thresholds, fit_probes
from pysteer.extract.routers.settings import (
    FALSE_POSITIVE_RATE,
    MAX_PROMPTS,
    MIN_PROMPTS,
    RouterSettings,
)
from pysteer.extract.routers.split import folds_of, sample, split
from pysteer.pack.arrays import Floats
from pysteer.pack.router import GATES, Gate, Read, Router

_log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """The held-out prompts of the first fit.

    Attributes:
        rows: intp (m,), their indices among the prompts of the fit.
        classes: intp (m,), their classes: 0 is benign, i + 1 is the router's category i.
        found: intp (m,), the classes that the first fit found.
        opened: bool (m,), True where a gate of the first of the router's kinds opened.
    """

    rows: Indices
    classes: Indices
    found: Indices
    opened: npt.NDArray[np.bool_]


class Fitted(NamedTuple):
    """A router, and the decisions behind its figures."""

    router: Router
    held_out: HeldOut


def fit_router(
    activations: npt.NDArray[Any],
    labels: Sequence[str],
    *,
    reads: Sequence[Read],
    site: str,
    groups: Sequence[Hashable] | None = None,
    look_alikes: npt.ArrayLike | None = None,
    settings: RouterSettings | None = None,
) -> Fitted:
    """Learn which categories a prompt belongs to from its activations.

    The fit runs twice: on 80 % of the prompts of every class (benign, and each category), drawn by
    the seed, and on all prompts. The other 20 % of the first fit, unknown to its weights and
    thresholds, give the confusion table and all rates. The second fit gives the router; with a
    quarter more prompts it should be a little better than its rates. See the module for the
    formulas.

    Memory: a few times the activations as float64.

    Args:
        activations: shape (n, len(reads), n_embd), float32 or any real dtype, or a `np.memmap`;
            pooled as the reads say, in the units of the model's activations.
        labels: the category of each of the n prompts, "" for benign.
        reads: where the activations are from; kept in the router.
        site: where in a block the activations were taken.
        groups: prompts of the same group (twins, paraphrases) are learned from or tested with
            together; None: each prompt for itself.
        look_alikes: bool (n,), benign prompts that sound harmful, with their own bound for the
            margin gate. None: no look-alikes.
        settings: kinds of gate, rates, folds and seed; None takes the defaults.

    Returns:
        The router, and the held-out prompts of the first fit. The router lacks categories with
        fewer than `MIN_PROMPTS` prompts, which are logged as a warning and whose prompts are not
        used. Of more than `MAX_PROMPTS` prompts a stratified sample is used, which is logged too.

    Raises:
        SteeringError: shapes that do not match, NaN or infinity, fewer than `MIN_PROMPTS` benign
            prompts, or no category with as many.
    """
    settings = settings or RouterSettings()
    activations, reads = _checked(activations, labels, reads)
    categories, rows, classes = _classes(labels)
    if len(rows) > MAX_PROMPTS:
        _log.warning("the router is fitted to a sample of %d of %d prompts", MAX_PROMPTS, len(rows))
        chosen = sample(classes, MAX_PROMPTS, settings.seed)
        rows, classes = rows[chosen], classes[chosen]
    fitter = _Fitter(
        site=site,
        reads=reads,
        categories=categories,
        settings=settings,
        h=_all_reads(activations, reads, rows),
        classes=classes,
        groups=_numbered(groups, rows, len(labels)),
        look_alikes=_flags(look_alikes, len(labels))[rows],
    )
    train, held_out = split(classes, settings.seed, fitter.groups)
    measured = fitter.fit(train)
    of, h = classes[held_out], fitter.h[held_out]
    found = np.asarray(measured.classes(h), np.intp)
    confusion = confusion_matrix(of, found, labels=range(len(categories) + 1))
    rates = {kind: _rates(measured.opens(kind, h), of) for kind in fitter.kinds}
    router = fitter.fit(np.arange(len(classes)), confusion, rates)
    _log.info(
        "router: held-out category accuracy %.3f, benign false-positive rate %.3f",
        router.category_accuracy,
        router.benign_false_positive_rate,
    )
    opened = np.asarray(measured.opens(fitter.kinds[0], h).any(axis=1))
    return Fitted(router, HeldOut(rows[held_out], of, found, opened))


@dataclass(frozen=True)
class _Fitter:
    """Data and settings that all fits of a router share."""

    site: str
    reads: tuple[Read, ...]
    categories: list[str]
    settings: RouterSettings
    h: Floats
    classes: Indices
    groups: Indices | None
    look_alikes: npt.NDArray[np.bool_]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of gate, in the order of `GATES`."""
        return tuple(kind for kind in GATES if kind in self.settings.gates)

    def fit(
        self,
        rows: Indices,
        confusion: npt.NDArray[np.int64] | None = None,
        rates: dict[str, dict[str, Floats]] | None = None,
    ) -> Router:
        """Return the router of these rows, with the figures given."""
        h, classes = self.h[rows], self.classes[rows]
        groups = None if self.groups is None else self.groups[rows]
        folds = list(folds_of(classes, self.settings.folds, self.settings.seed, groups))
        arrays: dict[str, Any] = {}
        gates: dict[str, Gate] = {}
        k = len(self.categories)
        zeros = np.zeros(k)
        if "margin" in self.kinds:
            margin = fit_margin(
                h,
                classes,
                folds,
                false_positive_rate=self.settings.false_positive_rate,
                max_leak=self.settings.max_leak,
                look_alikes=self.look_alikes[rows],
                look_alike_rate=self.settings.look_alike_rate,
            )
            arrays |= {
                "margin_weight": margin.weight,
                "margin_bias": margin.bias,
                "allowances": margin.allowances,
            }
            gates["margin"] = Gate(zeros, zeros == 0, zeros, zeros, zeros)
        others = tuple(kind for kind in self.kinds if kind != "margin")
        if others:
            scores = self._out_of_fold(others, h, classes, folds)
            arrays |= fit_probes(others, h, classes)
            for kind in others:
                thresholds, above = choose_thresholds(
                    kind,
                    scores[kind],
                    classes,
                    self.categories,
                    self.settings.false_positive_rate,
                )
                gates[kind] = Gate(thresholds, above, zeros, zeros, zeros)
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
        given = self.settings.false_positive_rate
        margin = f"fpr={FALSE_POSITIVE_RATE if given is None else given:g}"
        if "margin" not in self.kinds:
            return "youden" if given is None else f"fpr={given:g}"
        if self.kinds == ("margin",) or given is not None:
            return margin
        return f"youden, margin {margin}"

    def _out_of_fold(
        self, kinds: tuple[str, ...], h: Floats, classes: Indices, folds: Sequence[Fold]
    ) -> dict[str, Floats]:
        """Return each kind's scores of each prompt, fitted without the prompt's fold."""
        k = len(self.categories)
        zeros = np.zeros(k)
        scores = {kind: np.empty((len(h), k)) for kind in kinds}
        # A router needs a gate that classifies; this margin gate never opens.
        silent: dict[str, Any] = {
            "margin_weight": np.zeros((k + 1, h.shape[1])),
            "margin_bias": np.zeros(k + 1),
            "allowances": zeros,
        }
        gates = dict.fromkeys(("margin", *kinds), Gate(zeros, zeros == 0, zeros, zeros, zeros))
        for fit, test in folds:
            router = Router(
                site=self.site,
                reads=self.reads,
                categories=self.categories,
                gates=gates,
                confusion=np.eye(k + 1, dtype=np.int64),
                threshold_rule="youden",
                train_counts=np.bincount(classes),
                **silent,
                **fit_probes(kinds, h[fit], classes[fit]),
            )
            for kind, values in scores.items():
                values[test] = router.scores(kind, h[test])
        return scores


def _rates(opens: npt.NDArray[np.bool_], classes: Indices) -> dict[str, Floats]:
    """Return a `Gate`'s rates from the gates that opened on held-out prompts, (n, k)."""
    own = classes[:, None] == np.arange(1, opens.shape[1] + 1)
    others = (classes[:, None] != 0) & ~own
    return {
        "true_positive_rates": _share(opens, own),
        "false_positive_rates": _share(opens, classes[:, None] == 0),
        "leak_rates": _share(opens, others),
    }


def _share(opens: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_]) -> Floats:
    """Return the share of open rows in each column, among the rows chosen; 0 without rows."""
    return np.asarray((opens & among).sum(axis=0) / np.maximum(among.sum(axis=0), 1))


def _all_reads(activations: npt.NDArray[Any], reads: tuple[Read, ...], rows: Indices) -> Floats:
    """Return the activations of the rows, all reads concatenated: (len(rows), w)."""
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
    """Return the groups of the rows as numbers."""
    if groups is None:
        return None
    if len(groups) != n:
        raise SteeringError(f"{len(groups)} groups for {n} prompts; give one group a prompt")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(groups[row], len(numbers)) for row in rows], np.intp)


def _flags(values: npt.ArrayLike | None, n: int) -> npt.NDArray[np.bool_]:
    flags = np.zeros(n, bool) if values is None else np.asarray(values)
    if flags.shape != (n,) or flags.dtype != np.bool_:
        raise SteeringError(
            f"look_alikes must be an array of {n} truth values, not {flags.dtype} {flags.shape}"
        )
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


def _classes(labels: Sequence[str]) -> tuple[list[str], Indices, Indices]:
    """Return the categories with enough prompts, the rows to use, and the class of each row."""
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
        _log.warning(
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
