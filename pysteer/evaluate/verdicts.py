"""What judges said, kept: no answer is judged twice by a judge that is slow or costs money."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pysteer.errors import SteeringError
from pysteer.evaluate.judges import Item, Judge, Reward, Verdict

_BATCH = 16
"""Items that are judged before what was said is kept."""

_T = TypeVar("_T")


def verdicts(
    judge: Judge,
    items: Sequence[Item],
    path: Path,
    on_items: Callable[[int], None] = lambda n: None,
) -> dict[Item, Verdict]:
    """A verdict for each item; equal ones are judged once.

    Args:
        judge: the judge.
        items: what to judge.
        path: a JSONL file, of judges that have an identity.
        on_items: called with the number of items whenever some are judged.

    Raises:
        SteeringError: the judge cannot judge, or the file cannot be written.
    """
    return _ask(
        judge.identity, judge.judge, items, path, on_items, vars, lambda data: Verdict(**data)
    )


def scores(
    reward: Reward,
    items: Sequence[Item],
    path: Path,
    on_items: Callable[[int], None] = lambda n: None,
) -> dict[Item, dict[str, float]]:
    """Named scores for each item; otherwise as `verdicts`."""
    return _ask(reward.identity, reward.score, items, path, on_items, dict, dict)


def _ask(
    identity: str | None,
    ask: Callable[[Sequence[Item]], list[_T]],
    items: Sequence[Item],
    path: Path,
    on_items: Callable[[int], None],
    write: Callable[[_T], Any],
    read: Callable[[Any], _T],
) -> dict[Item, _T]:
    distinct = list(dict.fromkeys(items))
    found: dict[Item, _T] = {}
    if identity is not None:
        kept = _load(path)
        for item in distinct:
            data = kept.get(_key(identity, item))
            if data is not None:
                found[item] = read(data)
    on_items(len(found))
    missing = [item for item in distinct if item not in found]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        said = dict(zip(batch, ask(batch), strict=True))
        found.update(said)
        if identity is not None:
            _append(path, [[_key(identity, item), write(one)] for item, one in said.items()])
        on_items(len(batch))
    return found


def _key(identity: str, item: Item) -> str:
    return hashlib.sha256(json.dumps([identity, *item]).encode()).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    kept = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                key, data = json.loads(line)
                kept[key] = data
            except (ValueError, TypeError):  # the last line of an interrupted run
                continue
    return kept


def _append(path: Path, rows: Sequence[Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(map(json.dumps, rows)))
    except OSError as error:
        raise SteeringError(f"{path}: {error.strerror}") from None
