"""One request and its state in the scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llama_cpp import Llama

from pysteer.engine.cache import Content, Slot, Tokens
from pysteer.engine.handle import End, Handle
from pysteer.engine.sampling import Sampler
from pysteer.engine.text import FinishReason, Pieces, Writing
from pysteer.errors import SteeringError
from pysteer.runtime.sequence import SequenceSteering


def check_prompt(prompt: Sequence[int], *, n_vocab: int, length_limit: int) -> None:
    """Check that a prompt can be decoded; llama.cpp ends the process over some invalid ones.

    Raises:
        SteeringError: the prompt is empty, too long, or has unknown tokens.
    """
    if not prompt:
        raise SteeringError("the prompt is empty, and this model has no token to begin with")
    if len(prompt) >= length_limit:
        raise SteeringError(
            f"the prompt is {len(prompt)} tokens long, and the context takes {length_limit}, "
            "text included; pass a larger n_ctx or a shorter prompt"
        )
    bad = [token for token in prompt if not 0 <= token < n_vocab]
    if bad:
        raise SteeringError(f"unknown token {bad[0]}; tokens are 0 to {n_vocab - 1}")


class Request:
    """A request and its state between two decodes, with a slot or without.

    Args:
        llm: the model.
        arguments: all arguments of `create_completion`.
        prompt: the prompt's tokens; see `check_prompt`.
        seed: of the sampler.
        pieces: the model's vocabulary.
        steering: the steering of the sequence.
        handle: the request as its caller sees it.

    Attributes:
        n_past: number of tokens that are decoded and in the cache.
        n_tokens: number of tokens, prompt and text.
        length_limit: number of tokens that the context takes, prompt and text together.
        slot: the sequence of the context, while the request has one.
        order: older requests have smaller numbers.
        alone_until: number of decoded tokens up to which no other request is decoded.
        suspicion: number of failed decodes that may be the request's fault.
        replaying: True while the request is computed again, until its next token is drawn.
        keep_first_logits: put the logits of the first token into the handle.

    Raises:
        SteeringError: invalid arguments.
    """

    def __init__(
        self,
        llm: Llama,
        arguments: Mapping[str, Any],
        *,
        prompt: Sequence[int],
        seed: int,
        pieces: Pieces,
        steering: SequenceSteering,
        handle: Handle,
    ) -> None:
        self.length_limit = llm.n_ctx()
        room = self.length_limit - len(prompt)
        wanted = arguments["max_tokens"]
        stop = arguments["stop"]
        self.n_prompt = len(prompt)
        self._tokens = np.array(prompt, np.intc)
        self.n_tokens = len(prompt)
        self.n_past = 0
        self.slot: Slot | None = None
        self.order = 0
        self.alone_until = 0
        self.suspicion = 0
        self.replaying = False
        self.steering = steering
        self.handle = handle
        self.keep_first_logits = False
        self.stopping_criteria = arguments["stopping_criteria"]
        self.writing = Writing(
            pieces,
            prompt,
            stop=[stop] if isinstance(stop, str) else list(stop or ()),
            max_tokens=room if wanted is None or wanted <= 0 else min(wanted, room),
            bos_first=arguments["prompt"] == "",
        )
        self.sampler = Sampler(llm, arguments, seed=seed, tokens=self.evaluated)

    @property
    def pending(self) -> int:
        """Number of tokens to decode before the next can be drawn."""
        return self.n_tokens - self.n_past

    @property
    def alone(self) -> bool:
        """The next tokens are decoded before those of all other requests."""
        return self.n_past < self.alone_until

    def tokens(self, start: int, stop: int) -> Tokens:
        """Return a view of the tokens, prompt and text."""
        return self._tokens[start:stop]

    def evaluated(self) -> Tokens:
        """Return a copy of the decoded tokens, for callbacks: they may write into it."""
        return self._tokens[: self.n_past].copy()

    def content(self) -> Content:
        """Return the content of the cells."""
        return Content(self._tokens[: self.n_past], self.steering.keys(0, self.n_past))

    def append(self, token: int) -> None:
        """Add a token to decode next."""
        if self.n_tokens == len(self._tokens):
            self._tokens = np.concatenate(
                [self._tokens, np.zeros(self.n_tokens // 2 + 64, np.intc)]
            )
        self._tokens[self.n_tokens] = token
        self.steering.follow(self.n_tokens, [token])
        self.n_tokens += 1

    def finish(self, reason: FinishReason) -> None:
        """End the request with the text so far."""
        try:
            self.sampler.close()
            end = End(
                text=self.writing.text,
                finish_reason=reason,
                prompt_tokens=self.n_prompt,
                completion_tokens=len(self.writing.tokens),
                steering=self.steering.report(self.n_past).to_dict(),
            )
            self.handle.text_tokens = tuple(self.writing.tokens)
            rest = self.writing.take_rest()
        except Exception as error:  # a defect of ours; the request has to end all the same
            self.handle.fail(error)
            return
        if rest:
            self.handle.push(rest)
        self.handle.finish(end)

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        try:
            self.sampler.close()
        finally:
            self.handle.fail(error)
