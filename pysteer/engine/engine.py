"""`Engine`: many requests at once over one llama.cpp context, each with its own steering."""

from __future__ import annotations

import os
import random
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import llama_cpp

from pysteer.chat.conversation import Conversation
from pysteer.chat.handler import ChatCall, completion_arguments, prompt_tokens
from pysteer.chat.template import renders_chats
from pysteer.engine.handle import Handle, PlainShape, Shape
from pysteer.engine.request import Request, check_prompt
from pysteer.engine.scheduler import Scheduler
from pysteer.engine.statistics import EngineStatistics
from pysteer.engine.text import Pieces
from pysteer.errors import SteeringError
from pysteer.llama.arguments import require_known
from pysteer.llama.hooked import HookedLlama
from pysteer.llama.vocabulary import token_piece
from pysteer.pack.pack import BaseModel, SteeringPack
from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import (
    INHERIT,
    Inherit,
    PackLike,
    PolicyLike,
    read_pack,
    read_policy,
)
from pysteer.runtime.limits import MAX_RELATIVE_NORM
from pysteer.runtime.plan import CompiledPlan
from pysteer.runtime.request_plans import RequestPlans
from pysteer.runtime.sequence import SequenceSteering

_NOT_HERE = {
    "logprobs": "the engine gives no log-probabilities; use SteeredLlama",
    "suffix": "the engine writes after a prompt only; use SteeredLlama",
}


class Engine:
    """Continuous batching: requests join and leave a running batch token by token.

    Every request brings its own steering, policy, sampling parameters and seed, and gets the answer
    that it would get alone. Prompts that begin alike under the same steering share that part of the
    cache. Recurrent and hybrid models are served, too, one sequence in each decode.

    Use it as a context manager, or call `close`. Any thread may submit, but no process that is
    forked from this one: create an engine there.

    Args:
        model_path: a GGUF model.
        pack: a `SteeringPack`, a pack file, or a plain control-vector file, or a list of these, as
            one pack; None: nothing can be steered.
        policy: a `Policy`, its data, or a YAML file; laid over the pack's policy.
        max_sequences: number of requests decoded at once; more wait.
        max_queue: number of requests that may wait; then `submit` waits.
        prompt_share: number of prompt tokens that a decode may have while other requests are
            writing.
        max_relative_norm: bound on strengths; see `SteeredLlama`.
        **llama_arguments: `rpc_servers` (see `HookedLlama`), and all arguments of
            `llama_cpp.Llama`. All requests share the `n_ctx` tokens; the default is 512 for each.

    Raises:
        FormatError: the pack or policy file is damaged or of another kind.
        ModelMismatchError: the pack is for another model.
        HookError: the llama.cpp or the model cannot be hooked.
        SteeringError: the model cannot be loaded, an argument is unknown, the policy does not fit
            the pack, or a number is out of range.

    Examples:
        >>> from pysteer import shipped
        >>> pack = shipped.default_pack()
        >>> prompts = ["The sea is", "The sky is"]
        >>> with Engine(shipped.default_model(), pack=pack, verbose=False) as engine:
        ...     handles = [engine.submit(prompt=p, steering=None, max_tokens=4) for p in prompts]
        ...     [handle.result()["steering"]["mode"] for handle in handles]
        ['off', 'off']
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        pack: PackLike | None = None,
        policy: PolicyLike | None = None,
        max_sequences: int = 16,
        max_queue: int = 256,
        prompt_share: int = 128,
        max_relative_norm: float | None = MAX_RELATIVE_NORM,
        **llama_arguments: Any,
    ) -> None:
        require_known(llama_arguments, type(self), HookedLlama)
        for name, number in (
            ("max_sequences", max_sequences),
            ("max_queue", max_queue),
            ("prompt_share", prompt_share),
        ):
            if type(number) is not int or number < 1:
                raise SteeringError(f"{name}={number!r}: give a number from 1")
        loaded, read = read_pack(pack), read_policy(policy)
        llama_arguments.setdefault("n_ctx", 512 * max_sequences)
        llm = HookedLlama(model_path, max_sequences=max_sequences, **llama_arguments)
        try:
            self._plans = RequestPlans(llm, loaded, read, max_relative_norm=max_relative_norm)
            self._llm = llm
            self._base_model = llm.base_model
            self._pieces = Pieces(llm)
            self._seeds = random.Random(llama_arguments.get("seed") or llama_cpp.LLAMA_DEFAULT_SEED)
            self._seeds_lock = threading.Lock()
            self._scheduler = Scheduler(llm, max_queue=max_queue, prompt_share=prompt_share)
        except BaseException:
            llm.close()
            raise
        # For an engine that nobody closes. Does not wait for the end: the collector may call it in
        # a thread that holds a lock which the scheduler needs for that.
        self._finaliser = weakref.finalize(self, self._scheduler.stop, drain=False)

    @property
    def pack(self) -> SteeringPack | None:
        """The pack given at construction."""
        return self._plans.pack

    @property
    def base_model(self) -> BaseModel:
        """Identity of the model, the same for all its quantisations."""
        return self._base_model

    @property
    def renders_chats(self) -> bool:
        """True if the form of chats is known; see `pysteer.chat.template.renders_chats`."""
        return renders_chats(self._llm)

    @property
    def statistics(self) -> EngineStatistics:
        """Counts of the work so far."""
        return self._scheduler.statistics()

    def submit(
        self,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt: str | Sequence[int] | None = None,
        steering: Steering | Inherit = INHERIT,
        policy: PolicyLike | None = None,
        timeout: float | None = None,
        keep_first_logits: bool = False,
        **arguments: Any,
    ) -> Handle:
        """Ask for a chat completion (of `messages`) or a completion (of `prompt`).

        Args:
            messages: as `create_chat_completion` takes them.
            prompt: text, or tokens; instead of messages.
            steering: of this request; see `SteeredLlama`. Left out, the policy decides.
            policy: of this request; laid over the engine's policy.
            timeout: seconds to wait for room in the queue; None waits without limit.
            keep_first_logits: give the handle `first_logits`: the logits of the first token, under
                the request's steering.
            **arguments: the other arguments of `create_chat_completion` or `create_completion`,
                with their defaults: max_tokens, temperature, seed, stop, grammar, response_format,
                tools, ...

        Returns:
            A handle: iterate over it for a stream, call `result()` for the dictionary, `cancel()`
            to end the request.

        Raises:
            EngineBusyError: the queue stayed full.
            EngineClosedError: the engine is closed.
            SteeringError: invalid arguments.
        """
        if (messages is None) == (prompt is None):
            raise SteeringError("submit takes either messages= or prompt=")
        if arguments.pop("stream", False):
            raise SteeringError("stream: iterate over the handle that submit returns")
        for name, reason in _NOT_HERE.items():
            if arguments.get(name) is not None and arguments[name] is not False:
                raise SteeringError(f"{name}: {reason}")
        conversation = None
        with self._scheduler.queue.kept():
            # The request outlives an engine that nobody closes, and must not refer to the engine.
            shape: Shape
            if messages is not None:
                given = {**arguments, "messages": list(messages)}
                conversation = Conversation(self._llm, given, hold=self._scheduler.queue.kept)
                shape = chat = ChatCall(self._llm, given, hold=self._scheduler.queue.kept)
                completion = chat.completion
            else:
                shape = PlainShape()
                completion = completion_arguments({**arguments, "prompt": prompt})
            plan = self._plans.plan(steering, policy)
            request = self._request(shape, completion, plan, conversation)
            request.keep_first_logits = keep_first_logits
            try:
                self._scheduler.queue.put(request, timeout)
            except BaseException:
                request.sampler.close()
                raise
        return request.handle

    def _request(
        self,
        shape: Shape,
        completion: Mapping[str, Any],
        plan: CompiledPlan,
        conversation: Conversation | None,
    ) -> Request:
        llm = self._llm
        tokens = prompt_tokens(llm, completion["prompt"])
        check_prompt(tokens, n_vocab=llm.n_vocab(), length_limit=llm.n_ctx())
        echo = completion["echo"] and isinstance(completion["prompt"], str)
        seed = completion["seed"]
        if seed is None:
            with self._seeds_lock:
                seed = self._seeds.randint(0, 2**32 - 1)
        return Request(
            llm,
            completion,
            prompt=tokens,
            seed=seed,
            pieces=self._pieces,
            steering=SequenceSteering(
                plan,
                tokens,
                conversation=conversation,
                n_positions=llm.n_ctx(),
                piece=partial(token_piece, llm),
            ),
            handle=Handle(
                model=completion["model"] or llm.model_path,
                shape=shape,
                echo=completion["prompt"] if echo else "",
                prompt_tokens=tuple(tokens),
            ),
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text by itself: no token is added, and no text is special."""
        with self._scheduler.queue.kept():
            return self._llm.tokenize(text.encode("utf-8"), add_bos=False, special=False)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        with self._scheduler.queue.kept():
            pieces = b"".join(token_piece(self._llm, token) for token in tokens)
        return pieces.decode("utf-8", errors="replace")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Start the requests that are submitted in the block at once, when it ends.

        The block's requests start from an empty cache, when all earlier requests are done. Batches
        and cache then depend on the block alone, so the same block gives the same answers to the
        last bit. Beside other requests llama.cpp's arithmetic may differ in the last bits, and
        rarely a word with it.

        Submit at most `max_queue` requests in the block, wait for no result inside, and do not nest
        blocks.

        Raises:
            EngineClosedError: the engine is closed.
        """
        self._scheduler.queue.hold()
        try:
            yield
        finally:
            self._scheduler.queue.release()

    def close(self, *, drain: bool = False) -> None:
        """End all requests as cancelled, or wait for them with `drain`; then free the model.

        May be called again, and from any thread. Does nothing in a forked process.
        """
        if self._scheduler.queue.left:
            return
        self._scheduler.stop(drain=drain)
        if threading.current_thread() is not self._scheduler.thread:
            self._scheduler.thread.join()
        self._finaliser.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)
