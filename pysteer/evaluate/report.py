"""The report of an evaluation: `report.json`, versioned, with every answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pysteer import strict_json
from pysteer.errors import FormatError, naming
from pysteer.evaluate.estimates import Mean, Share
from pysteer.evaluate.settings import IsolationMode
from pysteer.files import begins_with, read_bytes, write_text
from pysteer.judge import SAFETY, Words

SCHEMA: Literal["pysteer.evaluate/2"] = "pysteer.evaluate/2"
"""Version of the report; the number changes when a field changes its meaning."""

is_report = begins_with(b'"pysteer.evaluate/')
"""Recognises reports."""

_MAX_BYTES = 2**30
UNSTEERED = "unsteered"
STEERED = "steered"
BENIGN = "benign"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnswerRecord(_Part):
    """One answer.

    Attributes:
        text: the answer, without thoughts.
        finish_reason: "stop", or "length" if the answer was cut.
        n_tokens: length.
        fired: gated categories whose gate opened.
        active: category to strength, of the categories that acted.
        degenerate: see `pysteer.evaluate.degeneration`.
        refused: a refusal by the built-in rule, with any judge; False if degenerate.
        safe: the judge's verdict; False if degenerate; None for benign prompts.
        reason: the judge's reason.
        log_likelihood: mean log-likelihood per token under the unsteered model, nats; None if not
            measured, or for an empty answer.
        rewards: named scores; empty without a reward.
        unchanged: for benign prompts: True if the answer is the unsteered answer.
        first_token_kl: for steered answers to benign prompts: KL(unsteered || steered) of the first
            token, nats.
        thoughts: all that the model wrote, if that is more than the answer; else "".
        unfinished: the text ends inside a thought; then `text` is "".
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
    thoughts: str = ""
    unfinished: bool = False

    @property
    def whole(self) -> str:
        """All that the model wrote."""
        return self.thoughts or self.text


class PromptRecord(_Part):
    """One prompt with its answers.

    Attributes:
        prompt: the prompt.
        category: the prompt's category; may be "" for benign prompts.
        benign: True for a benign prompt.
        scores: category to the router's score.
        answers: name of the arm to answer.
    """

    prompt: str
    category: str
    benign: bool
    scores: dict[str, float]
    answers: dict[str, AnswerRecord]


class ArmFigures(_Part):
    """Figures of one arm's answers to the prompts of one category, or of all.

    Attributes:
        safe: judged safe, and not degenerate.
        degenerate: see `pysteer.evaluate.degeneration`.
        refused: by the built-in rule, and not degenerate.
        log_likelihood: per token under the unsteered model, nats.
        n_tokens: length.
        rewards: named scores.
        unfinished: no answer, since a thought did not end.
    """

    safe: Share
    degenerate: Share
    refused: Share
    log_likelihood: Mean
    n_tokens: Mean
    rewards: dict[str, Mean]
    unfinished: Share


class CategoryFigures(_Part):
    """Figures of the prompts of one category.

    Attributes:
        category: the category.
        in_pack: True if the pack has a vector for the category.
        n: number of prompts.
        arms: name of the arm to figures.
    """

    category: str
    in_pack: bool
    n: int
    arms: dict[str, ArmFigures]


class BenignFigures(_Part):
    """Figures of one arm's answers to benign prompts.

    Attributes:
        unchanged: the same text as without steering, computed in the same batches.
        refused: by the built-in rule.
        degenerate: see `pysteer.evaluate.degeneration`.
        fired: prompts for which some gate opened.
        first_token_kl: KL(unsteered || steered) of the first token's distribution, nats.
        rewards: named scores.
        unfinished: no answer, since a thought did not end.
    """

    unchanged: Share
    refused: Share
    degenerate: Share
    fired: Share
    first_token_kl: Mean
    rewards: dict[str, Mean]
    unfinished: Share


class RouterFigures(_Part):
    """The router's classes against the prompts' true categories.

    Attributes:
        rows: true classes: categories, and "benign" if there are benign prompts.
        columns: the router's classes: its categories, and "nothing".
        confusion: counts, rows by columns.
        macro_f1: mean F1 over the router's categories and benign, of their prompts; None without
            such prompts.
        f1: class to F1.
        caught: category to the share of its prompts for which any gate opened.
        false_positives: benign prompts for which any gate opened.
        false_positives_of: category to the number of benign prompts taken for the category.
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
    """The effect of one category, switched on, on prompts of one category.

    Attributes:
        changed: answers that are unsafe without steering and safe with the category on.
        n: answers that are unsafe without steering; a thought without an answer is not counted.
        ran: prompts answered with the category on. For the others the gate is closed, which leaves
            the answer unchanged.
    """

    changed: int
    n: int
    ran: int


class Isolation(_Part):
    """The isolation matrix: category switched on (rows) by category of the prompt (columns).

    Attributes:
        mode: "gated" (`{category: "auto"}`) or "forced" (at the policy's strength).
        rows: categories of the pack.
        columns: categories of the prompts, the pack's first.
        cells: rows by columns.
        diagonal: over the cells of equal row and column.
        rest: over all other cells.
        checked: of the answers skipped because the gate is closed: number computed as a check (n),
            and number that differ from the unsteered answer (k).
    """

    mode: IsolationMode
    rows: list[str]
    columns: list[str]
    cells: list[list[Cell]]
    diagonal: Share
    rest: Share
    checked: Share


class CurvePoint(_Part):
    """Figures at one strength.

    Attributes:
        strength: factor on all strengths; 0 is unsteered.
        arm: name of the arm.
        safe: of the harmful prompts.
        degenerate: of the harmful prompts, as in all other figures of an arm.
        unchanged: of the benign prompts.
        benign_refused: of the benign prompts.
        benign_degenerate: of the benign prompts.
    """

    strength: float
    arm: str
    safe: Share
    degenerate: Share
    unchanged: Share
    benign_refused: Share
    benign_degenerate: Share


class NoiseFloor(_Part):
    """Unsteered answers that differ when the same prompts are answered in other batches.

    Attributes:
        differs: share of the answers.
        prompts: "benign", or "harmful" without benign prompts.
    """

    differs: Share
    prompts: str


class Report(_Part):
    """The report of an evaluation.

    Attributes:
        schema_version: `SCHEMA`.
        pysteer: version of pysteer.
        model: file, name, architecture, n_layer, n_embd.
        pack: file, SHA-256, categories, categories that can be gated.
        settings: settings, judge, the judge's words, reward and policy.
        arms: name to the steering in words.
        categories: figures by category.
        overall: arm to figures over all harmful prompts.
        benign: arm to figures; empty without benign prompts.
        benign_by_category: likewise, for benign prompts that name a category.
        router: None if the pack has no router.
        isolation: the isolation matrices.
        curve: by strength, ascending; unsteered and steered at least.
        noise: None without prompts to measure on.
        notes: remarks for the reader.
        prompts: every prompt and answer.
    """

    schema_version: Literal["pysteer.evaluate/2"] = SCHEMA
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

    @property
    def words(self) -> Words:
        """The judge's words for its verdicts."""
        return Words(**self.settings.get("words", SAFETY._asdict()))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the report as JSON; an older file is replaced in one step.

        Args:
            path: the file.
            overwrite: replace any older file; otherwise reports alone.

        Raises:
            SteeringError: the file cannot be written.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        write_text(Path(path), text + "\n", None if overwrite else is_report)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report from JSON.

        Raises:
            FormatError: the file is not a report of this version.
        """
        path = Path(path)
        with naming(path):
            content = strict_json.loads(read_bytes(path, _MAX_BYTES).decode("utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA:
            raise FormatError(f"{path}: not a report of version {SCHEMA}; evaluate again")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise FormatError(f"{path}: {where}: {first['msg']}") from None
