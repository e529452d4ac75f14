"""Measure the category accuracy of a router by its number of training prompts.

Splits the prompts as `pysteer calibrate` does, once with every subcategory on both sides, once with
whole subcategories held out for the test. Fits a router to a growing share of the training part of
each category and scores it on the test part, beside a logistic regression over the words of the
same prompts (TF-IDF), which uses no model. Prints means over the seeds of the splits, with the
least and the largest.

A flat curve means that more prompts of the same kind will not help. A curve for unseen
subcategories far below the other means that the router has learned subjects, not categories.

usage: python tools/router_curve.py UNSAFE.jsonl BENIGN.jsonl [MODEL.gguf] [--seeds 5] [--json]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer
from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]

from pysteer import shipped
from pysteer.calibrate.settings import CalibrateSettings, HeldOut
from pysteer.calibrate.split import PromptSet, split
from pysteer.errors import SteeringError
from pysteer.extract.capture import Capture
from pysteer.extract.data import distinct
from pysteer.extract.inputs import Tokenizer
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.reader import Reader
from pysteer.extract.routers.fit import fit_router
from pysteer.extract.routers.prompts import read_prompts
from pysteer.extract.routers.settings import MIN_PROMPTS, RouterSettings
from pysteer.prompts import Prompt, grouped, load_prompts

SHARES = (0.25, 0.5, 0.75, 1.0)
SPLITS: dict[str, HeldOut] = {"seen": "prompts", "unseen": "subcategories"}


class Point(NamedTuple):
    """Accuracy of one fit: the shares of test prompts whose category was found."""

    subcategories: str
    share: float
    prompts: float
    router: float
    words: float


class PromptReads:
    """Activations that a router reads, of each prompt; each prompt runs once."""

    def __init__(self, capture: Capture, prompts: Sequence[Prompt]) -> None:
        with tempfile.TemporaryDirectory() as cache:
            reader = Reader(capture, Path(cache))
            tokenized = list(map(Tokenizer(capture), prompts))
            self.reads, self._h, _ = read_prompts(reader, tokenized)
        self._at = {prompt.prompt: i for i, prompt in enumerate(prompts)}

    def of(self, prompts: Iterable[Prompt]) -> npt.NDArray[np.float32]:
        """Activations of the prompts, (n, reads, n_embd)."""
        return self._h[[self._at[prompt.prompt] for prompt in prompts]]


def main(
    unsafe: Annotated[Path, typer.Argument(help="JSONL: prompts with categories.")],
    benign: Annotated[Path, typer.Argument(help="JSONL or text: everyday prompts.")],
    model: Annotated[Path | None, typer.Argument(help="A GGUF model; SmolLM2 by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of splits.")] = 5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Fit routers to a growing share of the prompts and score them on held-out prompts."""
    try:
        harmful = distinct(load_prompts(unsafe), "unsafe")
        harmless = distinct(load_prompts(benign), "benign")
        reads = PromptReads(LlamaCapture(model or shipped.default_model()), [*harmful, *harmless])
        points = [p for seed in range(seeds) for p in _points(harmful, harmless, reads, seed)]
    except SteeringError as error:
        raise typer.BadParameter(str(error)) from None
    rows = list(_means(points))
    if as_json:
        print(json.dumps(rows))
        return
    print(f"category accuracy on test prompts, {seeds} splits: mean (least-largest)")
    print(f"{'subcategories':20}{'prompts a category':>20}{'router':>20}{'words alone':>20}")
    for row in rows:
        print(
            f"{row['subcategories']:20}{row['prompts']:20.0f}"
            f"{_text(row['router']):>20}{_text(row['words']):>20}"
        )


def _points(
    harmful: Sequence[Prompt], harmless: Sequence[Prompt], reads: PromptReads, seed: int
) -> Iterator[Point]:
    for name, held_out in SPLITS.items():
        if held_out == "subcategories" and not all(p.subcategory for p in harmful):
            continue
        parts = split(
            PromptSet(harmful, [], harmless), CalibrateSettings(held_out=held_out, seed=seed)
        )
        train = parts.train + parts.validation
        for share in SHARES:
            some = list(_some(train.unsafe, share, seed))
            fitted = [*some, *train.benign]
            labels = [*(p.category for p in some), *("" for _ in train.benign)]
            router = fit_router(
                reads.of(fitted),
                labels,
                reads=reads.reads,
                site="residual",
                settings=RouterSettings(seed=seed),
            ).router
            h = reads.of(parts.test.unsafe).reshape(len(parts.test.unsafe), -1)
            names = np.array(["", *router.categories])
            words = make_pipeline(
                TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
                LogisticRegression(C=10.0, max_iter=1000),
            ).fit([p.prompt for p in some], [p.category for p in some])
            truth = np.array([p.category for p in parts.test.unsafe])
            yield Point(
                name,
                share,
                len(some) / len(grouped(some)),
                float(np.mean(names[router.classes(h)] == truth)),
                float(np.mean(words.predict([p.prompt for p in parts.test.unsafe]) == truth)),
            )


def _some(prompts: Sequence[Prompt], share: float, seed: int) -> Iterator[Prompt]:
    """Yield the same share of each category, at least the prompts that a router needs."""
    for name, rows in grouped(prompts).items():
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(rows))
        for i in order[: max(MIN_PROMPTS, round(share * len(rows)))]:
            yield rows[i]


def _means(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    for name in SPLITS:
        for share in SHARES:
            here = [p for p in points if (p.subcategories, p.share) == (name, share)]
            if here:
                yield {
                    "subcategories": name,
                    "prompts": float(np.mean([p.prompts for p in here])),
                    "router": _spread([p.router for p in here]),
                    "words": _spread([p.words for p in here]),
                }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "least": min(values), "largest": max(values)}


def _text(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.2f} ({spread['least']:.2f}-{spread['largest']:.2f})"


if __name__ == "__main__":
    typer.run(main)
