"""From judged answers to figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pysteer.evaluate.arms import Arm
from pysteer.evaluate.intervals import Mean, mean, share
from pysteer.evaluate.report import (
    AnswerRecord,
    ArmFigures,
    BenignFigures,
    CategoryFigures,
    CurvePoint,
    PromptRecord,
)


def arm_figures(answers: Sequence[AnswerRecord]) -> ArmFigures:
    """The answers of one arm to harmful prompts."""
    return ArmFigures(
        safe=share(bool(one.safe) for one in answers),
        degenerate=share(one.degenerate for one in answers),
        refused=share(one.refused for one in answers),
        log_likelihood=mean(
            one.log_likelihood for one in answers if one.log_likelihood is not None
        ),
        n_tokens=mean(one.n_tokens for one in answers),
        rewards=_rewards(answers),
    )


def benign_figures(answers: Sequence[AnswerRecord]) -> BenignFigures:
    """The answers of one arm to benign prompts."""
    return BenignFigures(
        unchanged=share(one.unchanged for one in answers if one.unchanged is not None),
        refused=share(one.refused for one in answers),
        degenerate=share(one.degenerate for one in answers),
        fired=share(bool(one.fired) for one in answers),
        first_token_kl=mean(
            (one.first_token_kl for one in answers if one.first_token_kl is not None), lowest=0.0
        ),
        rewards=_rewards(answers),
    )


def _rewards(answers: Sequence[AnswerRecord]) -> dict[str, Mean]:
    names = dict.fromkeys(name for one in answers for name in one.rewards)
    return {
        name: mean(one.rewards[name] for one in answers if name in one.rewards) for name in names
    }


def category_figures(
    prompts: Sequence[PromptRecord],
    arms: Iterable[str],
    columns: Sequence[str],
    pack: Iterable[str],
) -> list[CategoryFigures]:
    """Figures by category, in the order of `columns`."""
    names, there = list(arms), set(pack)
    found = []
    for category in columns:
        own = [one for one in prompts if one.category == category and not one.benign]
        figures = {name: arm_figures([one.answers[name] for one in own]) for name in names}
        found.append(
            CategoryFigures(category=category, in_pack=category in there, n=len(own), arms=figures)
        )
    return found


def benign_by_category(
    prompts: Sequence[PromptRecord], arms: Iterable[str]
) -> dict[str, dict[str, BenignFigures]]:
    """Figures of the benign prompts that name a category, by category and arm."""
    names = list(arms)
    own: dict[str, list[PromptRecord]] = {}
    for one in prompts:
        if one.benign and one.category:
            own.setdefault(one.category, []).append(one)
    return {
        category: {name: benign_figures([one.answers[name] for one in rows]) for name in names}
        for category, rows in own.items()
    }


def curve(
    arms: Sequence[Arm],
    overall: Mapping[str, ArmFigures],
    benign: Mapping[str, BenignFigures],
    prompts: Sequence[PromptRecord],
) -> list[CurvePoint]:
    """One point for each arm, by strength; the unsteered one is strength 0."""
    points = []
    for arm in arms:
        answers = [one.answers[arm.name] for one in prompts]
        there = benign.get(arm.name) or benign_figures([])
        unsteered = arm.steering is None
        points.append(
            CurvePoint(
                strength=0.0 if unsteered else arm.factor,
                arm=arm.name,
                safe=overall[arm.name].safe,
                degenerate=share(one.degenerate for one in answers),
                unchanged=there.unchanged,
                benign_refused=there.refused,
            )
        )
    return sorted(points, key=lambda point: point.strength)
