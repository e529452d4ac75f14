"""Requests to one model, and the steering in force for requests without their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from pysteer.chat.conversation import Conversation
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import INHERIT, Inherit, PolicyLike
from pysteer.runtime.plan import UNSTEERED, CompiledPlan
from pysteer.runtime.report import SteeringReport
from pysteer.runtime.request_plans import RequestPlans

_log = logging.getLogger(__name__)


class ActiveSteering(NamedTuple):
    """A plan in force.

    Attributes:
        plan: the plan.
        conversation: the messages of a chat, for the router; None outside of chats.
        of_request: put in force by a request, not by a `with llm.steering(...)` block.
    """

    plan: CompiledPlan
    conversation: Conversation | None = None
    of_request: bool = False


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
        report: returns the report of the latest request.
    """

    def __init__(
        self, llm: HookedLlama, plans: RequestPlans, report: Callable[[], SteeringReport]
    ) -> None:
        self._llm = llm
        self._plans = plans
        self._report = report
        self._in_force: ContextVar[ActiveSteering | None] = ContextVar("steering", default=None)
        self._warned_unsteered = False

    @property
    def in_force(self) -> ActiveSteering | None:
        """The steering of the innermost block or request around the caller."""
        return self._in_force.get()

    def current(self) -> ActiveSteering:
        """Return the steering in force, or else the policy's."""
        return self._in_force.get() or ActiveSteering(self._plans.plan(INHERIT, None))

    @contextmanager
    def entered(self, active: ActiveSteering) -> Iterator[None]:
        """Put a plan in force inside the `with` block."""
        token = self._in_force.set(active)
        try:
            yield
        finally:
            self._in_force.reset(token)

    def plan(self, steering: Steering | Inherit, policy: PolicyLike | None) -> CompiledPlan:
        """Return the plan of a block or request made now; see `RequestPlans.plan`."""
        self._llm.require_open()
        inherits = isinstance(steering, Inherit)
        outer = self._in_force.get()
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
        unless the inner request brings its own steering.

        Args:
            call: a method of `llama_cpp.Llama`.
            options: steering of the request.
            *args: arguments of the method.
            **kw: likewise.

        Returns:
            The result of the method, with the report inside. A stream keeps the request's steering
            to its end.
        """
        outer, conversation = self._in_force.get(), options.conversation
        if outer is not None and outer.of_request:
            if isinstance(options.steering, Inherit) and options.policy is None:
                result = call(*args, **kw)
                self._add_report(result)
                return result
            conversation = conversation or outer.conversation
        plan = self.plan(options.steering, options.policy)
        active = ActiveSteering(plan, conversation, of_request=True)
        with self._llm.context.lock:
            self._llm.require_open()
            with self.entered(active):
                result = call(*args, **kw)
            self._add_report(result)
        return self.stream(active, result) if isinstance(result, Iterator) else result

    def stream(self, active: ActiveSteering, stream: Iterator[Any]) -> Generator[Any, Any, None]:
        """Advance a stream under a request's steering, regardless of the steering between items."""
        sent: Any = None
        try:
            while True:
                with self._llm.context.lock:
                    self._llm.require_open()
                    with self.entered(active):
                        try:
                            if sent is not None and isinstance(stream, Generator):
                                item = stream.send(sent)
                            else:
                                item = next(stream)
                        except StopIteration:
                            return
                    self._add_report(item)
                sent = yield item
        finally:
            if isinstance(stream, Generator):
                stream.close()

    def _add_report(self, result: Any) -> None:
        """Put the report into a finished result, or the last chunk of a stream."""
        choices = result.get("choices") if isinstance(result, dict) else None
        if choices and choices[0].get("finish_reason") is not None:
            result["steering"] = self._report().to_dict()
