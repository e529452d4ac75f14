"""The tokens in a model's context, each with the steering of its computation."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import numpy as np
from llama_cpp import LlamaState

from pysteer.errors import SteeringError
from pysteer.llama.context import SpoiledDecodeError
from pysteer.llama.hooked import HookedLlama
from pysteer.llama.vocabulary import token_piece
from pysteer.runtime.generation import ActiveSteering, Request
from pysteer.runtime.ledger import CachedSteering, CacheLedger
from pysteer.runtime.plan import UNSTEERED
from pysteer.runtime.report import SteeringReport, report
from pysteer.runtime.sequence import SequenceSteering

# Attributes of a LlamaState: fingerprints of its tokens' steering, and the length of its prompt.
_KEYS: Final = "steering_keys"
_N_PROMPT: Final = "steering_n_prompt"


class SteeredCache:
    """Steering and origin of the tokens in the context of a `llama_cpp.Llama`.

    The tokens themselves are the model's `n_tokens` and `input_ids`, which may change without
    notice, by `reset()` or by hand.

    Args:
        llm: the model.

    Attributes:
        sequence: the steering of the tokens in the context, once one was started.
    """

    def __init__(self, llm: HookedLlama) -> None:
        self._llm = llm
        self._ledger = CacheLedger()
        self._evaluating = False
        self._logits_key = 0  # of the last token decoded
        self._installed: SequenceSteering | None = None
        self._loaded_n_prompt: int | None = None  # of a loaded state, until a sequence goes on
        self.sequence: SequenceSteering | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens in the context."""
        tokens: list[int] = self._llm.input_ids[: self._llm.n_tokens].tolist()
        return tokens

    @property
    def n_prompt(self) -> int | None:
        """The number of prompt tokens in the context, where it is known."""
        return self._loaded_n_prompt if self.sequence is None else self.sequence.n_prompt

    @property
    def cuts_back(self) -> bool:
        """The context can be cut back to an earlier position.

        The state of recurrent models cannot, nor can a sliding window that has dropped the first
        tokens (`swa_full=False`): an earlier position attended to tokens that are gone.
        """
        context = self._llm.context
        return context.batches_sequences and (self._llm.n_tokens == 0 or context.memory.is_whole(0))

    def report(self) -> SteeringReport:
        """Return the report of the tokens in the context."""
        if self.sequence is None:
            return report(UNSTEERED, None, 0)
        return self.sequence.report(self._llm.n_tokens)

    # ---- sequences ---------------------------------------------------------------------------

    def start(self, active: ActiveSteering, prompt: Sequence[int]) -> SequenceSteering:
        """Return the steering of a sequence that begins with `prompt`."""
        return SequenceSteering(
            active.plan,
            prompt,
            conversation=active.conversation,
            n_positions=self._llm.n_ctx(),
            piece=partial(token_piece, self._llm),
        )

    def continued(self, active: ActiveSteering, tokens: Sequence[int]) -> SequenceSteering:
        """Return the steering of the context, for `tokens` that are added by hand.

        Under another plan than before, or in an empty context, another sequence begins.
        """
        sequence, llm = self.sequence, self._llm
        ended = sequence is not None and sequence.begun and llm.n_tokens == 0
        if sequence is None or sequence.plan is not active.plan or ended:
            cached = self.tokens
            prompt = [*cached, *tokens]
            if cached and self.n_prompt is not None:
                prompt = prompt[: self.n_prompt]
            sequence = self.start(active, prompt)
            sequence.follow(0, cached)
        self.sequence = sequence
        return sequence

    def install(self, sequence: SequenceSteering | None) -> None:
        """Steer by a sequence from the next decode on; None: not at all."""
        if sequence is None or sequence is not self._installed:
            self._llm.context.set_sequence(0, None if sequence is None else sequence.native)
            self._installed = sequence

    # ---- tokens ------------------------------------------------------------------------------

    def moved(self, n_tokens: int, active: ActiveSteering | None) -> None:
        """Record a new number of tokens in the context.

        Multimodal chat handlers decode images straight on the context, and raise the number. These
        positions have no tokens, and belong to their request alone.

        Raises:
            SteeringError: steering is in force, which does not reach these positions.
        """
        self._ledger.forget(n_tokens)
        start = self._ledger.known
        if start >= n_tokens or self._evaluating:
            return
        if active is not None and active.plan.native is not None:
            self._llm.n_tokens = start  # the next decode removes what the handler left
            raise SteeringError(
                "the chat handler decodes images by itself, and images cannot be steered; pass "
                "steering=None, which also leaves out the router"
            )
        request = active.request if active is not None else None
        key = secrets.randbits(64) if request is None else request.images
        self._ledger.record(start, np.full(n_tokens - start, key, np.uint64))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Ignore new numbers of tokens inside the `with` block, whose caller records the tokens."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    def reuse(
        self,
        sequence: SequenceSteering,
        request: Request,
        tokens: list[int],
        *,
        reset: bool,
    ) -> list[int]:
        """Cut the context back to the tokens that a sequence would compute the same way.

        `llama_cpp.Llama.generate` then reuses the remaining tokens that match the prompt, and
        evaluates at least one token if the cached logits are of another steering.

        Args:
            sequence: the sequence about to begin.
            request: the request of the sequence.
            tokens: the argument of `generate`.
            reset: the argument of `generate`. True: `tokens` are the whole prompt. False: `tokens`
                follow the context.

        Returns:
            The tokens to call `generate` with.
        """
        llm, n = self._llm, self._llm.n_tokens
        found, keys = self._ledger.keys()[:n], sequence.keys(0, n)
        images = found == np.uint64(request.images)
        reusable = self._ledger.reusable(np.where(images, found, keys))
        reusable = min(reusable, sequence.first_to_decode)
        stale = reusable < n or (n > 0 and sequence.logits_key(n - 1) != self._logits_key)
        if reset and stale:
            reusable = min(reusable, max(len(tokens) - 1, 0))
        exact = not llm._requires_eval and self.tokens == tokens
        if reset and not exact and not self.cuts_back:
            prefix = llm.longest_token_prefix(self.tokens, tokens[:-1])
            reusable = min(reusable, prefix)
        if reusable == n:
            return tokens
        if images[reusable if self.cuts_back else 0 :].any():
            raise SteeringError(
                "an image in the context would have to be computed again, because another request "
                "has used the model since; read the stream before the next request"
            )
        cut = self.rewind(reusable)
        return tokens if reset else [*cut, *tokens]

    def rewind(self, position: int) -> list[int]:
        """Cut the context back to a position, or empty the context; return the removed tokens."""
        tokens = self.tokens
        if not self.cuts_back:
            self._llm.reset()
            return tokens
        self._llm.n_tokens = position
        return tokens[position:]

    def draft_room(self, sequence: SequenceSteering, draft: Sequence[int]) -> int:
        """Return the number of a draft's tokens to decode with the token before them.

        A draft is a guess of the next tokens, decoded to be compared with the tokens drawn. No gate
        decides on a guess, and a state that cannot be cut back takes none.
        """
        llm = self._llm
        if not draft or not llm.keeps_logits or not self.cuts_back:
            return 0
        known = llm.n_vocab()
        unknown = (at for at, token in enumerate(draft) if not 0 <= token < known)
        return min(next(unknown, len(draft)), llm.n_batch - 1, sequence.free_after(llm.n_tokens))

    def evaluate(
        self,
        sequence: SequenceSteering,
        tokens: Sequence[int],
        evaluate: Callable[[Sequence[int]], None],
    ) -> None:
        """Evaluate tokens under a sequence, and once more where a gate's decision changes them.

        Args:
            sequence: the steering; see `continued`.
            tokens: the tokens that follow those in the context.
            evaluate: `HookedLlama.eval`.
        """
        if not sequence.begun and sequence.first_to_decode < self._llm.n_tokens:
            tokens = [*self.rewind(sequence.first_to_decode), *tokens]
        self._evaluate(sequence, tokens, evaluate)
        changed = sequence.reprocess_from(self._llm.n_tokens)
        if changed < self._llm.n_tokens:
            self._evaluate(sequence, self.rewind(changed), evaluate)

    def _evaluate(
        self,
        sequence: SequenceSteering,
        tokens: Sequence[int],
        evaluate: Callable[[Sequence[int]], None],
    ) -> None:
        start = self._llm.n_tokens
        sequence.follow(start, tokens)
        sequence.begun = True
        self.install(sequence)
        try:
            with self.evaluating():
                evaluate(tokens)
        except SpoiledDecodeError as error:
            in_force = ", ".join(f"{t.category}={t.strength:g}" for t in sequence.plan.terms)
            raise SpoiledDecodeError(
                f"{error} (in force: {in_force})" if in_force else str(error)
            ) from None
        finally:
            # Tokens decoded before a failure count, too; a reset context records nothing.
            stop = self._llm.n_tokens
            if stop > start:
                self._ledger.record(start, sequence.keys(start, stop))
                self._logits_key = sequence.logits_key(stop - 1)

    # ---- copies ------------------------------------------------------------------------------

    def taken(self, n_tokens: int) -> CachedSteering:
        """Return the steering of the first tokens in the context."""
        return CachedSteering(self._ledger.keys()[:n_tokens].tobytes(), self._logits_key)

    def give(self, steering: CachedSteering) -> None:
        """Take over the steering of tokens that were put back into the context."""
        self._ledger = CacheLedger(np.frombuffer(steering.keys, np.uint64))
        self._logits_key = steering.logits_key

    # ---- states ------------------------------------------------------------------------------

    def save_to(self, state: LlamaState) -> None:
        """Put the steering of the tokens in the context into a saved state."""
        setattr(state, _KEYS, self._ledger.keys()[: self._llm.n_tokens])
        setattr(state, _N_PROMPT, self.n_prompt)

    def load_from(self, state: LlamaState) -> None:
        """Take over the steering of a loaded state's tokens; without a record, no steering."""
        keys = getattr(state, _KEYS, None)
        self._ledger = CacheLedger(np.zeros(state.n_tokens, np.uint64) if keys is None else keys)
        # Decisions of another sequence's gates do not hold for this sequence.
        self.sequence = None
        self._loaded_n_prompt = getattr(state, _N_PROMPT, None)
