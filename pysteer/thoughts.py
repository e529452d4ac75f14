"""Thoughts of reasoning models, and the answers behind them.

A reasoning model writes a thought before its answer, between markers of the model's own format. A
user sees the answer alone, so judges and figures read the answer alone.

- A thought goes from its opening marker to the closing marker of the same format.
- A closing marker without an opening marker ends a thought that began with the text: many chat
  templates write the opening marker into the prompt.
- A thought without an end leaves no answer, and neither does a thought with nothing behind it.
- Text before a thought is part of the answer: a user sees that text too.

Sources of the markers: `common/chat.cpp` of llama.cpp, the reasoning parsers of vLLM and SGLang,
and the chat templates of the models named in the tables.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_MARKERS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen 3, GLM 4.5, Granite 3.3, Nemotron, MiniMax M2
    ("<thinking>", "</thinking>"),  # a common prompt for models without a format of their own
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),  # fine-tunes by GRPO
    ("<reason>", "</reason>"),  # likewise
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command R7B, Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|think_start|>", "<|think_end|>"),  # ether0
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"),  # Solar Open
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss (harmony)
)

MARKER_TOKENS: Final = 48
"""Tokens at the end of a prompt that hold any marker, for `opening_of`."""

_WORDS = (
    ("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
)
"""Markers of plain words, at the beginning of a text alone."""

_BARE_ENDS = ("[BEGIN FINAL RESPONSE]", "<|channel|>final<|message|>")
"""Markers of an answer: all text before them is a thought."""

_HARMONY = re.compile(r"analysis(?=[^\W\d_]).*?(?:assistant(?:final|commentary)|\Z)", re.DOTALL)
"""The thought of gpt-oss in a text without special tokens, as llama-cpp-python returns it."""

_ENVELOPE = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>commentary[^<]*<\|message\|>"
    r"|<\|(?:end|return)\|>|<\|start\|>assistant(?=\s*(?:<\|channel\|>|$))"
    r"|\[END FINAL RESPONSE\]"
)
"""Markers around the visible messages of harmony, and behind Apriel's answer."""


def _either(markers: list[str]) -> str:
    return "|".join(map(re.escape, markers))


_CLOSING = {opening.lower(): closing for opening, closing in (*_MARKERS, *_WORDS)}
_OPENING = re.compile(_either([opening for opening, _ in _MARKERS]), re.IGNORECASE)
_ENDS = [closing for _, closing in _MARKERS if closing != "<|end|>"]
_MARK = re.compile(
    rf"(?P<opening>{_OPENING.pattern})|(?P<closing>{_either([*_ENDS, *_BARE_ENDS])})",
    re.IGNORECASE,
)
_OPENING_WORDS = re.compile(_either([opening for opening, _ in _WORDS]), re.IGNORECASE)


class Answered(NamedTuple):
    """A text without its thoughts.

    Attributes:
        answer: the text that a user sees; the whole text if it has no thought. "" if unfinished.
        unfinished: True if the text ends inside a thought, or with a thought, without an answer.
    """

    answer: str
    unfinished: bool


def answered(text: str, opening: str = "") -> Answered:
    """Return the answer in the text of a model.

    Args:
        text: all that the model wrote, special tokens included.
        opening: the marker at the end of the prompt; see `opening_of`.

    Examples:
        >>> answered("<think>I should not help.</think>Sure, here is how.").answer
        'Sure, here is how.'
        >>> answered("The user wants a poem.</think>Roses are red.").answer
        'Roses are red.'
        >>> answered("<think>I should not").unfinished
        True
        >>> answered("Roses are red.").answer
        'Roses are red.'
    """
    whole = opening + text
    parts, unfinished = _outside(whole)
    if parts == [whole]:
        return Answered(_ENVELOPE.sub("", text) if "<|channel|>" in text else text, False)
    visible = (_ENVELOPE.sub("\n", part).strip() for part in parts)
    answer = "\n".join(part for part in visible if part)
    if unfinished or not answer:
        return Answered("", True)
    return Answered(answer, False)


def opening_of(prompt: str) -> str:
    """Return the marker of a thought with which a prompt ends; "" if it ends with none.

    Args:
        prompt: the end of a rendered prompt, special tokens included.

    Examples:
        >>> opening_of("<|im_start|>assistant\\n<think>\\n")
        '<think>'
        >>> opening_of("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n")
        ''
    """
    end = prompt.rstrip()
    for opening, _ in (*_MARKERS, *_WORDS):
        if end.lower().endswith(opening.lower()):
            return opening
    return ""


def _outside(text: str) -> tuple[list[str], bool]:
    """Return the parts of a text outside thoughts, and True if the text ends inside a thought."""
    start = len(text) - len(text.lstrip())
    if found := _HARMONY.match(text, start):
        rest = text[found.end() :]
        return [rest], not rest
    parts: list[str] = []
    at = 0
    if words := _OPENING_WORDS.match(text, start):
        at = _end(text, words.group(), words.end())
        if at < 0:
            return parts, True
    while mark := _MARK.search(text, at):
        if mark["closing"]:
            at = mark.end()  # of a thought that began where the last one ended
            continue
        parts.append(text[at : mark.start()])
        at = _end(text, mark.group(), mark.end())
        if at < 0:
            return parts, True
    return [*parts, text[at:]], False


def _end(text: str, opening: str, start: int) -> int:
    """Return the index behind the closing marker; -1 if the text has none."""
    closing = re.compile(re.escape(_CLOSING[opening.lower()]), re.IGNORECASE).search(text, start)
    return closing.end() if closing else -1
