"""`Rule`: the condition for a category to act, as a logical expression over gates.

    malware and not (privacy_violation or "self harm")

Names, `and`, `or`, `not` and parentheses bind as in Python. A name is letters, digits and
underscores, or any text in single or double quotes. In quotes, a backslash escapes a quote or
another backslash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pysteer.errors import SteeringError, UnknownCategoryError, quoted

AND, OR, NOT = -1, -2, -3
"""The operators in `Rule.postfix`. NOT takes one operand, the others two."""

MAX_STACK = 32
"""The size of the stack on which the postfix form of a rule is evaluated."""

MAX_TEXT = 10_000

_OPERATORS = {"and": AND, "or": OR, "not": NOT}
_BINDS = {"or": 1, "and": 2, "not": 3}
_WORD = re.compile(r"[^\W\d]\w*")
_TOKEN = re.compile(
    rf"""\s*(?:(?P<word>{_WORD.pattern})|(?P<bracket>[()])|(?P<name>'(?:[^'\\]|\\['"\\])*'"""
    r"""|"(?:[^"\\]|\\['"\\])*")|(?P<end>\Z))"""
)


class _Token(NamedTuple):
    kind: str  # "name", "end", or the text itself: and, or, not, (, )
    text: str
    column: int  # from 1


@dataclass(frozen=True)
class Rule:
    """A logical expression over gates; equal to another of the same text.

    Attributes:
        text: the expression.
        names: the categories whose gates the expression names, each once, in the order of the text.

    Raises:
        SteeringError: invalid syntax, with the column from 1; or the text is too long or nested
            too deep.
    """

    text: str
    names: tuple[str, ...] = field(init=False, compare=False, repr=False)
    _postfix: tuple[str | int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise SteeringError(f"a rule is text such as 'a and not b', not {quoted(self.text)}")
        if len(self.text) > MAX_TEXT:
            raise SteeringError(f"the rule is longer than {MAX_TEXT} characters")
        postfix = _parsed(self.text)
        object.__setattr__(self, "_postfix", postfix)
        names = dict.fromkeys(item for item in postfix if isinstance(item, str))
        object.__setattr__(self, "names", tuple(names))

    @classmethod
    def of_category(cls, category: str) -> Rule:
        """Return the rule that is the category's own gate and nothing else."""
        if _WORD.fullmatch(category) and category not in _OPERATORS:
            return cls(category)
        return cls('"' + re.sub(r'(["\\])', r"\\\1", category) + '"')

    def evaluate(self, gates: Mapping[str, bool]) -> bool:
        """Return True if the rule holds.

        Args:
            gates: category to True if its gate is open; at least `names`.

        Raises:
            UnknownCategoryError: a name is not among `gates`.
        """
        stack: list[bool] = []
        for item in self._postfix:
            if isinstance(item, str):
                if item not in gates:
                    raise UnknownCategoryError(f"the rule names {quoted(item)}, which has no gate")
                stack.append(bool(gates[item]))
            elif item == NOT:
                stack.append(not stack.pop())
            else:
                right, left = stack.pop(), stack.pop()
                stack.append((left and right) if item == AND else (left or right))
        return stack.pop()

    def postfix(self, index: Mapping[str, int]) -> list[int]:
        """Return the rule for evaluation on a stack of at most `MAX_STACK` operands.

        Args:
            index: category to the number of its gate, from 0; at least `names`.

        Returns:
            n >= 0 pushes gate n, -1 (AND) and -2 (OR) take two operands, -3 (NOT) takes one.

        Raises:
            UnknownCategoryError: a name is not among `index`.
        """
        for name in self.names:
            if name not in index:
                raise UnknownCategoryError(f"the rule names {quoted(name)}, which has no gate")
        return [index[item] if isinstance(item, str) else item for item in self._postfix]

    def __str__(self) -> str:
        return self.text


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            column = len(text) - len(text[at:].lstrip()) + 1
            found = text[column - 1]
            if found in "'\"":
                raise SteeringError(
                    f"column {column}: the quote is not closed, or has a backslash before "
                    "another character than a quote or a backslash"
                )
            raise SteeringError(
                f"column {column}: unexpected {quoted(found)}; a rule has names, 'and', 'or', "
                "'not' and parentheses; put names with other characters than letters, digits and "
                "_ in quotes"
            )
        kind = match.lastgroup or ""
        part = match[kind]
        column = match.start(kind) + 1
        if kind == "name":
            yield _Token("name", re.sub(r"\\(.)", r"\1", part[1:-1], flags=re.DOTALL), column)
        elif kind == "word" and part not in _OPERATORS:
            yield _Token("name", part, column)
        else:
            yield _Token(part or "end", part, column)
        if kind == "end":
            return
        at = match.end()


def _parsed(text: str) -> tuple[str | int, ...]:
    """Return the rule in postfix order: names, and the numbers of the operators.

    Dijkstra's shunting yard, which needs no recursion: deep nesting cannot exhaust the stack.
    """
    found: list[str | int] = []
    waiting: list[_Token] = []  # operators and parentheses that are still open
    expects_name = True
    for token in _tokens(text):
        kind = token.kind
        if expects_name:
            if kind == "name":
                if not token.text.strip():
                    raise SteeringError(f"column {token.column}: the name is empty")
                found.append(token.text)
                expects_name = False
            elif kind in ("not", "("):
                waiting.append(token)
            else:
                raise SteeringError(
                    f"column {token.column}: expected a name, found {_shown(token)}"
                )
        elif kind in ("and", "or"):
            while waiting and _BINDS.get(waiting[-1].kind, 0) >= _BINDS[kind]:
                found.append(_OPERATORS[waiting.pop().kind])
            waiting.append(token)
            expects_name = True
        elif kind in (")", "end"):
            while waiting and waiting[-1].kind != "(":
                found.append(_OPERATORS[waiting.pop().kind])
            if kind == ")" and not waiting:
                raise SteeringError(f"column {token.column}: this parenthesis was never opened")
            if kind == "end" and waiting:
                raise SteeringError(f"column {waiting[-1].column}: this parenthesis is not closed")
            if waiting:
                waiting.pop()
        else:
            raise SteeringError(
                f"column {token.column}: expected 'and' or 'or', found {_shown(token)}"
            )
    _check_stack(found)
    return tuple(found)


def _check_stack(postfix: list[str | int]) -> None:
    held = 0
    for item in postfix:
        held += 1 if isinstance(item, str) else 0 if item == NOT else -1
        if held > MAX_STACK:
            raise SteeringError(f"the rule is nested more than {MAX_STACK} deep")


def _shown(token: _Token) -> str:
    return "the end of the rule" if token.kind == "end" else quoted(token.text)
