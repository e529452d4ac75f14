"""Differences of means: `mean` over all activations, `pruned` over the larger differences.

`pysteer.extract.methods.arithmetic` gives shapes, units and errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pysteer.errors import SteeringError
from pysteer.extract.methods.arithmetic import (
    BLOCK,
    Activations,
    Direction,
    Floats,
    check_activations,
    check_pairs,
    direction_of,
    from_means,
    mean_of,
    size_of,
)
from pysteer.extract.methods.base import ArrayMethod, Directions, Method, NoOptions, Result, Task
from pysteer.settings import check, setting


def mean(unsafe: Activations, safe: Activations) -> Direction:
    """Return the difference of the means: omega = mean(s) - mean(u).

    Source: arXiv 2410.01174, all activations. The two sides need not be pairs: `safe` may be the
    harmless twins of the unsafe prompts or generic harmless instructions.

    `from_means` does the same with means that are known already.
    """
    check_activations(unsafe, safe)
    return from_means(mean_of(unsafe, "unsafe"), mean_of(safe, "safe"))


def pruned(unsafe: Activations, safe: Activations, *, paired: bool) -> Direction:
    """Return the mean of the larger half of the differences: mean(d_i : |d_i| > median |d_j|).

    d_i = s_i - u_i with pairs, d_i = mean(s) - u_i without; |.| is the L2 norm. A difference as
    long as the median is left out.

    Source: arXiv 2410.01174, pruned activations.

    Args:
        unsafe: shape (n, n_embd), n >= 2.
        safe: shape (m, n_embd); with pairs m == n, and row i belongs to row i of `unsafe`.
        paired: True if the rows are pairs.

    Raises:
        SteeringError: also if all differences are equally long.
    """
    check_activations(unsafe, safe, least_unsafe=2)
    if paired:
        check_pairs(unsafe, safe, "pruned with pairs")
    unsafe_mean, safe_mean = mean_of(unsafe, "unsafe"), mean_of(safe, "safe")

    def blocks() -> Iterator[Floats]:
        for start in range(0, len(unsafe), BLOCK):
            part = slice(start, start + BLOCK)
            high = safe[part].astype(np.float64) if paired else safe_mean
            yield high - unsafe[part].astype(np.float64)

    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks()])
    keep = norms > np.median(norms)
    if not keep.any():
        raise SteeringError(
            "all differences are equally long, so pruned has nothing to average; use mean"
        )
    total = np.zeros_like(safe_mean)
    for number, block in enumerate(blocks()):
        total += block[keep[number * BLOCK :][: len(block)]].sum(axis=0)
    return direction_of(
        total / keep.sum(), size_of(unsafe_mean, safe_mean), "the differences cancel each other"
    )


def running_means(task: Task[NoOptions], method: str) -> Directions:
    """Return the directions between means that are summed up as rows come; no row is kept.

    Args:
        task: the extraction.
        method: name of the method, for messages.
    """
    sides = task.sides
    groups = [*sides.unsafe.values(), *sides.safe.values()]
    means = task.reader.means(
        [row for prompts in groups for row in task.rows(prompts)],
        [number for number, prompts in enumerate(groups) for _ in prompts],
        len(groups),
        task.site,
        task.layers,
    )
    low = dict(zip(sides.unsafe, means[: len(sides.unsafe)], strict=True))
    high = dict(zip(sides.safe, means[len(sides.unsafe) :], strict=True))

    def one(name: str, index: int) -> Direction:
        return from_means(low[name][index], high[sides.safe_key(name)][index])

    return task.each(method, one)


class Mean(Method[NoOptions]):
    """The method `mean`; see the function."""

    name = "mean"
    summary = "mean of the safe minus mean of the unsafe activations"

    def find(self, task: Task[NoOptions]) -> Result:
        """See `Method.find`."""
        return Result(running_means(task, self.name))


@dataclass(frozen=True)
class PrunedOptions:
    """Options of the method `pruned`.

    Attributes:
        paired: unsafe prompt i belongs to safe prompt i, by pair_id.
    """

    paired: bool = setting(False, "Take differences of pairs, by pair_id.")

    def __post_init__(self) -> None:
        check(self)


class Pruned(ArrayMethod[PrunedOptions]):
    """The method `pruned`; see the function."""

    name = "pruned"
    summary = "mean of the differences that are longer than their median"
    options = PrunedOptions

    def needs_pairs(self, options: PrunedOptions) -> bool:
        """See `Method.needs_pairs`."""
        return options.paired

    def direction(
        self, unsafe: Activations, safe: Activations, options: PrunedOptions
    ) -> Direction:
        """See `ArrayMethod.direction`."""
        return pruned(unsafe, safe, paired=options.paired)
