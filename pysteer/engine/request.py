"""One request, as the scheduler works on it."""

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
    """See to it that a prompt can be decoded. llama.cpp ends the process over some that cannot.

    Raises:
        SteeringError: it is empty, too long, or has tokens that there are not.
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
        raise SteeringError(f"there is no token {bad[0]}; 0 to {n_vocab - 1} are")


class Request:
    """A request and everything it remembers between two decodes, whether it has a slot or not.

    Args:
        llm: the model.
        arguments: those of `create_completion`, all of them.
        prompt: the prompt's tokens; see `check_prompt`.
        length_limit: how many tokens, prompt and text together, the context takes.
        seed: of the sampler.
        pieces: the model's vocabulary.
        steering: what steers it.
        handle: where it is seen from the outside.
        keep_first_logits: whether the handle is to get those that the first token is drawn from.

    Raises:
        SteeringError: arguments that cannot be.
    """

    def __init__(
        self,
        llm: Llama,
        arguments: Mapping[str, Any],
        *,
        prompt: Sequence[int],
        length_limit: int,
        seed: int,
        pieces: Pieces,
        steering: SequenceSteering,
        handle: Handle,
        keep_first_logits: bool = False,
    ) -> None:
        room = length_limit - len(prompt)
        wanted = arguments["max_tokens"]
        stop = arguments["stop"]
        self.n_prompt = len(prompt)
        self._tokens = np.array(prompt, np.intc)
        self.n_tokens = len(prompt)
        self.n_past = 0
        """How many of the tokens are decoded and in the cache."""
        self.length_limit = length_limit
        self.slot: Slot | None = None
        self.order = 0
        """Older requests have smaller numbers."""
        self.alone_until = 0
        """Until so many of its tokens are decoded, they are so in batches of its own."""
        self.steering = steering
        self.handle = handle
        self.keep_first_logits = keep_first_logits
        self.stopping_criteria = arguments["stopping_criteria"]
        self.writing = Writing(
            pieces,
            prompt,
            stop=[stop] if isinstance(stop, str) else list(stop or ()),
            max_tokens=room if wanted is None or wanted <= 0 else min(wanted, room),
            bos_first=arguments["prompt"] == "",
        )
        self.sampler = Sampler(llm, arguments, seed=seed, tokens=self._evaluated)

    @property
    def pending(self) -> int:
        """How many tokens are to be decoded before the next can be drawn."""
        return self.n_tokens - self.n_past

    @property
    def alone(self) -> bool:
        """Whether its next tokens belong in a batch of its own."""
        return self.n_past < self.alone_until

    def tokens(self, start: int, stop: int) -> Tokens:
        """A view of its tokens, prompt and text."""
        return self._tokens[start:stop]

    def _evaluated(self) -> Tokens:
        return self._tokens[: self.n_past]

    def content(self) -> Content:
        """What its cells hold."""
        return Content(self._tokens[: self.n_past], self.steering.keys(0, self.n_past))

    def append(self, token: int) -> None:
        """It goes on with `token`."""
        if self.n_tokens == len(self._tokens):
            self._tokens = np.concatenate(
                [self._tokens, np.zeros(self.n_tokens // 2 + 64, np.intc)]
            )
        self._tokens[self.n_tokens] = token
        self.steering.follow(self.n_tokens, [token])
        self.n_tokens += 1

    def finish(self, reason: FinishReason) -> None:
        """End it; what was written so far is the text."""
        self.sampler.close()
        try:
            end = End(
                text=self.writing.text,
                finish_reason=reason,
                prompt_tokens=self.n_prompt,
                completion_tokens=len(self.writing.tokens),
                steering=self.steering.report(self.n_past).to_dict(),
            )
        except Exception as error:  # a defect of ours, which must not keep it from ending
            self.handle.fail(error)
            return
        rest = self.writing.take_rest()
        if rest:
            self.handle.push(rest)
        self.handle.finish(end)

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self.sampler.close()
        self.handle.fail(error)
