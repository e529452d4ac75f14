"""Requests to one model, and the steering in force for requests without their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from pysteer.chat.conversation import Conversation
from pysteer.errors import SteeringError
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import INHERIT, Inherit, PolicyLike
from pysteer.runtime.generation import ActiveSteering, Request
from pysteer.runtime.plan import UNSTEERED, CompiledPlan
from pysteer.runtime.report import report
from pysteer.runtime.request_plans import RequestPlans
from pysteer.runtime.turns import Turns

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Frame:
    """A block, or a step of a request, around the code that runs in it.

    Attributes:
        active: the plan in force in it.
        outer: the frame around it.
        thread: of a request, the thread that runs the step, and holds the lock; None: a block.
        ended: in force nowhere, whichever contexts still have it. A block that ended in its own
            context stays in force in the tasks made inside it.
    """

    active: ActiveSteering
    outer: _Frame | None
    thread: int | None
    ended: bool = False

    @property
    def counts(self) -> bool:
        """The frame's plan is in force here."""
        return not self.ended and self.thread in (None, threading.get_ident())


class RequestOptions(NamedTuple):
    """Arguments of a request beyond those of `llama_cpp.Llama`."""

    steering: Steering | Inherit = INHERIT
    policy: PolicyLike | None = None
    conversation: Conversation | None = None


class SteeredRequests:
    """Runs calls of a `llama_cpp.Llama` under their own steering, or the steering in force.

    The steering in force belongs to a thread or asyncio task. Threads and tasks do not see each
    other's; a task inherits the steering in force when it was made.

    Args:
        llm: the model.
        plans: compiles the requests.
        turns: the generations that share the model's context.
    """

    def __init__(self, llm: HookedLlama, plans: RequestPlans, turns: Turns) -> None:
        self._llm = llm
        self._plans = plans
        self._turns = turns
        self._innermost: ContextVar[_Frame | None] = ContextVar("steering", default=None)
        self._warned_unsteered = False

    @property
    def in_force(self) -> ActiveSteering | None:
        """The steering of the innermost block or request around the caller.

        Raises:
            SteeringError: called by a chat handler, with the model itself, while it renders.
        """
        frame = _innermost(self._innermost.get())
        if frame is None:
            return None
        conversation = frame.active.conversation
        if conversation is not None:
            conversation.require_found()
        return frame.active

    def current(self) -> ActiveSteering:
        """Return the steering in force, or else the policy's."""
        return self.in_force or ActiveSteering(self._plans.plan(INHERIT, None))

    @contextmanager
    def entered(self, active: ActiveSteering) -> Iterator[None]:
        """Put a plan in force inside the `with` block.

        Raises:
            SteeringError: the block ends where it was not in force.
        """
        of_request = active.request is not None
        thread = threading.get_ident() if of_request else None
        frame = _Frame(active, _innermost(self._innermost.get()), thread)
        self._innermost.set(frame)
        try:
            yield
        finally:
            held = self._leave(frame)
            frame.ended = of_request or not held
        if not held:
            raise SteeringError(
                "a `with llm.steering(...)` block ended in another thread or asyncio task than it "
                "began in, and requests there were made without it; in a generator that others "
                "advance, give each request steering= instead"
            )

    def _leave(self, frame: _Frame) -> bool:
        """Take a frame out of the context; False if the context does not have it.

        Frames within it stay: blocks of generators may end in any order.
        """
        inner, at = None, self._innermost.get()
        while at is not None and at is not frame:
            inner, at = at, at.outer
        if at is None:
            return False
        if inner is None:
            self._innermost.set(frame.outer)
        else:
            inner.outer = frame.outer
        return True

    def plan(self, steering: Steering | Inherit, policy: PolicyLike | None) -> CompiledPlan:
        """Return the plan of a block or request made now; see `RequestPlans.plan`."""
        self._llm.require_open()
        inherits = isinstance(steering, Inherit)
        outer = self.in_force
        if inherits and policy is None and outer is not None:
            return outer.plan
        plan = self._plans.plan(steering, policy)
        if inherits and plan is UNSTEERED:
            self._warn_unsteered()
        return plan

    def _warn_unsteered(self) -> None:
        pack = self._plans.pack
        if pack is not None and pack.router is None and not self._warned_unsteered:
            self._warned_unsteered = True
            _log.warning(
                "the pack has no router, so a request is steered only with "
                "steering={category: strength} or in `with llm.steering(...)`"
            )

    def run(self, call: Callable[..., Any], options: RequestOptions, *args: Any, **kw: Any) -> Any:
        """Make a request.

        A request inside another, such as the completion of a chat, is part of the outer request,
        unless the inner request brings its own steering, or a callback makes it in the middle of a
        step of the outer request.

        Args:
            call: a method of `llama_cpp.Llama`.
            options: steering of the request.
            *args: arguments of the method.
            **kw: likewise.

        Returns:
            The result of the method, with the report inside. A stream keeps the request's steering
            to its end.
        """
        outer, conversation = self.in_force, options.conversation
        if outer is not None and outer.request is not None:
            inherits = isinstance(options.steering, Inherit) and options.policy is None
            if inherits and self._turns.running is None:
                result = call(*args, **kw)
                self._add_report(result, outer)
                return result
            conversation = conversation or outer.conversation
        request = Request()
        active = ActiveSteering(self.plan(options.steering, options.policy), conversation, request)
        streams = False
        try:
            with self._step(active):
                result = call(*args, **kw)
            streams = isinstance(result, Iterator)
            if streams:
                return self.stream(active, result)
            self._add_report(result, active)
            return result
        finally:
            if not streams:
                request.end()

    @contextmanager
    def _step(self, active: ActiveSteering) -> Iterator[None]:
        """Run a part of a request, all of it or up to its next chunk, inside the `with` block."""
        with self._llm.context.lock:
            self._llm.require_open()
            with self._turns.apart():
                if active.request is not None and active.request.latest is not None:
                    self._turns.take(active.request.latest)
                with self.entered(active):
                    yield
                self._turns.note_latest(active.request)

    def stream(self, active: ActiveSteering, stream: Iterator[Any]) -> Generator[Any, Any, None]:
        """Advance a stream under a request's steering, whatever runs between items."""
        sent: Any = None
        try:
            while True:
                with self._step(active):
                    try:
                        if sent is not None and isinstance(stream, Generator):
                            item = stream.send(sent)
                        else:
                            item = next(stream)
                    except StopIteration:
                        if active.request is not None:
                            active.request.end()
                        return  # the model may have gone with the last reference to it
                    self._add_report(item, active)
                sent = yield item
        finally:
            if active.request is not None:
                active.request.end()
            if isinstance(stream, Generator):
                stream.close()

    def _add_report(self, result: Any, active: ActiveSteering) -> None:
        """Put the report into a finished result, or the last chunk of a stream."""
        choices = result.get("choices") if isinstance(result, dict) else None
        if choices and choices[0].get("finish_reason") is not None:
            latest = active.request.latest if active.request is not None else None
            found = report(active.plan, None, 0) if latest is None else latest.report()
            result["steering"] = found.to_dict()


def _innermost(frame: _Frame | None) -> _Frame | None:
    """Return the innermost frame that counts: the given one, or one around it."""
    while frame is not None and not frame.counts:
        frame = frame.outer
    return frame
