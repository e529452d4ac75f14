"""`SteeredLlama`: a `llama_cpp.Llama` that is steered per request."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from llama_cpp import Llama, LlamaState

from pysteer.chat.conversation import Conversation
from pysteer.chat.handler import chat_arguments
from pysteer.errors import HookError, SteeringError
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.pack import SteeringPack
from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import (
    INHERIT,
    Inherit,
    PackLike,
    PolicyLike,
    read_pack,
    read_policy,
)
from pysteer.runtime.cache import SteeredCache
from pysteer.runtime.generation import ActiveSteering, Generation, Request
from pysteer.runtime.handler_chats import HandlerChats
from pysteer.runtime.limits import MAX_RELATIVE_NORM
from pysteer.runtime.plan import INJECTIONS, UNSTEERED, Injection
from pysteer.runtime.report import SteeringReport
from pysteer.runtime.request_plans import RequestPlans
from pysteer.runtime.requests import RequestOptions, SteeredRequests
from pysteer.runtime.token_limit import TokenLimit, limited
from pysteer.runtime.turns import Turns

_GENERATE = inspect.signature(Llama.generate)


class SteeredLlama(HookedLlama):
    """A `llama_cpp.Llama` whose requests can be steered, each by its own categories.

    `create_completion`, `create_chat_completion` and calling the object take two more arguments:

    - `steering`: a mapping of category to strength (forced: the category acts on every prompt; 1.0
      is the recommended strength) or to "auto" (gated: the category acts if the router finds the
      category in the prompt); "auto" alone gates all categories; None is off.
    - `policy`: a `Policy`, its data or a YAML file; laid over the model's policy for this request.

    Where `steering` is left out, the innermost `with llm.steering(...)` block of the thread or
    asyncio task applies, else the policy: without one, every category that the pack's router knows
    is gated. A request keeps its steering to the end, also while its stream is read later. Every
    result, and the last chunk of every stream, reports the steering under the key "steering"; see
    `SteeringReport`.

    A gate decides once, at the last prompt token, while the prompt is read (but see
    `Policy.recheck`). A category with a closed gate leaves the answer unchanged to the last bit. If
    a category fires that steers prompt tokens too, the prompt is processed once more.

    Args:
        model_path: a GGUF model.
        pack: a `SteeringPack`, a pack file, or a plain llama.cpp control-vector file (one category,
            named after the file's stem); or a list of these, as one pack. Without a pack, nothing
            can be steered.
        policy: a `Policy`, its data, or a YAML file; laid over the pack's policy.
        injection: route of directions into the graph: "auto"; "resident" or "hooked" for tests; see
            `pysteer.runtime.plan.INJECTIONS`.
        max_relative_norm: the most that a category may change a hidden state, in multiples of the
            typical norm of the residual stream at its layer; None for no bound. Requests with
            stronger steering are refused.
        **llama_arguments: `rpc_servers` (see `HookedLlama`), and all arguments of
            `llama_cpp.Llama`.

    Raises:
        FormatError: the pack or policy file is damaged or of another kind.
        ModelMismatchError: the pack is for another model.
        SteeringError: the model cannot be loaded, an argument is unknown, or the policy does not
            fit the pack.
        HookError: the llama.cpp or the model cannot be hooked, or lacks a site that the policy asks
            for.

    Examples:
        >>> from pysteer import shipped
        >>> llm = SteeredLlama(
        ...     shipped.default_model(), pack=shipped.default_pack(), n_ctx=256, verbose=False
        ... )
        >>> result = llm.create_completion("The sea is", steering={"malware": 1.0}, max_tokens=4)
        >>> result["steering"]["mode"]
        'forced'
        >>> with llm.steering(None):
        ...     llm.create_completion("The sea is", max_tokens=4)["steering"]["mode"]
        'off'
        >>> llm.close()
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        pack: PackLike | None = None,
        policy: PolicyLike | None = None,
        injection: Injection = "auto",
        max_relative_norm: float | None = MAX_RELATIVE_NORM,
        **llama_arguments: Any,
    ) -> None:
        if injection not in INJECTIONS:
            raise SteeringError(
                f"unknown injection {injection!r}; use one of {', '.join(INJECTIONS)}"
            )
        self._injection = injection
        self._max_relative_norm = max_relative_norm
        self._policy = read_policy(policy)
        self._pack = read_pack(pack)
        if self._pack is not None and llama_arguments.get("vocab_only"):
            raise HookError("a model without weights (vocab_only) cannot be steered")
        super().__init__(model_path, **llama_arguments)
        try:
            plans = RequestPlans(
                self,
                self._pack,
                self._policy,
                injection=injection,
                max_relative_norm=max_relative_norm,
            )
        except SteeringError:
            self.close()
            raise
        # Without a circle, the model is freed when the last reference to it goes.
        proxy = cast(HookedLlama, weakref.proxy(self))
        self._cache = SteeredCache(proxy)
        self._turns = Turns(proxy, self._cache)
        self._chats = HandlerChats(proxy, self._cache, self._turns)
        self._requests = SteeredRequests(proxy, plans, self._turns)

    @property
    def pack(self) -> SteeringPack | None:
        """The pack given at construction."""
        return self._pack

    @property
    def last_steering(self) -> SteeringReport:
        """Report of the last request, of whichever thread, or of the request under way so far.

        Waits for the step that another thread runs.
        """
        with self.context.lock:
            latest = self._turns.current
            return self._cache.report() if latest is None else latest.report()

    @contextmanager
    def steering(self, steering: Steering, policy: PolicyLike | None = None) -> Iterator[None]:
        """Steer everything inside the `with` block that does not bring its own `steering`.

        Holds in this thread or asyncio task, and in tasks made inside the block. In a generator
        that others advance, give each request `steering=` instead.

        Args:
            steering: as for a request; None is off. Blocks nest; the innermost counts.
            policy: as for a request.

        Raises:
            UnknownCategoryError: a category that the pack lacks.
            SteeringError: a strength that is not a finite number, or there is no pack; or the block
                ends in another thread or asyncio task than it began in.
        """
        with self._requests.entered(ActiveSteering(self._requests.plan(steering, policy))):
            yield

    # ---- requests ----------------------------------------------------------------------------

    def create_completion(
        self,
        *args: Any,
        steering: Steering | Inherit = INHERIT,
        policy: PolicyLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """`llama_cpp.Llama.create_completion`, steered; see the class.

        The router reads the whole prompt: only a chat marks the user's message.
        """
        limit, kwargs = limited(self, args, kwargs)
        if isinstance(kwargs["prompt"], list) and self._turns.running is None:
            self._settle(kwargs["prompt"])

        def complete() -> Any:
            return limit.finish(super(SteeredLlama, self).create_completion(**kwargs))

        return self._requests.run(complete, RequestOptions(steering, policy))

    def __call__(
        self,
        *args: Any,
        steering: Steering | Inherit = INHERIT,
        policy: PolicyLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """`llama_cpp.Llama.__call__`, steered; see the class."""
        options = RequestOptions(steering, policy)
        return self._requests.run(super().__call__, options, *args, **kwargs)

    def create_chat_completion(
        self,
        *args: Any,
        steering: Steering | Inherit = INHERIT,
        policy: PolicyLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """`llama_cpp.Llama.create_chat_completion`, steered; see the class."""
        conversation = Conversation(self, chat_arguments(args, kwargs))
        options = RequestOptions(steering, policy, conversation)

        def chat(*args: Any, **kwargs: Any) -> Any:
            make = partial(super(SteeredLlama, self).create_chat_completion, *args, **kwargs)
            if self.chat_handler is None:
                return make()
            return self._chats.run(self._requests.current(), make)  # it may evaluate by itself

        return self._requests.run(chat, options, *args, **kwargs)

    # ---- tokens ------------------------------------------------------------------------------

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate` under the steering in force at the time of the call."""
        active = self._requests.current()
        if active.request is not None and self._turns.running is None:
            self._settle(list(tokens))
            # The request holds the lock, and has put its steering in force.
            return self._generate(active.request, active, list(tokens), *args, **kwargs)
        request = Request()
        generated = self._generate(request, active, list(tokens), *args, **kwargs)
        return self._requests.stream(active._replace(request=request), generated)

    def _settle(self, prompt: list[int]) -> None:
        """Complete the prompt that a chat handler has evaluated by itself, if one does."""
        self._chats.settle(self._requests.in_force, prompt, super().eval)

    def _generate(
        self,
        request: Request,
        active: ActiveSteering,
        tokens: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> Generator[int, Sequence[int] | None, None]:
        arguments = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        reset = arguments.get("reset", True)
        prompt = tokens if reset else [*self._cache.marked, *tokens]
        sequence = self._cache.begin(active, prompt)
        generation = Generation(request, sequence, n_prompt=len(prompt))
        criteria = arguments.get("stopping_criteria")
        limit = criteria if isinstance(criteria, TokenLimit) else None
        if limit is not None:
            kwargs["stopping_criteria"] = limit.criteria  # create_completion passes it by name
        if request.latest is not None and request.latest.over:
            request.latest = None  # nothing of it is needed any more
        try:
            with self._turns.step(generation):
                request.latest = generation
                self._cache.sequence = sequence
                tokens = self._cache.reuse(sequence, request, tokens, reset=reset)
            inner = super().generate(tokens, *args, **kwargs)
            yield from self._drawn(generation, inner, limit, prompt)
        finally:
            generation.over = True

    def _drawn(
        self,
        generation: Generation,
        inner: Generator[int, Sequence[int] | None, None],
        limit: TokenLimit | None,
        prompt: list[int],
    ) -> Generator[int, Sequence[int] | None, None]:
        """Draw tokens in turns with other generations, to the end or to the limit."""
        n = None
        if limit is not None:
            n = limit.begin(prompt, partial(self._turns.step, generation))
        sent: Sequence[int] | None = None
        while n is None or generation.n_drawn < n:
            with self._turns.step(generation):
                generation.request.latest = generation
                try:
                    token = inner.send(sent)
                except StopIteration:
                    return
                generation.draw()
            if limit is not None:
                limit.note(token)
            sent = yield token
        if limit is not None:
            limit.reached = True  # `create_completion` asks for more

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """`llama_cpp.Llama.sample`; called directly, it leaves the samplers of streams alone."""
        with self.context.lock, self._turns.own_sampler():
            token: int = super().sample(*args, **kwargs)
            return token

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval` under the steering in force.

        Keeps the tokens in the context, even under other steering: a caller may change the steering
        between two tokens. `generate` and all completions recompute instead. Called directly, the
        first tokens after `reset()` are the prompt, and a gate's decision at the last prompt token
        holds until the next `reset()`. If gated steering comes into force only afterwards, the
        tokens that the router reads are computed once more.
        """
        with self.context.lock:
            self.require_open()
            generation = self._turns.running
            if generation is not None:  # the call is its own
                self._evaluate_step(generation, tokens)
                return
            active = self._requests.current()
            if active.request is None:
                self._turns.take(None)
            if self._chats.evaluate(active, tokens, super().eval):
                return
            sequence = self._cache.continued(active, tokens)
            if active.request is not None:
                self._turns.evaluate_prompt(active.request, sequence)
            self._cache.evaluate(sequence, tokens, super().eval)

    def _evaluate_step(self, generation: Generation, tokens: Sequence[int]) -> None:
        """Evaluate the prompt, or the token drawn last and as much of a draft as is useful."""
        sequence, start = generation.sequence, self.n_tokens
        if generation.n_drawn:
            tokens = tokens[: 1 + self._cache.draft_room(sequence, tokens[1:])]
        self._cache.sequence = sequence
        self._cache.evaluate(sequence, tokens, super().eval)
        known = start + 1 if generation.n_drawn else generation.n_prompt
        generation.n_accepted = max(generation.n_accepted, known)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the context. Set lower, the later tokens are never used again."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        if "_requests" not in self.__dict__:  # the constructor is under way
            self._n_tokens = n_tokens
            return
        active = self._requests.in_force
        if n_tokens < self._n_tokens:
            self._requires_eval = True  # the logits in the context are those of a later token
        self._n_tokens = n_tokens
        self._cache.moved(n_tokens, active)

    def reset(self) -> None:
        """`llama_cpp.Llama.reset`; an open stream goes on all the same."""
        with self.context.lock:
            if self._turns.running is None:  # else `generate` calls it
                self._turns.take(None)
            super().reset()

    # ---- captures, embeddings and states -----------------------------------------------------

    def capture(self, *args: Any, **kwargs: Any) -> Any:
        """`HookedLlama.capture` under the `with llm.steering(...)` block in force.

        Raises:
            SteeringError: gated steering; its effect depends on more than the tokens.
        """
        with self.context.lock:
            self.require_open()
            self._turns.take(None)
            active = self._requests.in_force or ActiveSteering(UNSTEERED)
            if active.plan.gated:
                raise SteeringError(
                    "capture under gated steering is not possible; force categories"
                )
            tokens = list(args[0] if args else kwargs["tokens"])
            self._cache.install(self._cache.start(ActiveSteering(active.plan), tokens))
            return super().capture(*args, **kwargs)

    def capture_means(self, *args: Any, **kwargs: Any) -> Any:
        """`HookedLlama.capture_means`, never steered.

        Raises:
            SteeringError: inside a `with llm.steering(...)` block.
        """
        with self.context.lock:
            self._end_steering("captures of several sequences")
            return super().capture_means(*args, **kwargs)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """`llama_cpp.Llama.embed`; embeddings are never steered.

        Raises:
            SteeringError: inside a `with llm.steering(...)` block.
        """
        with self.context.lock:
            self._end_steering("embeddings")
            try:
                with self.context.decoding([]):
                    return super().embed(*args, **kwargs)
            except BaseException:
                self.context.memory.clear()  # embeddings of the texts before the failure
                self.reset()
                raise

    def _end_steering(self, what: str) -> None:
        self.require_open()
        self._turns.take(None)
        current = self._requests.in_force
        if current is not None and current.plan is not UNSTEERED:
            raise SteeringError(
                f"{what} cannot be steered; call it outside `with llm.steering(...)`"
            )
        self._cache.install(None)

    def save_state(self) -> LlamaState:
        """`llama_cpp.Llama.save_state`; the state remembers the steering of its tokens."""
        with self.context.lock:
            state = super().save_state()
            self._cache.save_to(state)
            return state

    def load_state(self, state: LlamaState) -> None:
        """`llama_cpp.Llama.load_state`; a plain `llama_cpp.Llama`'s state counts as unsteered."""
        with self.context.lock:
            self._turns.take(None)
            with self._cache.evaluating():
                super().load_state(state)
            self._cache.load_from(state)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "pack": self._pack,
            "policy": self._policy,
            "injection": self._injection,
            "max_relative_norm": self._max_relative_norm,
        }
