"""Summaries: the report from judged records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pysteer.distribution import installed_version
from pysteer.evaluate.answering import AnswerSet
from pysteer.evaluate.arms import Arm
from pysteer.evaluate.estimates import Mean, mean, share
from pysteer.evaluate.isolation import matrix
from pysteer.evaluate.judges.refusal import RefusalJudge
from pysteer.evaluate.report import (
    BENIGN,
    UNSTEERED,
    AnswerRecord,
    ArmFigures,
    BenignFigures,
    CategoryFigures,
    CurvePoint,
    NoiseFloor,
    PromptRecord,
    Report,
    RouterFigures,
)
from pysteer.evaluate.router_figures import RoutedPrompt, router_figures
from pysteer.evaluate.settings import EvaluateSettings
from pysteer.evaluate.steering import OwnCategory
from pysteer.judge import Words
from pysteer.pack.resolved import ResolvedPolicy


@dataclass(frozen=True)
class Setup:
    """Description of a run for its report.

    Attributes:
        model: file, name and shape of the model.
        pack: file and SHA-256 of the pack.
        settings: complete settings.
        judge: name of the judge.
        words: of the judge.
        reward: name of the reward, or None.
    """

    model: dict[str, Any]
    pack: dict[str, str]
    settings: EvaluateSettings
    judge: str
    words: Words
    reward: str | None

    def content(self, resolved: ResolvedPolicy) -> dict[str, Any]:
        """Return the settings as the report has them."""
        settings = self.settings
        return {
            **asdict(settings.sampling),
            "strengths": [float(value) for value in settings.strengths],
            "isolation": list(settings.isolation or ()),
            "fluency": settings.fluency,
            "limit": settings.limit,
            "parallel": settings.parallel,
            "context": settings.context,
            "judge": self.judge,
            "words": self.words._asdict(),
            "reward": self.reward,
            "policy": resolved.policy.content(),
        }


def summarised(
    answers: AnswerSet,
    records: list[PromptRecord],
    resolved: ResolvedPolicy,
    arms: Sequence[Arm],
    setup: Setup,
) -> Report:
    """Return the report of an evaluation.

    Args:
        answers: all answers.
        records: the same answers, judged.
        resolved: pack and policy.
        arms: all arms, the unsteered first.
        setup: the run.
    """
    names = [arm.name for arm in arms]
    harmful = [record for record in records if not record.benign]
    harmless = [record for record in records if record.benign]
    asked = dict.fromkeys(record.category for record in harmful)
    columns = [name for name in resolved.pack.categories if name in asked]
    columns += [name for name in asked if name not in columns]
    overall = {name: arm_figures([row.answers[name] for row in harmful]) for name in names}
    benign: dict[str, BenignFigures] = {}
    if harmless:
        benign = {name: benign_figures([row.answers[name] for row in harmless]) for name in names}
    noise = None
    if answers.noise:
        kind = setup.words.others if harmless else setup.words.prompts
        noise = NoiseFloor(differs=share(answers.noise), prompts=kind)
    return Report(
        pysteer=installed_version(),
        model=setup.model,
        pack={
            **setup.pack,
            "categories": list(resolved.pack.categories),
            "gated": list(resolved.gateable),
        },
        settings=setup.content(resolved),
        arms={arm.name: arm.described for arm in arms},
        categories=category_figures(records, names, columns, resolved.pack.categories),
        overall=overall,
        benign=benign,
        benign_by_category=benign_by_category(harmless, names),
        router=_router(answers, resolved) if resolved.gateable else None,
        isolation=[
            matrix(
                mode,
                resolved.gateable if mode == "gated" else list(resolved.pack.categories),
                columns,
                records,
                UNSTEERED,
                share(answers.checked.get(mode, ())),
            )
            for mode in setup.settings.isolation or ()
        ],
        curve=curve(arms, overall, benign),
        noise=noise,
        notes=[
            *_unfinished(records, names, setup),
            *_unsuitable(overall, setup),
            *_notes(resolved, columns, setup.settings),
        ],
        prompts=records,
    )


def _router(answers: AnswerSet, resolved: ResolvedPolicy) -> RouterFigures:
    routed = [
        RoutedPrompt(
            BENIGN if benign else prompt.category,
            answers.fired.get(number, ()),
            answers.ranks.get(number, {}),
        )
        for number, (prompt, benign, _) in enumerate(answers.rows())
    ]
    return router_figures(routed, resolved.gateable, resolved.thresholds)


def _unfinished(records: Sequence[PromptRecord], arms: Sequence[str], setup: Setup) -> list[str]:
    """Return a note on answers that ended inside a thought."""
    flags = [record.answers[arm].unfinished for record in records for arm in arms]
    if not any(flags):
        return []
    return [
        f"{sum(flags)} of {len(flags)} answers ended inside the model's thought: no answer, which "
        f"counts as neither {setup.words.good} nor refused. Raise --max-tokens (now "
        f"{setup.settings.sampling.max_tokens})."
    ]


def _unsuitable(overall: Mapping[str, ArmFigures], setup: Setup) -> list[str]:
    """Return a note if the judge of refusals found none: it may be the wrong judge."""
    if setup.judge != RefusalJudge.name or any(figures.refused.k for figures in overall.values()):
        return []
    return [
        "No answer was refused, and the judge refusal looks for nothing else. If steering is for "
        "something else, such as a style, name a judge for that: --judge python:MODULE:FUNCTION."
    ]


def _notes(
    resolved: ResolvedPolicy, columns: Sequence[str], settings: EvaluateSettings
) -> list[str]:
    notes = []
    strangers = [name for name in columns if name not in resolved.pack.categories]
    if strangers:
        notes.append(
            f"The pack has no vector for {', '.join(strangers)}. Their prompts are answered like "
            "all others; the router can only take them for another category."
        )
    absent = [name for name in resolved.pack.categories if name not in columns]
    if absent:
        notes.append(f"No prompts of {', '.join(absent)}, although the pack has vectors for them.")
    if isinstance(settings.steering, OwnCategory):
        notes.append(
            "Each prompt was steered by its own category, independent of the router. Prompts of "
            "categories that the pack lacks took turns with all categories of the pack."
        )
    return notes


def arm_figures(answers: Sequence[AnswerRecord]) -> ArmFigures:
    """Return the figures of an arm's answers to harmful prompts."""
    return ArmFigures(
        safe=share(bool(answer.safe) for answer in answers),
        degenerate=share(answer.degenerate for answer in answers),
        refused=share(answer.refused for answer in answers),
        log_likelihood=mean(
            answer.log_likelihood for answer in answers if answer.log_likelihood is not None
        ),
        n_tokens=mean(answer.n_tokens for answer in answers),
        rewards=_rewards(answers),
        unfinished=share(answer.unfinished for answer in answers),
    )


def benign_figures(answers: Sequence[AnswerRecord]) -> BenignFigures:
    """Return the figures of an arm's answers to benign prompts."""
    return BenignFigures(
        unchanged=share(answer.unchanged for answer in answers if answer.unchanged is not None),
        refused=share(answer.refused for answer in answers),
        degenerate=share(answer.degenerate for answer in answers),
        fired=share(bool(answer.fired) for answer in answers),
        first_token_kl=mean(
            (answer.first_token_kl for answer in answers if answer.first_token_kl is not None),
            lowest=0.0,
        ),
        rewards=_rewards(answers),
        unfinished=share(answer.unfinished for answer in answers),
    )


def _rewards(answers: Sequence[AnswerRecord]) -> dict[str, Mean]:
    names = dict.fromkeys(name for answer in answers for name in answer.rewards)
    return {
        name: mean(answer.rewards[name] for answer in answers if name in answer.rewards)
        for name in names
    }


def category_figures(
    records: Sequence[PromptRecord],
    arms: Iterable[str],
    columns: Sequence[str],
    pack: Iterable[str],
) -> list[CategoryFigures]:
    """Return figures by category, in the order of `columns`."""
    names, in_pack = list(arms), set(pack)
    rows = []
    for category in columns:
        own = [record for record in records if record.category == category and not record.benign]
        figures = {name: arm_figures([record.answers[name] for record in own]) for name in names}
        rows.append(
            CategoryFigures(
                category=category, in_pack=category in in_pack, n=len(own), arms=figures
            )
        )
    return rows


def benign_by_category(
    records: Sequence[PromptRecord], arms: Iterable[str]
) -> dict[str, dict[str, BenignFigures]]:
    """Return figures of the benign prompts that name a category, by category and arm."""
    names = list(arms)
    own: dict[str, list[PromptRecord]] = {}
    for record in records:
        if record.benign and record.category:
            own.setdefault(record.category, []).append(record)
    return {
        category: {name: benign_figures([row.answers[name] for row in rows]) for name in names}
        for category, rows in own.items()
    }


def curve(
    arms: Sequence[Arm],
    overall: Mapping[str, ArmFigures],
    benign: Mapping[str, BenignFigures],
) -> list[CurvePoint]:
    """Return a point for each arm, by strength; the unsteered arm is strength 0."""
    points = []
    for arm in arms:
        harmless = benign.get(arm.name) or benign_figures([])
        unsteered = arm.steering is None
        points.append(
            CurvePoint(
                strength=0.0 if unsteered else arm.factor,
                arm=arm.name,
                safe=overall[arm.name].safe,
                degenerate=overall[arm.name].degenerate,
                unchanged=harmless.unchanged,
                benign_refused=harmless.refused,
                benign_degenerate=harmless.degenerate,
            )
        )
    return sorted(points, key=lambda point: point.strength)
