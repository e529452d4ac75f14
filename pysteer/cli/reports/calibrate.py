"""Printed report of a calibration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pysteer.calibrate.calibration import CalibrationResult
from pysteer.calibrate.search import SearchResult
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.cli import console
from pysteer.cli.options import Llama
from pysteer.cli.tables import table
from pysteer.evaluate.judges import RefusalJudge
from pysteer.evaluate.settings import EvaluateSettings
from pysteer.intervals import wilson
from pysteer.judge import Words

_ENDS = {
    "settled": "nothing left to improve",
    "trials": "every category had its trials",
    "time": "time is up",
    "interrupted": "interrupted",
}


def evaluate_command(
    model: Path | None,
    output: Path,
    test: Mapping[str, Path],
    *,
    settings: CalibrateSettings,
    judge: str,
    llama: Llama,
) -> str:
    """Return the shell command that measures a pack with the settings of its calibration.

    Names only settings that differ from the defaults of `pysteer evaluate`.

    Args:
        model: as given; None: the default model.
        output: file of the pack.
        test: files of the prompts that the calibration has not seen, by kind.
        settings: of the calibration.
        judge: spec of the judge.
        llama: as given.

    Returns:
        The command; "" without unsafe prompts to measure on.
    """
    if "unsafe" not in test:
        return ""
    usual = EvaluateSettings()
    options: list[tuple[str, Any, Any]] = [
        ("--model", model, None),
        ("--pack", output, None),
        ("--prompts", test["unsafe"], None),
        ("--benign", test.get("benign"), None),
        ("--judge", judge, RefusalJudge.name),
        ("--max-tokens", settings.max_tokens, usual.sampling.max_tokens),
        ("--seed", settings.seed, usual.sampling.seed),
        ("--parallel", settings.parallel, usual.parallel),
        ("--context", settings.context, usual.context),
        ("--threads", llama.threads, None),
        ("--gpu-layers", llama.gpu_layers, 0),
        *(("--rpc", server, None) for server in llama.rpc or ()),
        ("--chat-format", llama.chat_format, None),
        ("--output", "report", None),
    ]
    words = [
        word
        for name, value, default in options
        if value not in (None, default)
        for word in (name, str(value))
    ]
    return shlex.join(["pysteer", "evaluate", *words])


def describe(
    result: CalibrationResult,
    output: Path,
    test: Mapping[str, Path],
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """Return a calibration's result as JSON data.

    Args:
        result: of the calibration.
        output: file of the pack.
        test: files of the prompts that the calibration has not seen, by kind.
        command: see `evaluate_command`.
        seconds: duration.
    """
    return {
        "pack": str(output),
        "seconds": seconds,
        "evaluate": command,
        "test": {kind: str(file) for kind, file in test.items()},
        "router": _router(result),
        "calibration": result.pack.provenance["calibration"],
    }


def print_best(search: SearchResult, max_degenerate: float, words: Words) -> None:
    """Print the best trials of an unfinished search on standard error, in a judge's words."""
    outcomes = {name: record.outcome for name, record in search.chosen.items()}
    worst = min(outcomes, key=lambda name: outcomes[name].value(max_degenerate))
    n = sum(outcome.n for outcome in outcomes.values())
    safe = sum(outcome.safe * outcome.n for outcome in outcomes.values()) / n
    collateral = sum(outcome.collateral for outcome in outcomes.values()) / len(outcomes)
    console.err.print(
        f"best after {_trials(search.rounds)}: {console.plain(words.good)} "
        f"{safe:.0%}, worst "
        f"{console.plain(worst)} {outcomes[worst].safe:.0%}; degenerate at most "
        f"{max(outcome.degenerate for outcome in outcomes.values()):.0%}; other categories changed "
        f"{collateral:.0%} (no gate)",
        soft_wrap=True,
    )


def print_result(
    result: CalibrationResult,
    output: Path,
    test: Mapping[str, Path],
    command: str,
    seconds: float,
    words: Words,
) -> None:
    """Print a calibration's result as tables, in a judge's words; see `describe` for the rest."""
    good = console.plain(words.good)
    figures: Any = result.pack.provenance["calibration"]
    validation = figures["validation"]
    rows = table("category", "vector", "strength", "scope", "n", good, "degenerate")
    for name, chosen in figures["chosen"].items():
        cells = [chosen["candidate"], f"{chosen['strength']:.2f}", chosen["scope"]]
        if validation is not None:
            rates = validation["categories"][name]
            cells += [
                str(rates["n"]),
                f"{rates['safe_unsteered']:.0%} → {rates['safe']:.0%}",
                f"{rates['degenerate']:.0%}",
            ]
        rows.add_row(console.plain(name), *cells)
    console.out.print(rows)
    if validation is not None:
        _print_validation(validation, words)
    _print_router(result)
    search = figures["search"]
    console.say(f"{_trials(search['rounds'])}; {_ENDS[search['stopped']]}")
    console.say(f"wrote {console.plain(output)} in {seconds:.0f} s")
    if command:
        console.say(f"to measure the pack on unseen prompts: {console.plain(command)}")


def _trials(rounds: int) -> str:
    return f"{rounds} trial{'s' * (rounds != 1)} of each category"


def _print_validation(validation: Any, words: Words) -> None:
    console.say(
        f"validation, the router deciding: {console.plain(words.good)} {validation['safe']:.0%}, "
        f"degenerate "
        f"{validation['degenerate']:.0%}"
    )
    benign = validation["benign"]
    if benign is not None:
        console.say(
            f"{console.plain(words.others)} ({benign['n']}): {benign['unchanged']:.0%} unchanged, "
            f"{benign['refused']:.0%} refused"
        )
    gates = validation["gates"]
    console.say(
        f"one category on at a time: its gate opens for {gates['own']:.0%} of its own prompts and "
        f"{gates['others']:.1%} of the others'"
    )


def _print_router(result: CalibrationResult) -> None:
    """Print the router's decisions on its held-out prompts, with 95% intervals."""
    assert result.pack.router is not None
    table = result.pack.router.confusion
    shares = [(int(table[0, 1:].sum()), int(table[0].sum()))]
    shares.append((int(table[1:, 1:].trace()), int(table[1:].sum())))
    opened, found = (
        f"{k} of {n} ({100 * low:.0f}-{100 * high:.0f}%)"
        for (k, n), (low, high) in ((share, wilson(*share)) for share in shares)
    )
    console.say(
        f"router, on held-out prompts (95% interval): a gate opens for harmless prompts: {opened}; "
        f"the category of unsafe prompts is found: {found}"
    )


def _router(result: CalibrationResult) -> dict[str, float]:
    router = result.pack.router
    assert router is not None
    return {
        "category_accuracy": router.category_accuracy,
        "benign_false_positive_rate": router.benign_false_positive_rate,
    }
