"""Directions learned by gradient descent: the method `learned`.

With directions v added to a site of some layers, at every token, safe answers become likely
continuations of a category's unsafe prompts, and answers to benign prompts stay as they are. Only
v is trained. It minimises

    CE(safe answer | unsafe prompt; v) + kl_weight * KL(p(. | benign prompt; 0) || p(. | ...; v))

The cross-entropy follows Subramani et al. 2022, "Extracting Latent Steering Vectors from
Pretrained Language Models" (arXiv 2205.05124), here with one v for all prompts of a category; the
KL term runs along the model's own greedy answers. Both are means over prompts, in nats per token of
the answer; the first token, which decides whether an answer is a refusal, may count more.

A vector shared by all categories is learned first. Each category's vector starts from it, and so
needs few steps and few prompts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from pysteer.errors import SteeringError, quoted
from pysteer.extract.capture import Tokens
from pysteer.extract.learning.descent import Descent, LearnedDirection, Spans, generator
from pysteer.extract.learning.settings import LearnedSettings, OutOfTimeError
from pysteer.extract.learning.steered_forward import Span, SteeredForward
from pysteer.extract.torch_model import TorchModel
from pysteer.progress import SILENT, Progress

_log = logging.getLogger(__name__)

_SHARED = "shared"


@dataclass(frozen=True)
class Example:
    """An unsafe prompt in its chat template, and a safe answer with its end of turn, as tokens."""

    prompt: Tokens
    answer: Tokens


@dataclass(frozen=True)
class LearnedDirections:
    """Directions of all categories, from `learn`.

    Attributes:
        categories: category to its directions.
        shared: the vector that the categories started from; None with 0 shared steps.
        typical_sizes: layer to the size that the learning rate is relative to.
        settings: the settings used.
    """

    categories: dict[str, LearnedDirection]
    shared: LearnedDirection | None
    typical_sizes: dict[int, float]
    settings: LearnedSettings


def learn(
    model: TorchModel,
    unsafe: Mapping[str, Sequence[Example]],
    benign: Sequence[Tokens],
    *,
    layers: Sequence[int],
    site: str = "residual",
    settings: LearnedSettings | None = None,
    progress: Progress = SILENT,
    folder: Path | None = None,
    deadline: float = math.inf,
) -> LearnedDirections:
    """Learn directions for each category; see the module's text for the method.

    On one machine, with the same number of threads, the same seed gives the same directions, bit
    for bit. Elsewhere sums are rounded in another order, and the differences grow with every step,
    fastest in bfloat16: the directions are similar, not equal.

    Args:
        model: the model; unchanged afterwards, also after an exception.
        unsafe: category to its examples.
        benign: benign prompts in the chat template, as tokens.
        layers: the layers to learn directions for, together.
        site: residual, attention or mlp.
        settings: rates, steps, batch sizes; None takes the defaults.
        progress: receives progress reports, in steps.
        folder: folder of finished runs and of the steps of runs under way, from which the same
            call resumes after an interruption, and ends with the same directions, bit for bit;
            None: no folder.
        deadline: end, in seconds of `time.monotonic()`: the directions are the best so far, and the
            same call with a later deadline resumes.

    Raises:
        SteeringError: a category without examples, an empty prompt or answer, no benign prompts
            although kl_weight is above 0, a site that the model lacks, or a loss that becomes NaN
            or infinite, or never falls.
        OutOfTimeError: the deadline passed before the first useful step.
    """
    settings = settings or LearnedSettings()
    if time.monotonic() >= deadline:
        raise OutOfTimeError("the time for learning was up before the first useful step")
    total = settings.shared_steps + len(unsafe) * settings.category_steps
    forward = SteeredForward(model, layers, site=site)
    advance = progress.start("learning", total, "steps")
    spans = _spans(model, unsafe, benign, settings)
    sizes = forward.typical_sizes([span.tokens for span in chain(*spans.train.values())])
    descent = Descent(
        forward,
        spans,
        settings,
        torch.tensor([[sizes[layer]] for layer in forward.layers]),
        advance,
        folder,
        deadline,
    )
    start = torch.zeros(len(forward.layers), model.n_embd)
    rate = settings.learning_rate
    shared = None
    if settings.shared_steps:
        start, shared = descent.run(_SHARED, list(unsafe), start, settings.shared_steps, rate)
        rate *= settings.category_rate
    categories = {
        category: descent.run(category, [category], start, settings.category_steps, rate)[1]
        for category in unsafe
    }
    _require_found(categories, deadline)
    unchanged = [c for c, found in categories.items() if shared and found.best_step == 0]
    if unchanged and settings.category_steps:
        _log.warning(
            "these categories keep the shared vector, because no step of their own lowered the "
            "loss on validation prompts: %s",
            ", ".join(map(quoted, unchanged)),
        )
    return LearnedDirections(categories, shared, sizes, settings)


def _require_found(categories: Mapping[str, LearnedDirection], deadline: float) -> None:
    for category, found in categories.items():
        if not any(direction.any() for direction in found.directions.values()):
            if time.monotonic() >= deadline:
                raise OutOfTimeError("the time for learning was up before the first useful step")
            raise SteeringError(
                f"category {quoted(category)}: no step lowered the loss on validation prompts; "
                "try a lower learning rate or kl_weight, more prompts, or another layer"
            )


def _spans(
    model: TorchModel,
    unsafe: Mapping[str, Sequence[Example]],
    benign: Sequence[Tokens],
    settings: LearnedSettings,
) -> Spans:
    """Check the examples, and split them into training and validation."""
    if not unsafe:
        raise SteeringError("there are no categories to learn directions for")
    train: dict[str, list[Span]] = {}
    validation: dict[str, list[Span]] = {}
    longest = min(model.n_ctx, settings.max_tokens)
    for category, examples in unsafe.items():
        where = f"category {quoted(category)}"
        if any(not e.prompt or not e.answer for e in examples):
            raise SteeringError(f"{where} has an example with an empty prompt or answer")
        fitting = [e for e in examples if len(e.prompt) + len(e.answer) <= longest]
        _log_dropped(where, len(examples) - len(fitting), longest)
        if not fitting:
            raise SteeringError(f"{where} has no examples of at most {longest} tokens")
        aside = _aside([e.prompt for e in fitting], where, category, settings)
        spans = [(e.prompt in aside, _span(e.prompt, e.answer, len(e.answer))) for e in fitting]
        train[category] = [span for kept_aside, span in spans if not kept_aside]
        validation[category] = [span for kept_aside, span in spans if kept_aside]
    return Spans(train, validation, *_benign(model, benign, longest, settings))


def _benign(
    model: TorchModel, benign: Sequence[Tokens], longest: int, settings: LearnedSettings
) -> tuple[list[Span], list[Span]]:
    """Return benign prompts with the model's own answers: to train on, and to validate with."""
    if not settings.kl_weight:
        return [], []
    distinct = list(dict.fromkeys(benign))
    fitting = [p for p in distinct if p and len(p) + settings.kl_tokens <= longest]
    where = "the benign data"
    _log_dropped(where, len(distinct) - len(fitting), longest)
    if not fitting:
        raise SteeringError(
            "there are no benign prompts to hold the model still on; add some, or set kl_weight "
            "to 0 and expect refusals of benign prompts"
        )
    chosen = generator(settings, "benign").permutation(len(fitting))[: settings.max_benign]
    prompts = [fitting[i] for i in sorted(chosen.tolist())]
    answers: dict[int, Tokens] = dict.fromkeys(range(len(prompts)), ())
    if settings.kl_tokens > 1:  # the first token is predicted from the prompt alone
        answers.update(model.answers(prompts, settings.kl_tokens - 1))
    aside = _aside(prompts, where, "benign", settings)
    # An answer that ends early is held up to its end, which its last position predicts.
    spans = [(p in aside, _span(p, answers[i], len(answers[i]) + 1)) for i, p in enumerate(prompts)]
    return [s for kept_aside, s in spans if not kept_aside], [s for kept, s in spans if kept]


def _aside(
    prompts: Sequence[Tokens], where: str, title: str, settings: LearnedSettings
) -> set[Tokens]:
    """Return the validation prompts, which are not trained on."""
    distinct = list(dict.fromkeys(prompts))
    count = round(settings.validation_share * len(distinct))
    if not settings.validation_share:
        return set()
    if len(distinct) < settings.min_prompts or not 0 < count < len(distinct):
        _log.warning(
            "%s has %d prompts, too few to keep some for validation",
            where,
            len(distinct),
        )
        return set()
    chosen = generator(settings, "split", title).permutation(len(distinct))[:count]
    return {distinct[i] for i in chosen.tolist()}


def _span(prompt: Tokens, answer: Tokens, n_predicted: int) -> Span:
    start = len(prompt) - 1
    return Span(prompt + answer, start, start + n_predicted)


def _log_dropped(where: str, count: int, longest: int) -> None:
    if count:
        _log.warning(
            "%s: left out %d prompts that are empty or longer than %d tokens", where, count, longest
        )
