"""The method `contrast`: the difference between two answers to the same prompts.

`pysteer.extract.methods.arithmetic` gives shapes, units and errors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pysteer.errors import SteeringError, quoted
from pysteer.extract.answers import safe_answers, warn_of_unused
from pysteer.extract.capture import Row, Tokens
from pysteer.extract.inputs import TokenizedPrompt, require_fits, require_room
from pysteer.extract.methods.arithmetic import (
    Activations,
    Direction,
    check_activations,
    check_pairs,
    from_means,
    mean_of,
)
from pysteer.extract.methods.base import Method, Needs, Result, Task
from pysteer.settings import check, setting

_log = logging.getLogger(__name__)


def contrast(refusing: Activations, complying: Activations) -> Direction:
    """Return the mean of paired differences between two answers to one prompt: mean(r_i - c_i).

    r_i and c_i are taken over the same tokens of the response, such as the mean of its first k: row
    i of `refusing` while the model reads a safe answer to prompt i, row i of `complying` while it
    reads its own compliant answer. The subjects of the prompts cancel.

    Source: contrastive activation addition, arXiv 2312.06681, with openings of answers in place of
    single answer letters.

    Args:
        refusing: shape (n, n_embd), the safe side.
        complying: shape (n, n_embd), the unsafe side, of the same prompts in the same order.
    """
    check_activations(complying, refusing, names=("complying", "refusing"))
    check_pairs(complying, refusing, "contrast", names=("complying", "refusing"))
    return from_means(mean_of(complying, "complying"), mean_of(refusing, "refusing"))


@dataclass(frozen=True)
class ContrastOptions:
    """Options of the method `contrast`.

    Attributes:
        response_tokens: number of averaged tokens of each answer.
    """

    response_tokens: int = setting(8, "Tokens of the answers that are averaged.", 1)

    def __post_init__(self) -> None:
        check(self)


class Contrast(Method[ContrastOptions]):
    """The method `contrast`; see the function.

    Each unsafe prompt is continued by a safe answer and by the model's own. Prompts that the model
    refuses by itself, or does not answer, are left out with a warning.
    """

    name = "contrast"
    summary = "opening of a safe answer minus opening of the model's own"
    options = ContrastOptions
    needs = Needs(own_answers=True, safe_answers=True)
    reads_answers = True

    def check(self, task: Task[ContrastOptions]) -> None:
        """See `Method.check`."""
        unsafe = task.sides.all_unsafe
        prompts = [p.prompt for p in unsafe]
        safe_answers(prompts, task.answers)
        warn_of_unused(task.answers, prompts, task.sides.unsafe)
        require_room(task.reader.capture, unsafe, task.options.response_tokens)

    def find(self, task: Task[ContrastOptions]) -> Result:
        """See `Method.find`."""
        rows: list[Row] = []
        owners: list[int] = []
        group = {name: 2 * number for number, name in enumerate(task.sides.unsafe)}
        n_equal = n_prompts = 0
        for name, prompt, complying, refusing in self._answered(task):
            n_prompts += 1
            if not complying or complying == refusing[: len(complying)]:
                n_equal += 1
                continue
            for offset, answer in ((0, complying), (1, refusing)):
                start = len(prompt.tokens)
                row = Row(prompt.tokens + answer, start, start + len(answer))
                require_fits(row.tokens, task.reader.capture, prompt.prompt)
                rows.append(row)
                owners.append(group[name] + offset)
        if n_equal:
            _log.warning(
                "%d of %d own answers are no contrast and are left out", n_equal, n_prompts
            )
        for name in group:
            if group[name] not in owners:
                raise SteeringError(
                    f"category {quoted(name)}: the model complies with no prompt, so there is "
                    "no contrast; use another method"
                )
        means = task.reader.means(rows, owners, 2 * len(group), task.site, task.layers)

        def one(name: str, index: int) -> Direction:
            return from_means(means[group[name]][index], means[group[name] + 1][index])

        return Result(task.each(self.name, one))

    def _answered(
        self, task: Task[ContrastOptions]
    ) -> list[tuple[str, TokenizedPrompt, Tokens, Tokens]]:
        """Return category, prompt, and the openings of the model's own and the safe answer."""
        k = task.options.response_tokens
        named = [(name, p) for name, prompts in task.sides.unsafe.items() for p in prompts]
        own = task.reader.own_answers([p.tokens for _, p in named], k, "the model's own answers")
        texts = safe_answers([p.prompt for _, p in named], task.answers)
        safe = [task.reader.capture.response_tokens(text)[:k] for text in texts]
        return [(*which, c, r) for which, c, r in zip(named, own, safe, strict=True)]
