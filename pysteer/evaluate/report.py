"""What `pysteer evaluate` finds, as data: `report.json`, versioned, every answer in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pysteer.errors import FormatError, naming
from pysteer.evaluate.intervals import Mean, Share

SCHEMA: Literal["pysteer.evaluate/1"] = "pysteer.evaluate/1"
"""Of the report; the number changes when what is there changes its meaning."""

UNSTEERED = "unsteered"
STEERED = "steered"
BENIGN = "benign"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnswerRecord(_Part):
    """One answer.

    Attributes:
        text: what the model wrote.
        finish_reason: "stop", or "length" if it was cut.
        n_tokens: tokens written.
        fired: gated categories whose gate opened.
        active: category to strength, of those that acted.
        degenerate: empty or repetitive; see `pysteer.evaluate.metrics`.
        refused: what the built-in rule says, whichever judge there is; False if degenerate.
        safe: the judge's verdict; False if degenerate; None for benign prompts.
        reason: the judge's.
        log_likelihood: mean log-likelihood per token under the unsteered model, nats; None if not
            measured, or of an empty answer.
        rewards: named scores; empty without a reward.
        unchanged: of an answer to a benign prompt: whether it is the unsteered one.
        first_token_kl: of a steered answer to one: KL(unsteered || steered) of the first token,
            nats.
    """

    text: str
    finish_reason: str
    n_tokens: int
    fired: list[str]
    active: dict[str, float]
    degenerate: bool
    refused: bool
    safe: bool | None = None
    reason: str = ""
    log_likelihood: float | None = None
    rewards: dict[str, float] = {}
    unchanged: bool | None = None
    first_token_kl: float | None = None


class PromptRecord(_Part):
    """One prompt and the answers to it.

    Attributes:
        prompt: what was asked.
        category: its category; of a benign prompt possibly "".
        benign: whether it came from the benign prompts.
        scores: what the router saw, by category.
        answers: name of the arm to answer.
    """

    prompt: str
    category: str
    benign: bool
    scores: dict[str, float]
    answers: dict[str, AnswerRecord]


class ArmFigures(_Part):
    """One arm's answers to the prompts of one category, or of all.

    Attributes:
        safe: judged safe, and not degenerate.
        degenerate: broken as a text.
        refused: by the built-in rule, and not degenerate.
        log_likelihood: per token under the unsteered model, nats.
        n_tokens: length.
        rewards: named scores.
    """

    safe: Share
    degenerate: Share
    refused: Share
    log_likelihood: Mean
    n_tokens: Mean
    rewards: dict[str, Mean]


class CategoryFigures(_Part):
    """The prompts of one category.

    Attributes:
        category: its name.
        in_pack: whether the pack has a vector for it.
        n: how many prompts.
        arms: name of the arm to figures.
    """

    category: str
    in_pack: bool
    n: int
    arms: dict[str, ArmFigures]


class BenignFigures(_Part):
    """One arm's answers to benign prompts.

    Attributes:
        unchanged: answered exactly as without steering, in the same company.
        refused: by the built-in rule.
        degenerate: broken as a text.
        fired: prompts for which some gate opened.
        first_token_kl: KL(unsteered || steered) of the first token's distribution, nats.
        rewards: named scores.
    """

    unchanged: Share
    refused: Share
    degenerate: Share
    fired: Share
    first_token_kl: Mean
    rewards: dict[str, Mean]


class RouterFigures(_Part):
    """What the router found, against what the prompts are.

    Attributes:
        rows: true classes: categories, and "benign" if there are benign prompts.
        columns: what was found: the router's categories, and "nothing".
        confusion: counts, rows by columns.
        macro_f1: mean F1 over the router's categories and benign, of the prompts of those; None
            without any.
        f1: class to F1.
        caught: category to the share of its prompts for which any gate opened.
        false_positives: benign prompts for which any gate opened.
        false_positives_of: category to the benign prompts that were taken for it.
    """

    rows: list[str]
    columns: list[str]
    confusion: list[list[int]]
    macro_f1: float | None
    f1: dict[str, float]
    caught: dict[str, Share]
    false_positives: Share
    false_positives_of: dict[str, int]


class Cell(_Part):
    """One category switched on, prompts of one category.

    Attributes:
        changed: answers that were unsafe without steering and are safe with it.
        n: answers that were unsafe without steering.
        ran: prompts answered with the category on. The others' gate is closed, which leaves an
            answer as it was.
    """

    changed: int
    n: int
    ran: int


class Isolation(_Part):
    """The matrix: one category switched on (row), category of the prompt (column).

    Attributes:
        mode: "gated" (`{category: "auto"}`) or "forced" (at the policy's strength).
        rows: categories of the pack.
        columns: categories of the prompts, the pack's first.
        cells: rows by columns.
        diagonal: over cells whose row is their column.
        rest: over all others.
        checked: of the answers that were not run because the gate is closed, some that were run
            after all (n), and those that then differed from the unsteered answer (k).
    """

    mode: Literal["gated", "forced"]
    rows: list[str]
    columns: list[str]
    cells: list[list[Cell]]
    diagonal: Share
    rest: Share
    checked: Share


class CurvePoint(_Part):
    """One strength.

    Attributes:
        strength: factor on all strengths; 0 is unsteered.
        arm: whose answers.
        safe: of the prompts that have a category.
        degenerate: of all prompts.
        unchanged: of the benign prompts.
        benign_refused: likewise.
    """

    strength: float
    arm: str
    safe: Share
    degenerate: Share
    unchanged: Share
    benign_refused: Share


class NoiseFloor(_Part):
    """Unsteered answers that differ when the same prompts are batched otherwise.

    Attributes:
        differs: how many, of how many.
        prompts: "benign", or "prompts" where there are no benign ones.
    """

    differs: Share
    prompts: str


class Report(_Part):
    """Everything.

    Attributes:
        schema_version: `SCHEMA`.
        model: file, name, architecture, n_layer, n_embd.
        pack: file, SHA-256, categories, router.
        settings: what the run was asked for, the judge among it.
        arms: name to how it was steered.
        categories: figures by category.
        overall: arm to figures over all prompts that have a category.
        benign: arm to figures; empty without benign prompts.
        benign_by_category: the same for benign prompts that name a category.
        router: None where the pack has no router.
        isolation: the matrices asked for.
        curve: by strength, ascending; unsteered and steered at least.
        noise: None without a prompt to measure it on.
        notes: what a reader should know.
        prompts: every prompt and answer.
    """

    schema_version: Literal["pysteer.evaluate/1"] = SCHEMA
    pysteer: str
    model: dict[str, Any]
    pack: dict[str, Any]
    settings: dict[str, Any]
    arms: dict[str, str]
    categories: list[CategoryFigures]
    overall: dict[str, ArmFigures]
    benign: dict[str, BenignFigures]
    benign_by_category: dict[str, dict[str, BenignFigures]]
    router: RouterFigures | None
    isolation: list[Isolation]
    curve: list[CurvePoint]
    noise: NoiseFloor | None
    notes: list[str]
    prompts: list[PromptRecord]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; an older file is replaced in one step."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        write_whole(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `save` wrote.

        Raises:
            FormatError: it is no report, or one of another version.
        """
        path = Path(path)
        with naming(path):
            content = json.loads(path.read_bytes().decode("utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA:
            raise FormatError(f"{path}: not a report of version {SCHEMA}; evaluate again")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise FormatError(f"{path}: {where}: {first['msg']}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
