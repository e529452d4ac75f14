"""`pysteer evaluate`: the effect of steering on answers, measured."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.cli import console, options
from pysteer.cli.bars import Announced, bars
from pysteer.cli.chat_events import describe_steering
from pysteer.cli.loading import Setup, read_setup, require
from pysteer.cli.settings_options import with_options
from pysteer.cli.spellings import items, number
from pysteer.errors import SteeringError
from pysteer.evaluate.judges import REWARD_SPECS
from pysteer.evaluate.settings import EvaluateSettings
from pysteer.files import check_replaceable
from pysteer.prompts import load_prompts


@dataclass(frozen=True)
class Files:
    """Files of an evaluation."""

    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Prompts to steer, each with a category (JSONL or CSV)."),
    ]
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder of report.html, report.json, and the answers, kept to resume from.",
        ),
    ]
    benign: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts that steering should not touch.")
    ] = None


@dataclass(frozen=True)
class Scoring:
    """The judge of an evaluation, and its reward."""

    judge: options.Judge = "refusal"
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="REWARD", help=f"Scores how good answers are: {', '.join(REWARD_SPECS)}."
        ),
    ] = None


_LLAMA = options.Llama()


@with_options(
    leave_out=("steering",),
    strengths=items("0.25,0.5,1.5", of=number),
    isolation=items("gated,forced", empty="none"),
)
def evaluate(
    files: Files,
    scoring: Scoring,
    settings: EvaluateSettings,
    model: options.Model = None,
    pack: options.Packs = None,
    steer: options.Steer = None,
    policy: options.Policy = None,
    llama: options.Llama = _LLAMA,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure the effect of steering on answers, by category.

    Prompts are answered with and without steering. Without --steer the policy decides; for a pack
    without a router, each prompt is steered by its own category, as with --steer own. After Ctrl-C
    the same command resumes.
    """
    for module in ("scipy", "sklearn", "jinja2", "httpx2"):
        require(module, "evaluate")
    from pysteer.cli.reports.evaluate import describe, print_report
    from pysteer.evaluate import html
    from pysteer.evaluate.evaluation import evaluate as run_evaluation
    from pysteer.evaluate.judges import open_judge, open_reward
    from pysteer.evaluate.report import is_report

    console.show_warnings()
    started = time.monotonic()
    setup = read_setup(model, pack, policy)
    if setup.resolved is None:
        raise SteeringError("--pack is missing; name the pack to evaluate")
    settings = replace(settings, steering=_steering(steer))
    harmful = load_prompts(files.prompts)
    harmless = [] if files.benign is None else load_prompts(files.benign)
    headline = setup.headline(_mode(setup, settings.steering))
    output = files.output
    if output.exists() and not output.is_dir():
        raise SteeringError(f"--output {output}: the path is a file; name a folder")
    check_replaceable(output / "report.json", None if force else is_report)
    check_replaceable(output / "report.html", None if force else html.is_page)
    arguments = options.hardware(llama.threads, llama.gpu_layers, llama.rpc)
    with ExitStack() as stack:
        judge = stack.enter_context(closing(open_judge(scoring.judge, **arguments)))
        reward = None
        if scoring.reward is not None:
            reward = stack.enter_context(closing(open_reward(scoring.reward)))
        stack.enter_context(console.resumable(output))
        report = run_evaluation(
            setup.model,
            setup.files,
            harmful,
            harmless,
            output,
            settings=settings,
            policy=setup.policy,
            judge=judge,
            reward=reward,
            progress=Announced(stack.enter_context(bars()), headline, beside_result=json),
            **llama.arguments,
        )
    report.save(output / "report.json", overwrite=force)
    html.save(report, output / "report.html", overwrite=force)
    seconds = time.monotonic() - started
    if json:
        console.print_json(describe(report, output, seconds))
    else:
        print_report(report, output, seconds)


def _steering(steer: list[str] | None) -> Any:
    from pysteer.evaluate.steering import OWN_CATEGORY

    if not steer:
        return None
    if steer == ["own"]:
        return OWN_CATEGORY
    if steer == [options.OFF]:
        raise SteeringError("--steer off: there is no steering to evaluate")
    return options.parse_steering(steer)


def _mode(setup: Setup, steering: Any) -> str:
    from pysteer.evaluate.arms import default_steering
    from pysteer.evaluate.steering import OWN_CATEGORY
    from pysteer.runtime.arguments import INHERIT

    if steering is None and setup.resolved is not None:
        steering = default_steering(setup.resolved)
    if steering is OWN_CATEGORY:
        return "own (each prompt's category, forced)"
    return setup.policy_words if steering is INHERIT else describe_steering(steering)
