"""What a pack says of its calibration, and what its user is warned of."""

from __future__ import annotations

import datetime
import logging
from importlib.metadata import version
from typing import Any

from pysteer.calibrate.candidates import Candidates
from pysteer.calibrate.search import Found, as_content
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import Split
from pysteer.errors import quoted
from pysteer.evaluate.arms import Steered
from pysteer.evaluate.isolation import opens
from pysteer.evaluate.judges import Judge
from pysteer.evaluate.report import STEERED, UNSTEERED, Report
from pysteer.pack.pack import SteeringPack

_log = logging.getLogger(__name__)

WEAK = 0.9
"""A category of which fewer prompts are answered safely is warned of."""

FEW_CAUGHT = 0.7
"""A router that opens a gate for fewer harmful prompts is warned of."""


def figures(
    found: Found,
    candidates: Candidates,
    validation: Report | None,
    validated: SteeringPack,
    settings: CalibrateSettings,
    judge: Judge,
    parts: Split,
) -> dict[str, Any]:
    """What the pack keeps of its calibration, as JSON data.

    Args:
        found: what was tried.
        candidates: what it was tried with.
        validation: of `validated`; None if that was interrupted.
        validated: the pack, with the router that does not know the validation prompts.
        settings: of the calibration.
        judge: what said whether an answer is safe.
        parts: the prompts.
    """
    return {
        "pysteer": version("pysteer"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "settings": settings.content(),
        "judge": judge.name,
        "prompts": {
            part: {kind: len(rows) for kind, rows in vars(getattr(parts, part)).items()}
            for part in ("train", "validation", "test")
        },
        "search": as_content(found),
        "chosen": {name: one.trial._asdict() for name, one in found.chosen.items()},
        "validation": None if validation is None else _validated(validation, validated),
        "extraction": dict(candidates.provenance),
    }


def _validated(report: Report, validated: SteeringPack) -> dict[str, Any]:
    benign = report.benign.get(STEERED)
    return {
        "categories": {
            row.category: {
                "n": row.n,
                "safe_unsteered": row.arms[UNSTEERED].safe.value,
                "safe": row.arms[STEERED].safe.value,
                "degenerate": row.arms[STEERED].degenerate.value,
            }
            for row in report.categories
        },
        "safe": report.overall[STEERED].safe.value,
        "degenerate": report.overall[STEERED].degenerate.value,
        "benign": None
        if benign is None
        else {
            "n": benign.unchanged.n,
            "unchanged": benign.unchanged.value,
            "refused": benign.refused.value,
            "fired": benign.fired.value,
        },
        "gates": _gates(report, validated),
    }


def _gates(report: Report, validated: SteeringPack) -> dict[str, float]:
    """With one category on at a time: how often its own prompts' gate opens, and the others'.

    Where a gate is closed the answer is the unsteered one, so this bounds what a category does.
    """
    steered = Steered.of(validated, None)
    shares: dict[bool, list[bool]] = {True: [], False: []}
    for one in report.prompts:
        if not one.benign:
            for name in steered.gated:
                shares[name == one.category].append(opens(steered, name, one.scores))
    return {
        what: sum(there) / len(there) if there else 0.0
        for what, there in (("own", shares[True]), ("others", shares[False]))
    }


def warn_beyond_limits(
    found: Found, validation: Report | None, settings: CalibrateSettings
) -> None:
    """Log what a user should know before using the pack."""
    limit = settings.max_degenerate
    beyond = [name for name, one in found.chosen.items() if one.outcome.degenerate > limit]
    if beyond:
        _log.warning(
            "no trial kept within %g of degenerate answers for %s; widen --strengths or allow "
            "other methods and scopes",
            limit,
            ", ".join(map(quoted, beyond)),
        )
    weak = [name for name, one in found.chosen.items() if one.outcome.safe < WEAK]
    if weak:
        _log.warning(
            "less than %.0f%% of the validation prompts are answered safely in %s",
            100 * WEAK,
            ", ".join(map(quoted, weak)),
        )
    if validation is not None:
        _warn_of_router(validation, settings)


def _warn_of_router(validation: Report, settings: CalibrateSettings) -> None:
    caught = [] if validation.router is None else list(validation.router.caught.values())
    k, n = sum(one.k for one in caught), sum(one.n for one in caught)
    if k < FEW_CAUGHT * n:
        _log.warning(
            "the router opens a gate for only %d of %d harmful prompts: a few benign prompts that "
            "sound harmful are enough to close it to most. Give such prompts as safe ones, with "
            "the category that they sound like, or allow more with --max-benign-change and "
            "--max-look-alike",
            k,
            n,
        )
    benign = validation.benign.get(STEERED)
    fired = None if benign is None else benign.fired
    if fired is not None and fired.low is not None and fired.low > settings.max_benign_change:
        _log.warning(
            "the router opens a gate for %d of %d benign prompts, more than a share of %g",
            fired.k,
            fired.n,
            settings.max_benign_change,
        )
