"""Answers of a model to prompts, steered as asked, in fixed groups, and kept as they come.

Answers are comparable only if they were made the same way: llama.cpp's arithmetic differs in the
last bits with the batch that a token is computed in, and greedy text follows. So prompts are
answered in groups, each for itself and from an empty cache; a group that is asked the same gives
the same text, today and tomorrow. A group is also what is kept: interrupted, all groups answered
so far are there, and the one under way is answered again, whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.engine import Engine, Handle
from pysteer.errors import SteeringError
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import Steering
from pysteer.runtime.steered import InForce

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

_REMEMBERED = 4  # groups whose distributions are at hand: a reference, and what is asked after it


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_tokens: where an answer is cut.
        temperature: 0 is greedy.
        seed: each prompt has a seed of its own, made of this one and its text.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def seed_of(self, prompt: str) -> int:
        """The seed of a prompt, whatever stands beside it."""
        digest = hashlib.sha256(f"{self.seed}\n{prompt}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class Asked:
    """A prompt and how it is to be steered.

    Attributes:
        prompt: what the user says.
        steering: as a request takes it; `IN_FORCE` leaves it to the policy.
        policy: of the request.
    """

    prompt: str
    steering: Steering | InForce = None
    policy: Policy | None = None

    def content(self) -> list[Any]:
        """The same as JSON data."""
        steering: Any = self.steering
        if isinstance(steering, InForce):
            steering = {"by": "policy"}
        elif isinstance(steering, Mapping):
            steering = {"categories": dict(steering)}
        return [self.prompt, steering, None if self.policy is None else self.policy.content()]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and what steered it.

    Attributes:
        text: the answer.
        finish_reason: "stop", or "length" if it was cut.
        n_tokens: tokens written.
        fired: the gated categories whose gate opened.
        active: category to strength, of those that acted on any token.
        scores: what the router saw, by category; empty if it was not asked.
        first_token_kl: KL(unsteered || steered) of the first token's distribution, nats; None where
            the group was asked without a reference.
        ranks: what the router compared the categories by.
    """

    text: str
    finish_reason: str
    n_tokens: int
    fired: list[str] = field(default_factory=list)
    active: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    first_token_kl: float | None = None
    ranks: dict[str, float] = field(default_factory=dict)


class KeptAnswers:
    """Answered groups in a JSONL file, one line a group; later lines go before earlier ones.

    Args:
        path: the file; need not exist. A line that is damaged, as after a crash, is left out, which
            is logged.

    Raises:
        SteeringError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._groups: dict[str, list[Answer]] = {}
        try:
            text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
            # A line that was cut off would swallow the next one.
            with path.open("ab") as file:
                file.write(b"\n" if text and not text.endswith("\n") else b"")
        except OSError as error:
            raise SteeringError(f"{path}: {error.strerror}; name another --output") from None
        damaged = 0
        for line in text.split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self._groups[row["group"]] = [_answer(data) for data in row["answers"]]
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += 1
        if damaged:
            _log.warning("%d lines of %s are damaged; they are answered again", damaged, path)

    def get(self, key: str) -> list[Answer] | None:
        """The answers of a group, or None."""
        return self._groups.get(key)

    def put(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep the answers of a group."""
        line = json.dumps({"group": key, "answers": [asdict(answer) for answer in answers]})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise SteeringError(f"{self._path}: {error.strerror}") from None
        self._groups[key] = list(answers)


def _answer(data: Any) -> Answer:
    if not isinstance(data, dict) or set(data) != {part.name for part in fields(Answer)}:
        raise ValueError("not an answer")
    return Answer(**data)


class Answerer:
    """Asks an engine, or what was kept of it.

    Args:
        engine: the model, with its pack and policy.
        sampling: how answers are drawn.
        kept: where answers are kept.
        identity: JSON data: what else answers depend on (model, pack, policy, threads, ...).
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        kept: KeptAnswers,
        identity: Mapping[str, Any],
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._kept = kept
        self._identity = identity
        self._latest: dict[str, list[Floats]] = {}  # groups just run, to log-probabilities

    def ask(
        self,
        group: Sequence[Asked],
        reference: Sequence[Asked] | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Answer]:
        """Answer a group.

        Args:
            group: at most as many as the engine decodes at once, or their batches would depend on
                each other's lengths.
            reference: the same prompts, asked otherwise; with them the answers have
                `first_token_kl`. Asked right before, it costs nothing.
            max_tokens: in the place of that of the sampling.

        Raises:
            SteeringError: the engine cannot do what is asked.
        """
        n = max_tokens or self._sampling.max_tokens
        key = self._key(group, reference, n)
        kept = self._kept.get(key)
        if kept is None:
            against = None if reference is None else self._first_of(reference, n)
            kept, first = self._run(group, n)
            if against is not None:
                kept = [
                    Answer(**{**asdict(answer), "first_token_kl": kl(p, q)})
                    for answer, p, q in zip(kept, against, first, strict=True)
                ]
            self._kept.put(key, kept)
        return kept

    def _first_of(self, reference: Sequence[Asked], n: int) -> list[Floats]:
        key = self._key(reference, None, n)
        if key not in self._latest:
            # Kept from an earlier run, without its distributions: asked again, whole, because a
            # shorter answer would change the batches of the others.
            self._run(reference, n)
        self._latest[key] = self._latest.pop(key)  # the one to be forgotten last
        return self._latest[key]

    def _key(self, group: Sequence[Asked], reference: Sequence[Asked] | None, n: int) -> str:
        content = {
            **self._identity,
            "sampling": asdict(replace(self._sampling, max_tokens=n)),
            "group": [asked.content() for asked in group],
            "reference": None if reference is None else [asked.content() for asked in reference],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _run(self, group: Sequence[Asked], n: int) -> tuple[list[Answer], list[Floats]]:
        handles: list[Handle] = []
        try:
            with self._engine.together():
                for asked in group:
                    handles.append(self._submit(asked, n))
            results = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        first = [_log_softmax(handle) for handle in handles]
        if len(self._latest) == _REMEMBERED:
            del self._latest[next(iter(self._latest))]
        self._latest[self._key(group, None, n)] = first
        return [_answered(result) for result in results], first

    def _submit(self, asked: Asked, n: int) -> Handle:
        try:
            return self._engine.submit(
                messages=[{"role": "user", "content": asked.prompt}],
                steering=asked.steering,
                policy=asked.policy,
                max_tokens=n,
                temperature=self._sampling.temperature,
                seed=self._sampling.seed_of(asked.prompt),
                keep_first_logits=True,
            )
        except SteeringError as error:
            start = " ".join(asked.prompt.split())[:40]
            raise type(error)(f"the prompt {start!r}: {error}") from None


def _answered(result: Mapping[str, Any]) -> Answer:
    choice, steering = result["choices"][0], result["steering"]
    categories = steering["categories"]
    return Answer(
        text=choice["message"]["content"] or "",
        finish_reason=choice["finish_reason"],
        n_tokens=result["usage"]["completion_tokens"],
        fired=[name for name, found in categories.items() if found["fired"]],
        active={name: found["strength"] for name, found in categories.items() if found["active"]},
        scores=steering["scores"],
        ranks=steering["ranks"],
    )


def _log_softmax(handle: Handle) -> Floats:
    assert handle.first_logits is not None
    logits = handle.first_logits.astype(np.float64)
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def kl(p: Floats, q: Floats) -> float:
    """KL(p || q) = sum of p log(p / q), in nats.

    Args:
        p: log-probabilities, shape (n,).
        q: the same; at least 0 is returned, which rounding could miss.
    """
    return max(0.0, float(np.exp(p) @ (p - q)))
