"""Text from tokens, one token at a time: UTF-8, stop strings, and the end of the text.

The text equals that of `llama_cpp.Llama.create_completion`, which reads the whole text again
after every token; here the cost of a token does not grow with the text. Bytes that are not UTF-8
differ: llama-cpp-python leaves them out, and does not count a token that leaves a character
unfinished.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Callable, Sequence
from typing import Literal

from llama_cpp import Llama
from llama_cpp.llama_tokenizer import LlamaTokenizer

from pysteer.llama.vocabulary import ends_text

FinishReason = Literal["stop", "length", "cancelled"]


class Pieces(dict[int, "bytes | None"]):
    """Token to its bytes, or None for a token that ends the text; filled when asked.

    Args:
        llm: the model; nothing new is looked up once the model is closed.
    """

    def __init__(self, llm: Llama) -> None:
        super().__init__()
        self._llm = llm
        self.bos = llm.token_bos()
        # Other tokenizers than llama.cpp's own may write a token differently after another one.
        self.in_context: Callable[[list[int], list[int]], bytes] | None = (
            None if type(llm.tokenizer_) is LlamaTokenizer else llm.tokenizer_.detokenize
        )

    def __missing__(self, token: int) -> bytes | None:
        piece = None if ends_text(self._llm, token) else self._llm.detokenize([token])
        self[token] = piece
        return piece


class Writing:
    """The text of one request so far.

    Args:
        pieces: the model's vocabulary.
        prompt: the prompt's tokens.
        stop: strings that end the text and are not part of it.
        max_tokens: at least 1. Every token counts, also inside a character.
        bos_first: the prompt was empty; then llama-cpp-python counts the BOS token as written.
    """

    def __init__(
        self,
        pieces: Pieces,
        prompt: Sequence[int],
        *,
        stop: Sequence[str],
        max_tokens: int,
        bos_first: bool = False,
    ) -> None:
        self._pieces = pieces
        self._prompt = () if pieces.in_context is None else prompt
        self._stop = [s.encode("utf-8") for s in stop]
        self._longest_stop = max(map(len, self._stop), default=0)
        self._max_tokens = max_tokens
        self._text = bytearray()
        self._sent = 0  # bytes of the text that `take` has returned
        self._searched = 0  # bytes of the text in which no stop string ends
        # Some sentencepiece models begin a text with a space; remove it.
        self._leading_space = pieces.in_context is None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.tokens = array("i", [pieces.bos] if bos_first else [])

    @property
    def remaining(self) -> int:
        """Number of tokens that may still be written."""
        return self._max_tokens - len(self.tokens)

    def add(self, token: int) -> FinishReason | None:
        """Write a token; return the reason if the text ends with it."""
        piece = self._pieces[token]
        if piece is None:
            return "stop"
        if self._pieces.in_context is not None:
            piece = self._pieces.in_context([token], [*self._prompt, *self.tokens])
        self.tokens.append(token)
        text = self._text
        text += piece
        if self._leading_space and text:
            if self.tokens[0] == self._pieces.bos and text[:1] == b" ":
                del text[:1]
            self._leading_space = False
        if self._stop and self._cut_at_stop():
            return "stop"
        self._searched = len(text)
        return "length" if len(self.tokens) >= self._max_tokens else None

    def _cut_at_stop(self) -> bool:
        start = max(0, self._searched - self._longest_stop + 1)
        for stop in self._stop:
            at = self._text.find(stop, start)
            if at >= 0:
                del self._text[at:]
                return True
        return False

    def _held_back(self) -> int:
        """Return the number of bytes at the end that could begin a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:n]):
                    longest = n
                    break
        return longest

    def take(self) -> str:
        """Return the text since the last call, up to where a stop string could still cut it."""
        end = self._searched - (self._held_back() if self._stop else 0)
        if end <= self._sent:
            return ""
        fresh = self._decoder.decode(bytes(self._text[self._sent : end]))
        self._sent = end
        return fresh

    def take_rest(self) -> str:
        """Return the text that `take` has held back; call once, after the last token."""
        fresh = self._decoder.decode(bytes(self._text[self._sent :]), final=True)
        self._sent = len(self._text)
        return fresh

    @property
    def text(self) -> str:
        """The whole text, with U+FFFD for bytes that are not UTF-8."""
        return self._text.decode("utf-8", errors="replace")
