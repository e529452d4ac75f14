"""Recorded verdicts and scores, so that a slow or paid judge judges no answer twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pysteer.journal import Journal
from pysteer.judge import Item, Judge, Reward, Verdict
from pysteer.progress import Advance, ignore

_BATCH = 16
"""Items judged between two writes."""

_T = TypeVar("_T")


def verdicts(
    judge: Judge, items: Sequence[Item], path: Path, advance: Advance = ignore
) -> dict[Item, Verdict]:
    """Return a verdict for each item; equal items are judged once.

    Args:
        judge: the judge.
        items: prompts and answers.
        path: journal of the verdicts of judges that have an identity.
        advance: called with the number of items just judged.

    Raises:
        SteeringError: the judge failed, or the file cannot be written.
    """

    def read(data: Any) -> Verdict:
        return Verdict(**data)

    return _recorded(judge.identity, judge.judge, items, path, advance, (vars, read))


def scores(
    reward: Reward, items: Sequence[Item], path: Path, advance: Advance = ignore
) -> dict[Item, dict[str, float]]:
    """Return named scores for each item; see `verdicts`."""
    return _recorded(reward.identity, reward.score, items, path, advance, (dict, dict))


def _recorded(
    identity: str | None,
    ask: Callable[[Sequence[Item]], list[_T]],
    items: Sequence[Item],
    path: Path,
    advance: Advance,
    codec: tuple[Callable[[_T], Any], Callable[[Any], _T]],
) -> dict[Item, _T]:
    write, read = codec
    distinct = list(dict.fromkeys(items))
    journal = None if identity is None else Journal(path)
    keys = {item: _key(identity, item) for item in distinct}
    results: dict[Item, _T] = {}
    if journal is not None:
        results = {item: read(journal.get(key)) for item, key in keys.items() if key in journal}
    advance(len(results))
    missing = [item for item in distinct if item not in results]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        fresh = dict(zip(batch, ask(batch), strict=True))
        results.update(fresh)
        if journal is not None:
            journal.put_all((keys[item], write(result)) for item, result in fresh.items())
        advance(len(batch))
    return results


def _key(identity: str | None, item: Item) -> str:
    return hashlib.sha256(json.dumps([identity, *item]).encode()).hexdigest()
