"""Compiled plans from the arguments of requests, for `SteeredLlama` and `Engine` alike."""

from __future__ import annotations

import logging
import threading
from functools import partial

from pysteer.chat.form import form_of, is_other_form
from pysteer.chat.handler import user_prompt
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import Steering
from pysteer.runtime.arguments import Inherit, PolicyLike, read_policy
from pysteer.runtime.limits import MAX_RELATIVE_NORM, StrengthLimits, typical_norms
from pysteer.runtime.plan import CompiledPlan, Injection, PlanCompiler

_log = logging.getLogger(__name__)


class RequestPlans:
    """Plans of the requests to one model. Any thread may ask.

    Args:
        llm: the model.
        pack: a pack for the model; None: nothing can be steered.
        policy: laid over the pack's policy.
        injection: route of directions into the graph; see `PlanCompiler`.
        max_relative_norm: bound on strengths; see `StrengthLimits`. None: no bound.

    Raises:
        ModelMismatchError: the pack is for another model.
        SteeringError: the policy does not fit the pack, or its strengths are beyond the bound.
        HookError: the model lacks a site that the policy asks for.
    """

    def __init__(
        self,
        llm: HookedLlama,
        pack: SteeringPack | None,
        policy: Policy | None,
        *,
        injection: Injection = "auto",
        max_relative_norm: float | None = MAX_RELATIVE_NORM,
    ) -> None:
        if pack is not None:
            pack.check_fits(llm.base_model)
            _warn_of_other_form(llm, pack)
        limits = None
        if max_relative_norm is not None:
            norms = {} if pack is None else typical_norms(llm, pack)
            limits = StrengthLimits(norms, max_relative_norm)
        self._lock = threading.Lock()  # the compiler keeps the latest plans
        self._compiler = PlanCompiler(
            pack,
            policy,
            n_layer=llm.n_layer,
            n_embd=llm.n_embd(),
            # A vocabulary alone was not probed, and no pack goes with it.
            sites=llm.sites if any(llm.sites.values()) else None,
            injection=injection,
            limits=limits,
        )

    @property
    def pack(self) -> SteeringPack | None:
        """The pack given at construction."""
        return self._compiler.pack

    def plan(self, steering: Steering | Inherit, policy: PolicyLike | None) -> CompiledPlan:
        """Return the plan of a request; with `INHERIT` as steering, the policy's plan.

        Raises:
            UnknownCategoryError: a category that the pack lacks.
            SteeringError: invalid steering or policy, or a strength beyond the bound.
            FormatError: the file is not a policy.
        """
        read = read_policy(policy)
        with self._lock:
            if isinstance(steering, Inherit):
                return self._compiler.by_policy(read)
            return self._compiler.compile(steering, read)


def _warn_of_other_form(llm: HookedLlama, pack: SteeringPack) -> None:
    """Log a warning if the pack's router was fitted with prompts of another form."""
    if pack.router is None or "form" not in pack.provenance:
        return
    try:
        form = form_of(partial(user_prompt, llm))
    except Exception as error:  # of any kind: chat handlers are foreign code
        _log.warning("the form of this model's chats is unknown: %s", error)
        return
    if is_other_form(pack.provenance, form):
        _log.warning(
            "the pack's router was fitted with prompts in another form than this model's chats "
            "have (another chat template, or none), so its figures may not hold; "
            "give the chat_format= of the extraction, or extract again"
        )
