"""`SteeredLlama`: a `llama_cpp.Llama` that is steered per request."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, TypeAlias

import llama_cpp
import numpy as np
from llama_cpp import Llama, LlamaState

from pysteer.chat.spans import last_user_text
from pysteer.errors import HookError, SteeringError
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import Steering
from pysteer.runtime.ledger import CacheLedger
from pysteer.runtime.plan import INJECTIONS, UNSTEERED, CompiledPlan, Injection, PlanCompiler
from pysteer.runtime.report import SteeringReport, report
from pysteer.runtime.sequence import SequenceSteering

PolicyLike: TypeAlias = "Policy | Mapping[str, Any] | str | os.PathLike[str]"
"""A policy, its data, or a YAML file."""

# Attributes of a LlamaState: what its tokens were computed under, and how many are the prompt.
_KEYS, _N_PROMPT = "steering_keys", "steering_n_prompt"
_GENERATE = inspect.signature(Llama.generate)

_log = logging.getLogger(__name__)


class InForce:
    """Marks an argument that was not given: what is in force stays in force."""

    def __repr__(self) -> str:
        return "in force"


IN_FORCE: Final = InForce()


class Request(NamedTuple):
    """What is in force: a plan and what the router needs to know of the prompt."""

    plan: CompiledPlan
    user: str | None = None  # what the user said last, for the router


class SteeredLlama(HookedLlama):
    """A `llama_cpp.Llama` whose requests can be steered, each by its own categories.

    `create_completion`, `create_chat_completion` and calling the object take two more arguments:

    - `steering`: a mapping of category to strength (it acts whatever the prompt is; 1.0 is what the
      pack recommends) or to "auto" (gated: it acts if the router finds the category in the prompt);
      "auto" alone, all categories gated; or None, off.
    - `policy`: a `Policy`, its data or a YAML file, which goes before the model's for this request.

    Where `steering` is left out, what `with llm.steering(...)` put in force applies, else the
    policy: without one, every category that the pack's router knows is gated. A request keeps the
    steering it was made with, also while its stream is read later. Every result, and the last chunk
    of every stream, says what was done under the key "steering"; see `SteeringReport`.

    A gate is decided once, at the last prompt token, while the prompt is read, and held (but see
    `Policy.recheck`). A category whose gate is closed leaves the answer exactly as it was; one that
    fires, and steers prompt tokens too, has the prompt processed once more.

    Args:
        model_path: a GGUF model.
        pack: a `SteeringPack`, a pack file, or a plain llama.cpp control-vector file (one category,
            named after the file's stem). Without one, nothing can be steered.
        policy: a `Policy`, its data, or a YAML file, which goes before the pack's own.
        injection: the way of directions into the model: "auto", or "resident" or "hooked" to
            insist, for tests; see `pysteer.runtime.plan.INJECTIONS`.
        **llama_arguments: everything that `llama_cpp.Llama` takes.

    Raises:
        FormatError: the pack or policy file is damaged or something else.
        ModelMismatchError: the pack is for another model.
        SteeringError: the policy does not fit the pack.
        HookError: the llama.cpp or the model cannot be hooked, or lacks a site that the policy asks
            for.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        pack: SteeringPack | str | os.PathLike[str] | None = None,
        policy: PolicyLike | None = None,
        injection: Injection = "auto",
        **llama_arguments: Any,
    ) -> None:
        if injection not in INJECTIONS:
            raise SteeringError(
                f"unknown injection {injection!r}; use one of {', '.join(INJECTIONS)}"
            )
        self._injection = injection
        self._policy = read_policy(policy)
        if pack is None or isinstance(pack, SteeringPack):
            self._pack = pack
        else:
            self._pack = SteeringPack.load(pack)
        self._in_force: list[Request] = []
        self._ledger = CacheLedger()
        self._sequence: SequenceSteering | None = None
        self._installed: SequenceSteering | None = None
        self._loaded_n_prompt: int | None = None  # of the state in the context, until it is used
        self._logits_key = 0  # of the last token decoded
        self._warned_unsteered = False
        if self._pack is not None and llama_arguments.get("vocab_only"):
            raise HookError("a model without weights (vocab_only) has nothing to steer")
        super().__init__(model_path, **llama_arguments)
        try:
            if self._pack is not None:
                self._pack.check_fits(self.base_model)
            self._compiler = PlanCompiler(
                self._pack,
                self._policy,
                n_layer=self.n_layer,
                n_embd=self.n_embd(),
                # Of a vocabulary alone nothing was probed, and there is no pack that could need it.
                sites=None if llama_arguments.get("vocab_only") else self.sites,
                injection=injection,
            )
        except SteeringError:
            self.close()
            raise

    @property
    def pack(self) -> SteeringPack | None:
        """The pack given at construction."""
        return self._pack

    @property
    def last_steering(self) -> SteeringReport:
        """What was done to the last request, or what has been done so far to one under way."""
        if self._sequence is None:
            return report(UNSTEERED, None, 0)
        return self._sequence.report(self.n_tokens)

    # ---- what is in force --------------------------------------------------------------------

    @contextmanager
    def steering(self, steering: Steering, policy: PolicyLike | None = None) -> Iterator[None]:
        """Steer everything inside the `with` block that does not bring its own `steering`.

        Args:
            steering: as for a request; None is off. Blocks nest; the innermost counts.
            policy: as for a request.

        Raises:
            UnknownCategoryError: a category that the pack lacks.
            SteeringError: a strength that is not a finite number, or there is no pack.
        """
        with self._under(Request(self._compile(steering, policy))):
            yield

    @contextmanager
    def _under(self, request: Request) -> Iterator[None]:
        self._in_force.append(request)
        try:
            yield
        finally:
            self._in_force.pop()

    def _compile(
        self, steering: Steering | InForce, policy: PolicyLike | None = None
    ) -> CompiledPlan:
        self._require_open()
        if not isinstance(steering, InForce):
            return self._compiler.compile(steering, read_policy(policy))
        if self._in_force and policy is None:
            return self._in_force[-1].plan
        plan = self._compiler.by_policy(read_policy(policy))
        if plan is UNSTEERED:
            self._warn_unsteered()
        return plan

    def _warn_unsteered(self) -> None:
        pack = self._pack
        if pack is not None and pack.router is None and not self._warned_unsteered:
            self._warned_unsteered = True
            _log.warning(
                "the pack has no router, so nothing is steered unless a request brings "
                "steering={category: strength} or stands in `with llm.steering(...)`"
            )

    def _current(self) -> Request:
        if self._in_force:
            return self._in_force[-1]
        return Request(self._compiler.by_policy())

    def _start(self, request: Request, prompt: Sequence[int]) -> SequenceSteering:
        """The steering of a sequence that begins with `prompt`."""
        return SequenceSteering(
            request.plan,
            prompt,
            user=request.user,
            n_positions=self.n_ctx(),
            piece=self._piece,
        )

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.n_vocab():  # llama.cpp would end the process
            raise SteeringError(f"there is no token {token}; 0 to {self.n_vocab() - 1} are")
        return self.detokenize([token], special=True)

    def _install(self, sequence: SequenceSteering) -> None:
        """Make the native hook do from the next decode on what `sequence` says."""
        if sequence is not self._installed:
            self._set_sequence(0, sequence.native)
            self._installed = sequence

    def _stream(self, request: Request, stream: Iterator[Any]) -> Generator[Any, Any, None]:
        """Advance `stream` under `request`, whatever is in force between its items."""
        sent: Any = None
        try:
            while True:
                with self._step_lock:
                    self._require_open()
                    with self._under(request):
                        try:
                            if sent is not None and isinstance(stream, Generator):
                                item = stream.send(sent)
                            else:
                                item = next(stream)
                        except StopIteration:
                            return
                        self._tell(item)
                sent = yield item
        finally:
            if isinstance(stream, Generator):
                stream.close()

    def _tell(self, result: Any) -> None:
        """Put what was done into a finished result, or the last chunk of a stream."""
        choices = result.get("choices") if isinstance(result, dict) else None
        if choices and choices[0].get("finish_reason") is not None:
            result["steering"] = self.last_steering.to_dict()

    def _request(
        self,
        call: Any,
        steering: Steering | InForce,
        policy: PolicyLike | None,
        user: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        plan = self._compile(steering, policy)
        if user is None and self._in_force:  # a completion that a chat is made of
            user = self._in_force[-1].user
        request = Request(plan, user)
        with self._step_lock:
            self._require_open()
            with self._under(request):
                result = call(*args, **kwargs)
                self._tell(result)
        return self._stream(request, result) if isinstance(result, Iterator) else result

    # ---- llama_cpp.Llama's interface ---------------------------------------------------------

    def create_completion(
        self,
        *args: Any,
        steering: Steering | InForce = IN_FORCE,
        policy: PolicyLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """`llama_cpp.Llama.create_completion`, steered; see the class.

        The router looks at the whole prompt: what of it a user said is for a chat to know.
        """
        call = super().create_completion
        return self._request(call, steering, policy, None, args, kwargs)

    def __call__(
        self,
        *args: Any,
        steering: Steering | InForce = IN_FORCE,
        policy: PolicyLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """`llama_cpp.Llama.__call__`, steered; see the class."""
        return self._request(super().__call__, steering, policy, None, args, kwargs)

    def create_chat_completion(
        self,
        *args: Any,
        steering: Steering | InForce = IN_FORCE,
        policy: PolicyLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """`llama_cpp.Llama.create_chat_completion`, steered; see the class."""
        messages = args[0] if args else kwargs.get("messages", ())
        call = super().create_chat_completion
        return self._request(call, steering, policy, last_user_text(messages), args, kwargs)

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate` under the steering in force at the time of the call."""
        return self._stream(self._current(), self._generate(list(tokens), *args, **kwargs))

    def _generate(
        self, tokens: list[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        # The base class reuses cached tokens that match the prompt. Let it see only those that
        # were computed under the steering that this request would compute them under.
        arguments = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        reset = arguments.get("reset", True)
        prompt = tokens if reset else [*self._input_ids.tolist(), *tokens]
        sequence = self._start(self._current(), prompt)
        reusable = min(
            self._ledger.reusable(sequence.keys(0, self.n_tokens)),
            sequence.first_to_decode,
            self.n_tokens,
        )
        if reset and not self._cuts_back:  # the base class would cut it back to what matches
            reusable = min(
                reusable, self.longest_token_prefix(self._input_ids.tolist(), tokens[:-1])
            )
        if reusable < self.n_tokens:
            if not reset:  # the caller goes on from the context: recompute what it no longer is
                tokens = prompt[reusable:]
            self._requires_eval = True
            if self._cuts_back:
                self.n_tokens = reusable
            else:
                if not reset:
                    tokens = prompt
                self.reset()
        elif reusable and sequence.logits_key(reusable - 1) != self._logits_key:
            self._requires_eval = True
        inner = super().generate(tokens, *args, **kwargs)
        sent: Sequence[int] | None = None
        while True:
            self._sequence = sequence  # another request may have run since
            try:
                token = inner.send(sent)
            except StopIteration:
                return
            sent = yield token

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval` under the steering in force.

        Evaluates after the tokens in the context, whatever those were computed under: to change the
        steering between two tokens is a caller's right. `generate` and all completions recompute.
        Called directly, the first tokens after `reset()` are the prompt, and what a gate decides at
        the last of them holds until the next `reset()`. Where gated steering comes into force only
        afterwards, the router has the tokens that it looks at computed once more.
        """
        with self._step_lock:
            self._require_open()
            sequence = self._sequence_for(tokens)
            if not sequence.begun and sequence.first_to_decode < self.n_tokens:
                tokens = [*self._rewind(sequence.first_to_decode), *tokens]
            self._evaluate(sequence, tokens)
            if sequence.wants_reprocess:
                self._reprocess(sequence)

    def _sequence_for(self, tokens: Sequence[int]) -> SequenceSteering:
        request = self._current()
        sequence = self._sequence
        if sequence is None or sequence.plan is not request.plan or self._ended(sequence):
            prompt = [*self._input_ids.tolist(), *tokens]
            n_prompt = self._loaded_n_prompt if sequence is None else sequence.n_prompt
            if self.n_tokens > 0 and n_prompt is not None:
                prompt = prompt[:n_prompt]
            sequence = self._start(request, prompt)
            sequence.follow(0, self._input_ids.tolist())
        self._sequence = sequence
        return sequence

    @property
    def _cuts_back(self) -> bool:
        """Whether the context can be cut back to an earlier position.

        The state of recurrent models cannot, nor can a sliding window that has dropped the first
        tokens (`swa_full=False`): what an earlier position attended to is gone.
        """
        if not self.batches_sequences:
            return False
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self.ctx), 0)
        return self.n_tokens == 0 or first == 0

    def _rewind(self, position: int) -> list[int]:
        """Cut the context back to a position, or to nothing if it cannot be; gives what is gone."""
        tokens: list[int] = self._input_ids.tolist()
        if not self._cuts_back:
            self.reset()
            return tokens
        self.n_tokens = position
        return tokens[position:]

    def _ended(self, sequence: SequenceSteering) -> bool:
        """Whether the context was emptied since, so that another sequence begins."""
        return self.n_tokens == 0 and sequence.begun

    def _evaluate(self, sequence: SequenceSteering, tokens: Sequence[int]) -> None:
        start = self.n_tokens
        sequence.follow(start, tokens)
        sequence.begun = True
        self._install(sequence)
        try:
            super().eval(tokens)
        finally:
            # What was decoded before a failure counts too; a reset context records nothing.
            if self.n_tokens > start:
                self._ledger.record(start, sequence.keys(start, self.n_tokens))
                self._logits_key = sequence.logits_key(self.n_tokens - 1)

    def _reprocess(self, sequence: SequenceSteering) -> None:
        """Compute the prompt once more, now that a category has fired that steers it."""
        self._evaluate(sequence, self._rewind(sequence.hold(self.n_tokens)))

    def capture(self, *args: Any, **kwargs: Any) -> Any:
        """`HookedLlama.capture` under the steering that `with llm.steering(...)` put in force.

        Raises:
            SteeringError: gated steering; what it would do depends on more than the tokens.
        """
        with self._step_lock:
            self._require_open()
            plan = self._in_force[-1].plan if self._in_force else UNSTEERED
            if plan.gated:
                raise SteeringError(
                    "capture under gated steering is not possible; force categories"
                )
            tokens = list(args[0] if args else kwargs["tokens"])
            self._install(self._start(Request(plan), tokens))
            return super().capture(*args, **kwargs)

    def capture_means(self, *args: Any, **kwargs: Any) -> Any:
        """`HookedLlama.capture_means`, never steered.

        Raises:
            SteeringError: `with llm.steering(...)` is in force.
        """
        with self._step_lock, self._unsteered("captures of several sequences"):
            return super().capture_means(*args, **kwargs)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """`llama_cpp.Llama.embed`; embeddings are never steered.

        Raises:
            SteeringError: `with llm.steering(...)` is in force.
        """
        with self._step_lock, self._unsteered("embeddings"), self._decoding([]):
            return super().embed(*args, **kwargs)

    @contextmanager
    def _unsteered(self, what: str) -> Iterator[None]:
        self._require_open()
        if self._in_force and self._in_force[-1].plan is not UNSTEERED:
            raise SteeringError(
                f"{what} cannot be steered; call it outside `with llm.steering(...)`"
            )
        self._set_sequence(0, None)
        self._installed = None
        yield

    def save_state(self) -> LlamaState:
        """`llama_cpp.Llama.save_state`; the state remembers what its tokens were computed under."""
        with self._step_lock:
            self._require_open()
            state = super().save_state()
            setattr(state, _KEYS, self._ledger.keys()[: self.n_tokens])
            n_prompt = self._loaded_n_prompt if self._sequence is None else self._sequence.n_prompt
            setattr(state, _N_PROMPT, n_prompt)
            return state

    def load_state(self, state: LlamaState) -> None:
        """`llama_cpp.Llama.load_state`; a plain `llama_cpp.Llama`'s state counts as unsteered."""
        with self._step_lock:
            self._require_open()
            super().load_state(state)
            keys = getattr(state, _KEYS, None)
            self._ledger = CacheLedger(
                np.zeros(state.n_tokens, np.uint64) if keys is None else keys
            )
            # What the gates of another sequence decided says nothing of this one.
            self._sequence = None
            self._loaded_n_prompt = getattr(state, _N_PROMPT, None)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "pack": self._pack,
            "policy": self._policy,
            "injection": self._injection,
        }


def read_policy(policy: PolicyLike | None) -> Policy | None:
    """The policy that an argument stands for.

    Raises:
        FormatError: a file that is none.
        SteeringError: data that is none.
    """
    if policy is None or isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_content(policy)
    return Policy.load(policy)
