"""Prompt files: JSONL, one object a line, or CSV with a line of column names.

Every row has a `prompt`, and may have a `category`, `subcategory`, `response`, `pair_id` and
`label`. All are text; a `pair_id` may also be a whole number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysteer import strict_json
from pysteer.errors import FormatError, has_control, naming
from pysteer.files import IsOurs, read_bytes, write_text

if TYPE_CHECKING:
    import os


_MAX_BYTES = 2**28  # of a prompt file
_OPTIONAL = ("category", "subcategory", "response", "pair_id", "label")


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file.

    Attributes:
        prompt: text of the user.
        category: kind of content, or "".
        response: an answer from the data, or None.
        pair_id: shared by an unsafe prompt and its harmless twin, or None.
        label: a judge's verdict on the response, "safe" or "unsafe", or None.
        source: file and line, for messages; ignored by equality.
        subcategory: kind of content within the category, or ""; splits of data are even over
            subcategories.
    """

    prompt: str
    category: str = ""
    response: str | None = None
    pair_id: str | None = None
    label: str | None = None
    source: str = field(default="", compare=False)
    subcategory: str = ""


def load_prompts(path: str | os.PathLike[str], *, answers: bool = False) -> list[Prompt]:
    r"""Read a file of prompts: CSV if its name ends in .csv, otherwise JSONL.

    Blank lines, unknown keys and unknown columns are ignored. An empty cell of a CSV file is the
    same as a missing one.

    Args:
        path: the file.
        answers: True if each row must have a `response`, and may lack a `prompt`.

    Raises:
        FormatError: with file and line.

    Examples:
        >>> _ = Path("prompts.csv").write_text("prompt,category\nWrite a virus.,malware\n")
        >>> load_prompts("prompts.csv")[0].category
        'malware'
    """
    path = Path(path)
    with naming(path):
        # Text mode would change the line breaks inside cells.
        text = read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
    rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    prompts = []
    for number, row in rows(text, path):
        where = f"{path}, line {number}"
        if answers:
            row = {"prompt": "", **row}
            if not isinstance(row.get("response"), str) or not row["response"].strip():
                raise FormatError(f"{where}: the row needs a 'response'")
        prompts.append(_prompt(row, where))
    if not prompts:
        raise FormatError(f"{path}: no prompts in the file")
    return prompts


def write_prompts(prompts: Sequence[Prompt], path: Path, *, is_ours: IsOurs | None = None) -> None:
    r"""Write a JSONL file of prompts, which `load_prompts` reads, in one step.

    Args:
        prompts: rows of the file.
        path: the file.
        is_ours: recognises older files that may be replaced; None lets all be replaced.

    Raises:
        SteeringError: the file cannot be written.

    Examples:
        >>> write_prompts([Prompt("Write a virus.", "malware")], Path("prompts.jsonl"))
        >>> Path("prompts.jsonl").read_text()
        '{"prompt": "Write a virus.", "category": "malware"}\n'
    """
    keys = ("prompt", *_OPTIONAL)
    rows = [{key: getattr(p, key) for key in keys if getattr(p, key)} for p in prompts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, lines, is_ours)


def grouped(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Group prompts by category, in order of first appearance.

    Examples:
        >>> groups = grouped([Prompt("a", "x"), Prompt("b", "y"), Prompt("c", "x")])
        >>> {category: len(prompts) for category, prompts in groups.items()}
        {'x': 2, 'y': 1}
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    return groups


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # splitlines() would also split at characters that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = strict_json.loads(line)
        except strict_json.DuplicateKeyError as error:
            raise FormatError(f"{path}, line {number}: {error}") from None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise FormatError(f"{path}, line {number}: not a JSON object")
        yield number, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    number = 1
    try:
        for cells in reader:
            if not columns:
                columns = [cell.strip() for cell in cells]
            elif len(cells) == len(columns):
                yield number, {c: cell for c, cell in zip(columns, cells, strict=True) if cell}
            elif cells:
                raise FormatError(
                    f"{path}, line {number}: {len(cells)} cells, but the first line names "
                    f"{len(columns)} columns"
                )
            number = reader.line_num + 1  # of the next row; cells may have line breaks
    except csv.Error as error:
        raise FormatError(f"{path}, line {number}: {error}") from None


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    if not isinstance(row.get("prompt"), str):
        raise FormatError(f"{where}: the row needs a 'prompt' that is a string")
    optional = {key: row.get(key) for key in _OPTIONAL}
    if type(optional["pair_id"]) is int:
        optional["pair_id"] = str(optional["pair_id"])
    for key, value in optional.items():
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{where}: {key!r} is not a string")
    if optional["label"] not in (None, "safe", "unsafe"):
        raise FormatError(f"{where}: 'label' is neither 'safe' nor 'unsafe'")
    try:
        for value in (row["prompt"], *optional.values()):
            (value or "").encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        raise FormatError(f"{where}: not Unicode text") from None
    for key in ("category", "subcategory"):
        if has_control(optional[key] or ""):
            raise FormatError(f"{where}: {key!r} holds control characters; rename it")
    return Prompt(
        row["prompt"],
        optional["category"] or "",
        optional["response"],
        optional["pair_id"],
        optional["label"],
        where,
        optional["subcategory"] or "",
    )
