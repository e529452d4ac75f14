"""One call of `generate` under its steering, and the request that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pysteer.chat.conversation import Conversation
from pysteer.runtime.handler_prompt import HandlerPrompt
from pysteer.runtime.ledger import CachedSteering
from pysteer.runtime.plan import CompiledPlan
from pysteer.runtime.report import SteeringReport
from pysteer.runtime.sequence import SequenceSteering


@dataclass(eq=False)
class Request:
    """A request, or a call of `generate` outside of requests.

    Attributes:
        latest: the request's latest generation.
        ended: True once the result is complete, or the stream is closed.
        prompt: the prompt that the chat handler evaluates by itself; None for other requests.
    """

    latest: Generation | None = None
    ended: bool = False
    prompt: HandlerPrompt | None = None

    def end(self) -> None:
        """End the request: what its latest generation left is freed, and never copied again."""
        self.ended = True
        self.latest = None  # without the circle, the copy of a context goes at once


class SavedContext(NamedTuple):
    """Copy of a generation's state: the KV cache, the logits, and the sampler."""

    memory: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.float32] | None
    sampler: Any


@dataclass(eq=False)
class Generation:
    """One call of `generate`, from its prompt to its last token.

    Attributes:
        request: the request of the call.
        sequence: the steering.
        tokens: the tokens in the context when the latest step ended.
        steering: the steering of these tokens.
        n_prompt: number of prompt tokens.
        n_drawn: number of tokens drawn.
        n_accepted: number of tokens decoded, without those of a draft that are not yet chosen.
        over: True once no more tokens come.
        live: True if the logits in the context are the generation's own.
        saved: copy of the state, while the context belongs to another generation.
        lost: True if the state could not be copied or put back.
    """

    request: Request
    sequence: SequenceSteering
    n_prompt: int
    n_drawn: int = 0
    n_accepted: int = 0
    over: bool = False
    tokens: npt.NDArray[np.intc] = field(default_factory=lambda: np.zeros(0, np.intc))
    steering: CachedSteering | None = None
    live: bool = True
    saved: SavedContext | None = None
    lost: bool = False

    @property
    def wanted(self) -> bool:
        """True if more tokens may be drawn, or the request may still read the state."""
        return not self.over or (self.request.latest is self and not self.request.ended)

    def draw(self) -> None:
        """Count a token that was drawn."""
        self.n_drawn += 1
        self.n_accepted = max(self.n_accepted, self.n_prompt + self.n_drawn - 1)

    def report(self) -> SteeringReport:
        """Return the report of the generation so far."""
        return self.sequence.report(self.n_accepted)


class ActiveSteering(NamedTuple):
    """A plan in force.

    Attributes:
        plan: the plan.
        conversation: the messages of a chat, for the router; None outside of chats.
        request: the request that put it in force; None: a `with llm.steering(...)` block.
    """

    plan: CompiledPlan
    conversation: Conversation | None = None
    request: Request | None = None
