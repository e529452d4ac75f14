"""The tokens in a model's context, each with the steering of its computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np
from llama_cpp import LlamaState

from pysteer.errors import SteeringError
from pysteer.llama.context import SpoiledDecodeError
from pysteer.llama.hooked import HookedLlama
from pysteer.llama.vocabulary import token_piece
from pysteer.runtime.generation import ActiveSteering, Request
from pysteer.runtime.handler_prompt import AgainError, HandlerPrompt, new_images
from pysteer.runtime.ledger import CachedSteering, CacheLedger, Keys, matching
from pysteer.runtime.plan import UNSTEERED
from pysteer.runtime.report import SteeringReport, report
from pysteer.runtime.sequence import IMAGE, SequenceSteering

# Attributes of a LlamaState: fingerprints of its tokens' steering, images in place of tokens, and
# the length of its prompt.
_KEYS: Final = "steering_keys"
_IMAGES: Final = "steering_images"
_N_PROMPT: Final = "steering_n_prompt"


def _naming(error: SpoiledDecodeError, sequence: SequenceSteering) -> SpoiledDecodeError:
    """Return the error with the categories in force."""
    in_force = ", ".join(f"{t.category}={t.strength:g}" for t in sequence.plan.terms)
    return SpoiledDecodeError(f"{error} (in force: {in_force})" if in_force else str(error))


def _image_gone() -> SteeringError:
    return SteeringError(
        "an image in the context would have to be computed again, because another request has used "
        "the model, the steering has changed, or a gate has to read a second prompt; make the chat "
        "again, and read a stream before the next request"
    )


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
    def marked(self) -> list[int]:
        """The tokens in the context, with `IMAGE` where an image stands."""
        tokens = self._llm.input_ids[: self._llm.n_tokens].copy()
        tokens[self._ledger.images()[: len(tokens)] != 0] = IMAGE
        marked: list[int] = tokens.tolist()
        return marked

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

    def start(self, active: ActiveSteering, prompt: Sequence[int] | None) -> SequenceSteering:
        """Return the steering of a sequence that begins with `prompt`; see `SequenceSteering`."""
        return SequenceSteering(
            active.plan,
            prompt,
            conversation=active.conversation,
            n_positions=self._llm.n_ctx(),
            piece=partial(token_piece, self._llm),
        )

    def begin(self, active: ActiveSteering, prompt: list[int]) -> SequenceSteering:
        """Return the steering of a generation: that of its chat handler's prompt, or a new one."""
        handled = None if active.request is None else active.request.prompt
        if handled is None:
            return self.start(active, prompt)
        return handled.take(prompt) or self.start(active, handled.mark(prompt))

    def continued(self, active: ActiveSteering, tokens: Sequence[int]) -> SequenceSteering:
        """Return the steering of the context, for `tokens` that are added by hand.

        Under another plan than before, or in an empty context, another sequence begins.
        """
        sequence, llm = self.sequence, self._llm
        ended = sequence is not None and sequence.begun and llm.n_tokens == 0
        if sequence is None or sequence.plan is not active.plan or ended:
            cached = self.marked
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
            SteeringError: steering is in force, and did not reach these positions.
            SpoiledDecodeError: as `HookedLlama.eval`.
        """
        self._ledger.forget(n_tokens)
        start = self._ledger.known
        if self._evaluating:
            return
        request = None if active is None else active.request
        prompt = None if request is None else request.prompt
        if prompt is not None and not prompt.open:
            prompt = None
        if start < n_tokens:
            keys = np.zeros(n_tokens - start, np.uint64)
            if prompt is not None:
                keys = self._image_keys(prompt, start, n_tokens)
                prompt.add_image(start, n_tokens)
            elif active is not None and active.plan.native is not None:
                self._llm.n_tokens = start  # the next decode removes what the caller left
                raise SteeringError(
                    "n_tokens was raised by hand over positions that steering did not reach; "
                    "evaluate tokens with eval(), images with a chat handler, or pass steering=None"
                )
            self._ledger.record(start, keys, new_images() if prompt is None else prompt.images)
            self._llm.input_ids[start:n_tokens] = 0  # no request's answer depends on other tokens
        if prompt is not None:
            self.watch(prompt)

    # ---- images ------------------------------------------------------------------------------

    def watch(self, prompt: HandlerPrompt) -> None:
        """Steer what the chat handler decodes by itself from here on."""
        sequence, start = prompt.sequence, self._llm.n_tokens
        room = self._llm.n_ctx() - start
        if sequence is None or sequence.native is None or room <= 0:
            return
        n_positions = min(prompt.n_positions(start), room)
        self._llm.context.end_foreign()
        sequence.follow(start, [IMAGE] * n_positions)
        self.install(sequence)
        self._llm.context.begin_foreign(start, n_positions)

    def _image_keys(self, prompt: HandlerPrompt, start: int, stop: int) -> Keys:
        """Return the fingerprints of an image that the handler decoded at [start, stop)."""
        sequence = prompt.sequence
        assert sequence is not None  # as long as the prompt is open
        keys = sequence.keys(start, stop)
        if sequence.native is None:
            return keys
        try:
            n_rows = self._llm.context.end_foreign()
        except SpoiledDecodeError as error:
            self._spoil(prompt)
            raise _naming(error, sequence) from None
        if n_rows == stop - start or not keys.any():
            return keys
        # Rows of several dimensions (M-RoPE) share positions.
        reached = sequence.keys(start, start + (n_rows or 0)) if prompt.tokens is None else keys
        if not n_rows or len({*keys.tolist(), *reached.tolist()}) > 1:
            raise SteeringError(
                f"steering did not reach an image whose {n_rows or 0} rows stand at "
                f"{stop - start} positions, and would have to differ among the rows; choose a "
                "scope that steers the whole image or none of it, or pass steering=None"
            )
        return keys

    def _spoil(self, prompt: HandlerPrompt) -> None:
        """Drop a context with values that are not finite, as `HookedLlama.eval` does."""
        prompt.open = False
        self._llm.context.memory.clear(data=True)
        self._llm.reset()

    def evaluate_part(
        self,
        prompt: HandlerPrompt,
        tokens: Sequence[int],
        evaluate: Callable[[Sequence[int]], None],
    ) -> None:
        """Evaluate tokens that a chat handler gives before it completes the prompt.

        Args:
            prompt: the prompt.
            tokens: the tokens that follow those in the context.
            evaluate: `HookedLlama.eval`.
        """
        assert prompt.sequence is not None  # as long as the prompt is open
        self.sequence = prompt.sequence
        prompt.add_text(self._llm.n_tokens, list(tokens))
        self._evaluate(prompt.sequence, tokens, evaluate)
        prompt.sequence.reprocess_from(self._llm.n_tokens)  # `settle` finds the rows that change
        self.watch(prompt)

    def settle(
        self,
        active: ActiveSteering,
        prompt: HandlerPrompt,
        tokens: list[int],
        evaluate: Callable[[Sequence[int]], None],
    ) -> bool:
        """Compute the rows that are not those of the steering, once the prompt is complete.

        Args:
            active: the steering of the request.
            prompt: the prompt.
            tokens: the prompt as the handler gives it to `create_completion`.
            evaluate: `HookedLlama.eval`.

        Returns:
            False if the handler evaluated nothing of this prompt itself.

        Raises:
            AgainError: the handler has to be called again, for an image.
            SteeringError: the handler made another prompt than before.
        """
        llm, n = self._llm, self._llm.n_tokens
        llm.context.end_foreign()
        prompt.open = False
        if tokens[:n] != self.tokens or not (prompt.starts or prompt.ranges):
            return False
        marked = [*self.marked, *tokens[n:]]
        if prompt.settle(tokens, marked):
            prompt.sequence = self.start(active, marked)
        sequence = prompt.sequence
        assert sequence is not None
        for _ in range(2):  # once for a gate to decide, and once under its decision
            n = llm.n_tokens
            same = self._computed_alike(sequence, prompt.images)
            if self._logits_key != sequence.logits_key(n - 1):
                same = min(same, n - 1)
            if same == len(tokens):
                break
            if same < self._first_text(sequence):
                prompt.again = True
                raise AgainError
            # In the handler's own parts, so that rows computed again are the same to the last bit.
            starts = prompt.text_starts(n)
            if same < n:
                same = same if self.cuts_back else 0
                same = max((start for start in starts if start <= same), default=same)
                self.rewind(same)
            inner = [start for start in starts if start > same]
            for start, stop in pairwise([same, *inner, n, len(tokens)]):
                if start < stop:
                    self._evaluate(sequence, tokens[start:stop], evaluate)
            sequence.reprocess_from(llm.n_tokens)
        return True

    def _computed_alike(self, sequence: SequenceSteering, images: int | None) -> int:
        """Return the number of positions from the start that a sequence would compute the same way.

        Args:
            sequence: the sequence.
            images: the number of its images; None: those in the context.
        """
        n = self._llm.n_tokens
        found = wanted = self._ledger.images()[:n]
        if images is not None:
            wanted = np.zeros_like(found)
            for start, stop in sequence.images:
                wanted[start:stop] = images
        alike = self._ledger.reusable(sequence.keys(0, n))
        return min(alike, matching(found, wanted), sequence.first_to_decode, n)

    def _first_text(self, sequence: SequenceSteering) -> int:
        """Return the position from which a sequence can be computed again without its handler."""
        end = sequence.images_end
        return end if self.cuts_back or not end else max(end, self._llm.n_tokens)

    def _require_no_image(self, start: int) -> None:
        """Raise SteeringError if tokens from `start` on cannot be evaluated again."""
        if self._ledger.images()[start if self.cuts_back else 0 : self._llm.n_tokens].any():
            raise _image_gone()

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
        images = 0 if request.prompt is None else request.prompt.images
        reusable = self._computed_alike(sequence, images if reset else None)
        stale = reusable < n or (n > 0 and sequence.logits_key(n - 1) != self._logits_key)
        if reset and stale:
            reusable = min(reusable, max(len(tokens) - 1, 0))
        exact = not llm._requires_eval and self.tokens == tokens
        if reset and not exact and not self.cuts_back:
            prefix = llm.longest_token_prefix(self.tokens, tokens[:-1])
            reusable = min(reusable, prefix)
        if reusable < self._first_text(sequence):
            if not (llm.draws_from_logits or self.cuts_back):
                raise SteeringError(
                    "this llama-cpp-python evaluates a prompt's last token twice, and a recurrent "
                    "model cannot after an image; install llama-cpp-python 0.3.32 or newer"
                )
            raise _image_gone()
        if reusable == n:
            return tokens
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
            self._require_no_image(sequence.first_to_decode)
            tokens = [*self.rewind(sequence.first_to_decode), *tokens]
        self._evaluate(sequence, tokens, evaluate)
        changed = sequence.reprocess_from(self._llm.n_tokens)
        if changed < self._llm.n_tokens:
            self._require_no_image(changed)
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
            raise _naming(error, sequence) from None
        finally:
            # Tokens decoded before a failure count, too; a reset context records nothing.
            stop = self._llm.n_tokens
            if stop > start:
                self._ledger.record(start, sequence.keys(start, stop))
                self._logits_key = sequence.logits_key(stop - 1)

    # ---- copies ------------------------------------------------------------------------------

    def taken(self, n_tokens: int) -> CachedSteering:
        """Return the steering of the first tokens in the context."""
        ledger = self._ledger
        keys, images = ledger.keys()[:n_tokens], ledger.images()[:n_tokens]
        return CachedSteering(keys.tobytes(), images.tobytes(), self._logits_key)

    def give(self, steering: CachedSteering) -> None:
        """Take over the steering of tokens that were put back into the context."""
        self._ledger = CacheLedger(
            np.frombuffer(steering.keys, np.uint64), np.frombuffer(steering.images, np.uint64)
        )
        self._logits_key = steering.logits_key

    # ---- states ------------------------------------------------------------------------------

    def save_to(self, state: LlamaState) -> None:
        """Put the steering of the tokens in the context into a saved state."""
        setattr(state, _KEYS, self._ledger.keys()[: self._llm.n_tokens])
        setattr(state, _IMAGES, self._ledger.images()[: self._llm.n_tokens])
        setattr(state, _N_PROMPT, self.n_prompt)

    def load_from(self, state: LlamaState) -> None:
        """Take over the steering of a loaded state's tokens; without a record, no steering."""
        keys = getattr(state, _KEYS, None)
        keys = np.zeros(state.n_tokens, np.uint64) if keys is None else keys
        self._ledger = CacheLedger(keys, getattr(state, _IMAGES, None))
        # Decisions of another sequence's gates do not hold for this sequence.
        self.sequence = None
        self._loaded_n_prompt = getattr(state, _N_PROMPT, None)
