"""The text of an answer on standard output, piece by piece."""

from __future__ import annotations

import os
import sys
from typing import Final

from rich.cells import cell_len

from pysteer.errors import printable

_TAB: Final = 8
_NARROWEST: Final = 20


class WordWrap:
    """Breaks lines between words, so that a terminal does not cut words at its edge.

    A word is held back until the next piece begins another one. Wide characters, as of Chinese, are
    words of their own. A word that is longer than a line is left to the terminal.
    """

    def __init__(self) -> None:
        self._column = 0
        self._gap = ""  # blanks before the word, which a break replaces
        self._word = ""

    def add(self, text: str, width: int) -> str:
        """Return the text to write now.

        Args:
            text: the next piece.
            width: columns of the terminal.
        """
        written = []
        for character in text:
            if character == "\n":
                written.append(self.end(width) + "\n")
                self._column = 0
            elif character in " \t":
                if self._word:
                    written.append(self.end(width))
                self._gap += character
            else:
                if self._word and (cell_len(character) > 1 or cell_len(self._word[-1]) > 1):
                    written.append(self.end(width))
                self._word += character
        return "".join(written)

    def end(self, width: int) -> str:
        """Return the word held back, on a new line if the line has no room."""
        gap, word = self._gap, self._word
        self._gap = self._word = ""
        after = self._column
        for character in gap:
            after += 1 if character == " " else _TAB - after % _TAB
        length = cell_len(word)
        if self._column and word and after + length > width and length <= width:
            self._column = length
            return f"\n{word}"
        self._column = after + length
        if self._column > width:  # the terminal has broken the line
            self._column %= width
        return gap + word


class AnswerPrinter:
    """Prints an answer piece by piece. On a terminal, lines break between words.

    Attributes:
        text: the answer so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self._wrap = WordWrap()

    def add(self, piece: str) -> None:
        """Print the next piece."""
        self.text += piece
        if sys.stdout.isatty():
            piece = self._wrap.add(printable(piece, "�"), _width())
        print(piece, end="", flush=True)

    def end(self) -> None:
        """Print the word held back, and end the line."""
        print(self._wrap.end(_width()), flush=True)


class _Collected(AnswerPrinter):
    def add(self, piece: str) -> None:
        self.text += piece

    def end(self) -> None:
        pass


def answer_printer(json: bool) -> AnswerPrinter:
    """Return a printer; with --json, a printer that collects the text and prints nothing."""
    return _Collected() if json else AnswerPrinter()


def _width() -> int:
    try:
        return max(_NARROWEST, os.get_terminal_size(sys.stdout.fileno()).columns)
    except (OSError, ValueError):  # replaced by a stream without a terminal
        return 80
