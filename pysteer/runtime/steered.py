"""`SteeredLlama`: a `llama_cpp.Llama` that is steered per request."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from llama_cpp import Llama, LlamaState

from pysteer import _native
from pysteer.errors import HookError, SteeringError
from pysteer.hooked import HookedLlama
from pysteer.pack import SteeringPack
from pysteer.runtime.ledger import CacheLedger
from pysteer.runtime.plan import (
    MODES,
    UNSTEERED,
    CompiledPlan,
    Mode,
    check_strengths,
    compile_plan,
)

Steering: TypeAlias = "Mapping[str, float | str] | None"
"""Category to strength, or None for off."""

_RUNS = "steering_runs"  # attribute of a LlamaState: what its tokens were computed under

_PLANS_KEPT = 16  # compiled ones, so that requests that alternate do not compile each time
_GENERATE = inspect.signature(Llama.generate)

_log = logging.getLogger(__name__)


class _InForce:
    """Marks an argument that was not given: what is in force stays in force."""

    def __repr__(self) -> str:
        return "in force"


IN_FORCE: Final = _InForce()


class SteeredLlama(HookedLlama):
    """A `llama_cpp.Llama` whose requests can be steered, each by its own categories.

    `create_completion`, `create_chat_completion` and calling the object take one more argument,
    `steering`: a mapping of category to strength (1.0 is what the pack recommends), or None for
    off. Left out, whatever `with llm.steering(...)` put in force applies, else nothing. A request
    keeps the steering it was made with, also while its stream is read later.

    Args:
        model_path: a GGUF model.
        pack: a `SteeringPack`, a pack file, or a plain llama.cpp control-vector file (one category,
            named after the file's stem). Without one, nothing can be steered.
        mode: how the directions get in: "auto", or "resident" or "hooked" to insist, for tests.
        **llama_arguments: everything that `llama_cpp.Llama` takes.

    Raises:
        FormatError: the pack file is damaged or something else.
        ModelMismatchError: the pack is for another model.
        HookError: the llama.cpp or the model cannot be hooked.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        pack: SteeringPack | str | os.PathLike[str] | None = None,
        mode: Mode = "auto",
        **llama_arguments: Any,
    ) -> None:
        if mode not in MODES:
            raise SteeringError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
        self._mode = mode
        if pack is None or isinstance(pack, SteeringPack):
            self._pack = pack
        else:
            self._pack = SteeringPack.load(pack)
        self._in_force: list[CompiledPlan] = []
        self._plans: dict[tuple[object, ...], CompiledPlan] = {}
        self._installed = UNSTEERED
        self._ledger = CacheLedger()
        self._last_logits_key = UNSTEERED.key
        self._warned_unsteered = False
        super().__init__(model_path, **llama_arguments)
        self._width = self.n_embd()
        if self._pack is not None:
            try:
                self._pack.check_fits(self.base_model)
            except SteeringError:
                self.close()
                raise

    @property
    def pack(self) -> SteeringPack | None:
        """The pack given at construction."""
        return self._pack

    # ---- what is in force --------------------------------------------------------------------

    @contextmanager
    def steering(self, steering: Steering) -> Iterator[None]:
        """Steer everything inside the `with` block that does not bring its own `steering`.

        Args:
            steering: category to strength, or None for off. Blocks nest; the innermost counts.

        Raises:
            UnknownCategoryError: a category that the pack lacks.
            SteeringError: a strength that is not a finite number, or there is no pack.
        """
        with self._under(self._compile(steering)):
            yield

    @contextmanager
    def _under(self, plan: CompiledPlan) -> Iterator[None]:
        self._in_force.append(plan)
        try:
            yield
        finally:
            self._in_force.pop()

    def _compile(self, steering: Steering | _InForce) -> CompiledPlan:
        if isinstance(steering, _InForce):
            if self._in_force:
                return self._in_force[-1]
            self._warn_unsteered()
            return UNSTEERED
        if steering is None:
            return UNSTEERED
        if type(steering) is not dict and not isinstance(steering, Mapping):
            raise SteeringError(
                f"steering={steering!r}: give a mapping of category to strength, or None"
            )
        if not steering:
            return UNSTEERED
        if self._pack is None:
            raise SteeringError("there is nothing to steer with; pass pack= to SteeredLlama")
        self._require_open()
        # The types belong to the key because True == 1 == 1.0, and True is no strength.
        key = tuple([(name, type(value), value) for name, value in steering.items()])
        try:
            plan = self._plans.get(key)
        except TypeError:  # not hashable, hence no number: the check below says which
            plan = None
        if plan is None:
            plan = compile_plan(
                self._pack,
                check_strengths(self._pack, steering),
                n_layer=self._n_layer,
                n_embd=self._width,
                mode=self._mode,
            )
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return plan

    def _warn_unsteered(self) -> None:
        if self._pack is not None and not self._warned_unsteered:
            self._warned_unsteered = True
            _log.warning(
                "this version applies no router, so nothing is steered unless a request brings "
                "steering={category: strength} or stands in `with llm.steering(...)`"
            )

    def _current(self) -> CompiledPlan:
        return self._in_force[-1] if self._in_force else UNSTEERED

    def _install(self, plan: CompiledPlan) -> None:
        """Make the native hook do what `plan` says from the next decode on."""
        if plan is self._installed:
            return
        try:
            self._hook.set_plan(plan.native, plan.resident)
        except _native.NotOnHost:
            raise
        except (ValueError, RuntimeError) as error:
            raise HookError(str(error)) from None
        self._installed = plan

    def _stream(self, plan: CompiledPlan, stream: Iterator[Any]) -> Generator[Any, Any, None]:
        """Advance `stream` under `plan`, whatever is in force between its items."""
        sent: Any = None
        try:
            while True:
                with self._step_lock:
                    self._require_open()
                    with self._under(plan):
                        try:
                            if sent is not None and isinstance(stream, Generator):
                                item = stream.send(sent)
                            else:
                                item = next(stream)
                        except StopIteration:
                            return
                sent = yield item
        finally:
            if isinstance(stream, Generator):
                stream.close()

    def _request(self, plan: CompiledPlan, call: Any, *args: Any, **kwargs: Any) -> Any:
        with self._step_lock:
            self._require_open()
            with self._under(plan):
                result = call(*args, **kwargs)
        return self._stream(plan, result) if isinstance(result, Iterator) else result

    # ---- llama_cpp.Llama's interface ---------------------------------------------------------

    def create_completion(
        self, *args: Any, steering: Steering | _InForce = IN_FORCE, **kwargs: Any
    ) -> Any:
        """`llama_cpp.Llama.create_completion`, steered; see the class."""
        return self._request(self._compile(steering), super().create_completion, *args, **kwargs)

    def __call__(self, *args: Any, steering: Steering | _InForce = IN_FORCE, **kwargs: Any) -> Any:
        """`llama_cpp.Llama.__call__`, steered; see the class."""
        return self._request(self._compile(steering), super().__call__, *args, **kwargs)

    def create_chat_completion(
        self, *args: Any, steering: Steering | _InForce = IN_FORCE, **kwargs: Any
    ) -> Any:
        """`llama_cpp.Llama.create_chat_completion`, steered; see the class."""
        return self._request(
            self._compile(steering), super().create_chat_completion, *args, **kwargs
        )

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate` under the steering in force at the time of the call."""
        return self._stream(self._current(), self._generate(list(tokens), *args, **kwargs))

    def _generate(
        self, tokens: list[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        # The base class reuses cached tokens that match the prompt. Let it see only those that
        # were computed under the same steering.
        plan = self._current()
        arguments = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        reset = arguments.get("reset", True)
        reusable = min(self._ledger.reusable(plan.cache_key), self.n_tokens)
        if reusable < self.n_tokens:
            if not reset:  # the caller goes on from the context: recompute what it no longer is
                tokens = [*self._input_ids[reusable:].tolist(), *tokens]
            self.n_tokens = reusable
            self._requires_eval = True
            if self._is_recurrent or self._is_hybrid:
                # Their state cannot be cut back to a position; go on from nothing.
                if not reset:
                    tokens = [*self.input_ids[:reusable].tolist(), *tokens]
                self.reset()
        if plan.key != self._last_logits_key:
            self._requires_eval = True
        yield from super().generate(tokens, *args, **kwargs)

    def eval(self, tokens: Sequence[int]) -> None:
        """`llama_cpp.Llama.eval` under the steering in force.

        Evaluates after the tokens in the context, whatever those were computed under: to change the
        steering between two tokens is a caller's right. `generate` and all completions recompute.
        """
        plan = self._current()
        with self._step_lock:
            self._require_open()
            self._install(plan)
            start = self.n_tokens
            try:
                super().eval(tokens)
            finally:
                # What was decoded before a failure counts too; a reset context records nothing.
                if self.n_tokens > start:
                    self._ledger.record(start, self.n_tokens, plan.cache_key)
                self._last_logits_key = plan.key

    def capture(self, *args: Any, **kwargs: Any) -> Any:
        """`HookedLlama.capture` under the steering in force."""
        with self._step_lock:
            self._require_open()
            self._install(self._current())
            return super().capture(*args, **kwargs)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """`llama_cpp.Llama.embed`; embeddings are never steered.

        Raises:
            SteeringError: steering is in force.
        """
        with self._step_lock:
            self._require_open()
            if self._current().native is not None:
                raise SteeringError("embeddings cannot be steered; call embed() outside steering")
            self._install(UNSTEERED)
            return super().embed(*args, **kwargs)

    def save_state(self) -> LlamaState:
        """`llama_cpp.Llama.save_state`; the state remembers what its tokens were computed under."""
        with self._step_lock:
            self._require_open()
            state = super().save_state()
            setattr(state, _RUNS, self._ledger.runs())
            return state

    def load_state(self, state: LlamaState) -> None:
        """`llama_cpp.Llama.load_state`; a plain `llama_cpp.Llama`'s state counts as unsteered."""
        with self._step_lock:
            self._require_open()
            super().load_state(state)
            unsteered = [(state.n_tokens, UNSTEERED.cache_key)]
            self._ledger = CacheLedger(getattr(state, _RUNS, unsteered))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pack": self._pack, "mode": self._mode}
