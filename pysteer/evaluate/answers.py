"""Answers of a model to prompts in fixed groups; each complete group is recorded.

Answers are comparable only if they were computed alike: llama.cpp's arithmetic differs in the last
bits with the batch of a token, and greedy text differs with it. So prompts are answered in groups,
each group from an empty cache; the same group gives the same text in every run. The journal holds
whole groups: after an interruption, only the group under way is answered again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.chat.messages import user_message
from pysteer.engine import Engine, Handle
from pysteer.errors import SteeringError
from pysteer.evaluate.degeneration import is_degenerate
from pysteer.evaluate.settings import Sampling
from pysteer.journal import Journal
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import Inherit
from pysteer.thoughts import MARKER_TOKENS, Answered, answered, opening_of

Floats = npt.NDArray[np.float64]

_REMEMBERED = 4  # groups whose distributions stay in memory: a reference, and its comparisons


@dataclass(frozen=True)
class Query:
    """A prompt and its steering.

    Attributes:
        prompt: the user's message.
        steering: as a request takes it; `INHERIT`: by the policy.
        policy: of the request.
    """

    prompt: str
    steering: Steering | Inherit = None
    policy: Policy | None = None

    def content(self) -> list[Any]:
        """Return the query as JSON data."""
        steering: Any = self.steering
        if isinstance(steering, Inherit):
            steering = {"by": "policy"}
        elif isinstance(steering, Mapping):
            steering = {"categories": dict(steering)}
        return [self.prompt, steering, None if self.policy is None else self.policy.content()]


@dataclass(frozen=True)
class Answer:
    """A model's answer, and the steering that acted on it.

    Attributes:
        text: the answer, without thoughts.
        finish_reason: "stop", or "length" if the answer was cut.
        n_tokens: length.
        fired: gated categories whose gate opened.
        active: category to strength, of the categories that acted on any token.
        scores: category to the router's score; empty if the router was not asked.
        first_token_kl: KL(unsteered || steered) of the first token's distribution, nats; None
            without a reference.
        ranks: category to the value by which the router compared the categories.
        thoughts: all that the model wrote, if that is more than the answer; else "".
        unfinished: True if the text ends inside a thought; then `text` is "".
    """

    text: str
    finish_reason: str
    n_tokens: int
    fired: list[str] = field(default_factory=list)
    active: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    first_token_kl: float | None = None
    ranks: dict[str, float] = field(default_factory=dict)
    thoughts: str = ""
    unfinished: bool = False

    @property
    def whole(self) -> str:
        """All that the model wrote."""
        return self.thoughts or self.text

    @cached_property
    def degenerate(self) -> bool:
        """True if the answer, or an unfinished thought, is degenerate; see `is_degenerate`."""
        return is_degenerate(self.whole if self.unfinished else self.text)


class Answerer:
    """Answers groups of queries by an engine, or from a journal.

    Args:
        engine: the model, with pack and policy.
        sampling: how answers are drawn.
        journal: answered groups.
        identity: JSON data: all other inputs of answers (model, pack, policy, threads, ...).
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        journal: Journal,
        identity: Mapping[str, Any],
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._journal = journal
        self._identity = identity
        self._latest: dict[str, list[Floats]] = {}  # groups just run, to log-probabilities

    def ask(
        self,
        group: Sequence[Query],
        reference: Sequence[Query] | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Answer]:
        """Return the answers to a group.

        Args:
            group: at most as many queries as the engine decodes at once: in larger groups, batches
                depend on the lengths of other answers.
            reference: the same prompts under other steering; sets `first_token_kl`. Costs nothing
                if the reference was asked right before.
            max_tokens: replaces the sampling's.

        Raises:
            SteeringError: the engine rejects a query.
        """
        n = max_tokens or self._sampling.max_tokens
        key = self._key(group, reference, n)
        answers = _recorded(self._journal.get(key))
        if answers is None:
            baseline = None if reference is None else self._first_of(reference, n)
            answers, first = self._run(group, n)
            if baseline is not None:
                answers = [
                    replace(answer, first_token_kl=kl(p, q))
                    for answer, p, q in zip(answers, baseline, first, strict=True)
                ]
            self._journal.put(key, [asdict(answer) for answer in answers])
        return answers

    def _first_of(self, reference: Sequence[Query], n: int) -> list[Floats]:
        key = self._key(reference, None, n)
        if key not in self._latest:
            # The journal of an earlier run has no distributions. The whole answers are computed
            # again: shorter ones would change the batches of the others.
            self._run(reference, n)
        self._latest[key] = self._latest.pop(key)  # the last to be forgotten
        return self._latest[key]

    def _key(self, group: Sequence[Query], reference: Sequence[Query] | None, n: int) -> str:
        content = {
            **self._identity,
            "sampling": asdict(replace(self._sampling, max_tokens=n)),
            "group": [query.content() for query in group],
            "reference": None if reference is None else [query.content() for query in reference],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _run(self, group: Sequence[Query], n: int) -> tuple[list[Answer], list[Floats]]:
        handles: list[Handle] = []
        try:
            with self._engine.together():
                for query in group:
                    handles.append(self._submit(query, n))
            results = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        first = [_log_softmax(handle) for handle in handles]
        if len(self._latest) == _REMEMBERED:
            del self._latest[next(iter(self._latest))]
        self._latest[self._key(group, None, n)] = first
        texts = [self._read(handle) for handle in handles]
        return list(map(_answer, results, texts)), first

    def _read(self, handle: Handle) -> tuple[str, Answered]:
        """Return all that the model wrote, special tokens included, and the answer in it.

        The markers of many models' thoughts are special tokens, which a completion's text lacks.
        """
        prompt = self._engine.detokenize(handle.prompt_tokens[-MARKER_TOKENS:])
        text = self._engine.detokenize(handle.text_tokens)
        return text, answered(text, opening_of(prompt))

    def _request(self, prompt: str) -> dict[str, Any]:
        """Return a chat, or the bare prompt where extraction also takes the bare prompt."""
        if self._engine.renders_chats:
            return {"messages": [user_message(prompt)]}
        return {"prompt": prompt}

    def _submit(self, query: Query, n: int) -> Handle:
        try:
            return self._engine.submit(
                **self._request(query.prompt),
                steering=query.steering,
                policy=query.policy,
                max_tokens=n,
                temperature=self._sampling.temperature,
                seed=self._sampling.seed_of(query.prompt),
                keep_first_logits=True,
            )
        except SteeringError as error:
            start = " ".join(query.prompt.split())[:40]
            raise type(error)(f"the prompt {start!r}: {error}") from None


_FIELDS = {each.name for each in fields(Answer)}


def _recorded(value: Any) -> list[Answer] | None:
    """Return the answers of a journal's value; None for values of another shape."""
    if not isinstance(value, list):
        return None
    if not all(isinstance(data, dict) and data.keys() == _FIELDS for data in value):
        return None
    return [Answer(**data) for data in value]


def _text(choice: Mapping[str, Any]) -> str:
    """Return the text of a choice of a chat completion, or of a completion."""
    return choice["text"] if "text" in choice else choice["message"]["content"] or ""


def _answer(result: Mapping[str, Any], read: tuple[str, Answered]) -> Answer:
    choice, steering = result["choices"][0], result["steering"]
    categories = steering["categories"]
    marked, found = read
    plain = found.answer == marked  # no markers of a thought
    return Answer(
        text=_text(choice) if plain else found.answer,
        thoughts="" if plain else marked,
        unfinished=found.unfinished,
        finish_reason=choice["finish_reason"],
        n_tokens=result["usage"]["completion_tokens"],
        fired=[name for name, report in categories.items() if report["fired"]],
        active={
            name: report["strength"] for name, report in categories.items() if report["active"]
        },
        scores=steering["scores"],
        ranks=steering["ranks"],
    )


def _log_softmax(handle: Handle) -> Floats:
    assert handle.first_logits is not None
    logits = handle.first_logits.astype(np.float64)
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def kl(p: Floats, q: Floats) -> float:
    """Return KL(p || q) = sum of p log(p / q), in nats; at least 0, which rounding could miss.

    Args:
        p: log-probabilities, float64 (n,).
        q: likewise.

    Examples:
        >>> round(kl(np.log([0.5, 0.5]), np.log([0.9, 0.1])), 4)
        0.5108
    """
    return max(0.0, float(np.exp(p) @ (p - q)))
