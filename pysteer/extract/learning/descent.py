"""Gradient descent on directions: the loss, and runs with early stopping."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pysteer.errors import SteeringError
from pysteer.extract.cache import load_arrays, save_arrays
from pysteer.extract.capture import token_batches
from pysteer.extract.learning.settings import LearnedSettings
from pysteer.extract.learning.steered_forward import Prepared, Span, SteeredForward
from pysteer.progress import Advance, ignore

_log = logging.getLogger(__name__)

_STEP_TOKENS = 1024
_LAST_RATE = 0.1


@dataclass(frozen=True)
class LearnedDirection:
    """Directions of one category, and figures of their run.

    Attributes:
        directions: layer to direction, shape (n_embd,), float32.
        steps: steps taken.
        best_step: number of steps that led to these directions.
        n_prompts: number of distinct prompts trained on.
        n_validation: number of distinct prompts validated with.
        validation_loss: their loss at `best_step`, in nats per token; None without such prompts.
        validation_kl: the unweighted KL in that loss; None also without benign validation prompts.
    """

    directions: dict[int, npt.NDArray[np.float32]]
    steps: int
    best_step: int
    n_prompts: int
    n_validation: int
    validation_loss: float | None
    validation_kl: float | None


def losses(
    forward: SteeredForward,
    unsafe: Sequence[Prepared],
    benign: Sequence[Prepared],
    directions: Tensor,
    settings: LearnedSettings,
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy of safe answers, and KL from the unsteered model, summed over prompts.

    Each prompt adds the weighted mean over its answer's tokens, in nats, in float32. The model runs
    once for all prompts.

    Args:
        forward: the model.
        unsafe: spans whose positions predict the safe answer, a part of the tokens.
        benign: spans prepared with `final`.
        directions: shape (layers, n_embd), float32.
        settings: the settings with first_token_weight.
    """
    logits, before = forward.logits([*unsafe, *benign], directions)
    scores = torch.log_softmax(logits.float(), dim=-1)
    targets = [t for p in unsafe for t in p.span.tokens[p.span.start + 1 : p.span.stop + 1]]
    weights = torch.cat([_weights(len(p.span), settings) for p in [*unsafe, *benign]])
    weights = weights.to(scores.device)
    chosen = torch.tensor(targets, dtype=torch.long, device=scores.device)
    n = len(targets)
    ce = -(weights[:n] * scores[:n].gather(1, chosen[:, None])[:, 0]).sum()
    known = torch.log_softmax(before.float(), dim=-1)
    kl = (weights[n:] * (known.exp() * (known - scores[n:])).sum(dim=-1)).sum()
    return ce, kl


def _weights(n_tokens: int, settings: LearnedSettings) -> Tensor:
    weights = torch.ones(n_tokens)
    weights[0] = settings.first_token_weight
    return weights / weights.sum()


def generator(settings: LearnedSettings, *titles: str) -> np.random.Generator:
    """Return a run's own random numbers, independent of the numbers that other runs draw."""
    return np.random.default_rng([settings.seed, *"\0".join(titles).encode()])


def _draw(groups: Sequence[Sequence[Span]], random: np.random.Generator) -> Iterator[Span]:
    """Yield spans without end: each group in turn, each group's without replacement until empty."""
    left: list[list[int]] = [[] for _ in groups]
    while all(groups):
        for group in random.permutation(len(groups)).tolist():
            left[group] = left[group] or random.permutation(len(groups[group])).tolist()
            yield groups[group][left[group].pop()]


@dataclass(frozen=True)
class Spans:
    """Data of a descent: training and validation.

    Attributes:
        train: category to prompts with safe answers.
        validation: as `train`, with other prompts; a category may have no prompts here.
        benign_train: benign prompts with the model's own answers.
        benign_validation: as `benign_train`, with other prompts.
    """

    train: dict[str, list[Span]]
    validation: dict[str, list[Span]]
    benign_train: list[Span]
    benign_validation: list[Span]


@dataclass
class Descent:
    """Runs of gradient descent on the same data.

    Attributes:
        forward: the model.
        spans: the data.
        settings: rates, steps and batch sizes.
        scale: size of one component of each layer, shape (layers, 1).
        advance: called as steps are done, or left out by an early stop.
        folder: folder of finished runs and of the steps of runs under way; None: no folder.
        deadline: end of the descent, in seconds of `time.monotonic()`: no step begins later, and
            the best state so far is the result.
    """

    forward: SteeredForward
    spans: Spans
    settings: LearnedSettings
    scale: Tensor
    advance: Advance = ignore
    folder: Path | None = None
    deadline: float = math.inf
    _told: bool = False
    _kept: dict[tuple[Span, bool], Prepared] = field(default_factory=dict)

    def run(
        self, title: str, categories: Sequence[str], start: Tensor, steps: int, rate: float
    ) -> tuple[Tensor, LearnedDirection]:
        """Train one vector for some categories from `start`, given in units of `scale`, at `rate`.

        Returns:
            The best state, in the same units, and the result.
        """
        train = [self.spans.train[c] for c in categories]
        aside = [self.spans.validation[c] for c in categories]
        batches = self._batches(title, train, steps)
        in_turn = [span for row in zip_longest(*aside) for span in row if span is not None]
        validation = Batch(
            in_turn[: self.settings.validation_prompts],
            self.spans.benign_validation[: self.settings.validation_prompts],
        )
        path = self._path(batches, validation, start, rate)
        best = _load(path, start)
        if best is None:
            best = self._descend(title, batches, validation, start, rate, path)
            self.advance(steps - best.taken)
        else:
            self.advance(steps)
        if len(categories) == 1:  # the prompts of the shared run are needed again
            for span in chain(*train, *aside):
                self._kept.pop((span, False), None)
        directions = (best.state * self.scale).numpy().astype(np.float32)
        return best.state, LearnedDirection(
            directions=dict(zip(self.forward.layers, directions, strict=True)),
            steps=best.taken,
            best_step=best.step,
            n_prompts=_count(chain(*train)),
            n_validation=_count(validation.unsafe),
            validation_loss=best.loss if math.isfinite(best.loss) else None,
            validation_kl=best.kl if math.isfinite(best.loss) and validation.benign else None,
        )

    def _path(
        self, batches: Sequence[Batch], validation: Batch, start: Tensor, rate: float
    ) -> Path | None:
        """Return the file of a finished run, named after everything that the run depends on."""
        if self.folder is None:
            return None
        forward = self.forward
        depends = (
            *(forward.model.identity, forward.site, forward.layers, vars(self.settings), rate),
            *(self.scale.tolist(), start.tolist(), validation, batches),
        )
        return self.folder / f"{hashlib.sha256(repr(depends).encode()).hexdigest()}.learned.npz"

    def _batches(self, title: str, train: Sequence[Sequence[Span]], steps: int) -> list[Batch]:
        random = generator(self.settings, "order", title)
        unsafe, benign = _draw(train, random), _draw([self.spans.benign_train], random)
        return [
            Batch(
                list(islice(unsafe, self.settings.batch_size)),
                list(islice(benign, self.settings.benign_batch_size)),
            )
            for _ in range(steps)
        ]

    def _prepare(self, batches: Sequence[Batch]) -> None:
        """Run the prompts of the batches only: there may be far more prompts."""
        for final in (False, True):
            wanted = (span for b in batches for span in (b.benign if final else b.unsafe))
            missing = [s for s in dict.fromkeys(wanted) if (s, final) not in self._kept]
            prepared = self.forward.prepare(missing, final=final, before_each=self._check_time)
            self._kept.update(zip(((s, final) for s in missing), prepared, strict=True))

    def _check_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise _OutOfTime

    def _descend(
        self,
        title: str,
        batches: Sequence[Batch],
        validation: Batch,
        start: Tensor,
        rate: float,
        path: Path | None,
    ) -> _Best:
        """Train from `start`, or from the last step of an earlier run."""
        run = _Run.begin(start, rate)
        under_way = None if path is None else path.with_suffix(".steps.npz")
        try:
            self._prepare([validation, *batches])
            run.load(under_way)
            if run.step:
                self.advance(run.step)
            self._steps(title, run, batches, validation, rate, under_way)
        except _OutOfTime:
            if not self._told:
                _log.warning(
                    "the time for learning was up at step %d of %d of %r: the directions are "
                    "weaker than they could be; the same command continues from there",
                    run.step,
                    len(batches),
                    title,
                )
            self._told = True
            run.best.taken = run.step
            return run.best
        _save(run.best, path)
        if under_way is not None:
            under_way.unlink(missing_ok=True)
        return run.best

    def _steps(
        self,
        title: str,
        run: _Run,
        batches: Sequence[Batch],
        validation: Batch,
        rate: float,
        under_way: Path | None,
    ) -> None:
        """Take the steps that are left; at the deadline, raise _OutOfTime with a best in `run`."""
        settings, state = self.settings, run.state
        for step, batch in list(enumerate([*batches, None]))[run.step :]:
            run.step = step
            if step % settings.check_every == 0:
                run.save(under_way)
            late = batch is not None and time.monotonic() >= self.deadline
            if late and not step:
                raise _OutOfTime
            best = run.best
            best.taken = step
            if not validation.unsafe:
                best.state, best.step = state.detach().clone(), step
            elif batch is None or late or step % settings.check_every == 0:
                with torch.no_grad():
                    ce, kl = self._losses(validation, state)
                loss = ce + settings.kl_weight * kl
                if loss < best.loss:
                    run.best = _Best(state.detach().clone(), step, step, loss, kl)
                elif step - best.step >= settings.patience * settings.check_every:
                    break
            if batch is None:
                break
            if late:
                raise _OutOfTime
            # Small last steps keep the result from depending on the last batch.
            fallen = (1 - _LAST_RATE) * step / max(1, len(batches) - 1)
            run.optimizer.param_groups[0]["lr"] = rate * (1 - fallen)
            run.optimizer.zero_grad()
            ce, kl = self._losses(batch, state)
            _log.debug("%s, step %d: loss %.2f, KL %.2f", title, step, ce, kl)
            run.optimizer.step()
            self.advance(1)

    def _losses(self, batch: Batch, state: Tensor) -> tuple[float, float]:
        """Return mean cross-entropy and KL; with gradients on, add the gradient to `state`."""
        unsafe = [self._kept[span, False] for span in batch.unsafe]
        benign = [self._kept[span, True] for span in batch.benign]
        both = [*unsafe, *benign]
        lengths = [len(one.span.tokens) for one in both]
        total_ce = total_kl = 0.0
        # In batches by length: less padding, and bounded memory.
        for part in token_batches(lengths, _STEP_TOKENS, len(both), padded=True):
            ce, kl = losses(
                self.forward,
                [both[i] for i in part if i < len(unsafe)],
                [both[i] for i in part if i >= len(unsafe)],
                state * self.scale,
                self.settings,
            )
            ce, kl = ce / len(unsafe), kl / max(1, len(benign))
            loss = ce + self.settings.kl_weight * kl
            if not torch.isfinite(loss):
                raise SteeringError(
                    "the loss is NaN or infinite; try a lower learning rate, or dtype float32"
                )
            if loss.requires_grad:
                loss.backward()
            total_ce, total_kl = total_ce + ce.item(), total_kl + kl.item()
        return total_ce, total_kl


@dataclass(frozen=True)
class Batch:
    """Spans over which a loss is averaged."""

    unsafe: list[Span]
    benign: list[Span]


@dataclass
class _Best:
    state: Tensor
    step: int
    taken: int
    loss: float
    kl: float


class _OutOfTime(Exception):
    """The deadline has passed."""


@dataclass
class _Run:
    """A descent under way: all inputs of the next step, besides the data.

    Attributes:
        state: the directions, in units of `Descent.scale`.
        optimizer: Adam on `state`.
        best: the best state so far.
        step: the next step.
    """

    state: Tensor
    optimizer: torch.optim.Adam
    best: _Best
    step: int = 0

    @classmethod
    def begin(cls, start: Tensor, rate: float) -> _Run:
        state = start.clone().requires_grad_(True)
        return cls(
            state, torch.optim.Adam([state], lr=rate), _Best(start, 0, 0, math.inf, math.inf)
        )

    def save(self, path: Path | None) -> None:
        """Write the run, before a step; nothing before the first."""
        if path is None or not self.step:
            return
        moments = self.optimizer.state[self.state]
        arrays = {
            "state": self.state.detach(),
            "best": self.best.state,
            "mean": moments["exp_avg"],
            "square": moments["exp_avg_sq"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(
            path,
            {name: values.numpy() for name, values in arrays.items()}
            | {
                "counts": np.array([self.step, self.best.step]),
                "losses": np.array([self.best.loss, self.best.kl], np.float64),
            },
        )

    def load(self, path: Path | None) -> None:
        """Take up the run that a file holds, if there is one."""
        like = self.best.state.numpy()
        wanted: dict[str, Any] = dict.fromkeys(("state", "best", "mean", "square"), like)
        wanted |= {"counts": np.zeros(2, np.int64), "losses": np.zeros(2)}
        kept = None if path is None else load_arrays(path, wanted)
        if kept is None:
            return
        self.step, best_step = kept["counts"].tolist()
        with torch.no_grad():
            self.state.copy_(torch.tensor(kept["state"]))
        self.optimizer.state[self.state] = {
            "step": torch.tensor(float(self.step)),
            "exp_avg": torch.tensor(kept["mean"]),
            "exp_avg_sq": torch.tensor(kept["square"]),
        }
        self.best = _Best(
            torch.tensor(kept["best"]), best_step, self.step, *kept["losses"].tolist()
        )


def _load(path: Path | None, like: Tensor) -> _Best | None:
    """Return a finished run; None if there is no file, or the file is damaged."""
    wanted = {"state": like.numpy(), "counts": np.zeros(2, np.int64), "losses": np.zeros(2)}
    kept = None if path is None else load_arrays(path, wanted)
    if kept is None:
        return None
    return _Best(torch.tensor(kept["state"]), *kept["counts"].tolist(), *kept["losses"].tolist())


def _save(best: _Best, path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    counts, losses = np.array([best.step, best.taken]), np.array([best.loss, best.kl], np.float64)
    save_arrays(path, {"state": best.state.numpy(), "counts": counts, "losses": losses})


def _count(spans: Iterable[Span]) -> int:
    return len({span.tokens[: span.start + 1] for span in spans})
