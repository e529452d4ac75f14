"""Prompt sets: JSONL files, one object a line.

`prompt` is text; optional are `category`, `response`, `pair_id` and `label`, text too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pysteer.errors import FormatError, naming

if TYPE_CHECKING:
    import os


_OPTIONAL = ("category", "response", "pair_id", "label")


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file.

    Attributes:
        prompt: what the user says.
        category: the kind of content, or "".
        response: an answer that comes with the data, or None.
        pair_id: shared by an unsafe prompt and its harmless twin, or None.
        label: what a judge found the response to be, "safe" or "unsafe", or None.
        source: file and line, for messages; not part of what makes prompts equal.
    """

    prompt: str
    category: str = ""
    response: str | None = None
    pair_id: str | None = None
    label: str | None = None
    source: str = field(default="", compare=False)


def load_prompts(path: str | os.PathLike[str], *, answers: bool = False) -> list[Prompt]:
    """Read a JSONL file of prompts; blank lines are skipped, unknown keys ignored.

    Args:
        path: the file.
        answers: whether each row needs a `response`, and `prompt` may be left out.

    Raises:
        FormatError: names the file and the line.
    """
    path = Path(path)
    with naming(path):
        text = path.read_text(encoding="utf-8-sig")
    prompts = []
    # Not splitlines(): it also splits at characters that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise FormatError(f"{path}, line {number}: not a JSON object") from None
        if answers and isinstance(row, dict):
            row = {"prompt": "", **row}
            if not isinstance(row.get("response"), str) or not row["response"].strip():
                raise FormatError(f"{path}, line {number}: needs a 'response'")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise FormatError(f"{path}, line {number}: needs a 'prompt' that is a string")
        optional = {key: row.get(key) for key in _OPTIONAL}
        for key, value in optional.items():
            if value is not None and not isinstance(value, str):
                raise FormatError(f"{path}, line {number}: {key!r} is not a string")
        if optional["label"] not in (None, "safe", "unsafe"):
            raise FormatError(f"{path}, line {number}: 'label' is neither 'safe' nor 'unsafe'")
        try:
            for value in (row["prompt"], *optional.values()):
                (value or "").encode()
        except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
            raise FormatError(f"{path}, line {number}: not Unicode text") from None
        prompts.append(
            Prompt(
                row["prompt"],
                optional["category"] or "",
                optional["response"],
                optional["pair_id"],
                optional["label"],
                f"{path}, line {number}",
            )
        )
    if not prompts:
        raise FormatError(f"{path}: no prompts in it")
    return prompts
