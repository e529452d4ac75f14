"""Vocabularies for tiny models: a synthetic one, and copies of real ones.

The synthetic vocabulary is sentencepiece-shaped: control tokens, 256 byte tokens, "▁" and short
lower-case pieces. Any UTF-8 text goes through it unchanged, except a literal U+2581, which
sentencepiece itself turns into a space.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter, TokenType

CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_COMMON = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st the and ing "
    "▁t ▁a ▁th ▁the ▁s ▁w ▁o ▁of ▁to ▁in ▁is"
)
_MIN_VOCAB = len(CONTROL) + 256 + 1  # without "▁" a space would not survive


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer of a model: token texts and types, and the rules that split a text into them."""

    texts: list[bytes]
    types: list[int]
    scores: list[float] | None = None  # sentencepiece: higher merges first
    merges: list[str] | None = None  # byte-level BPE
    pre: str = "default"  # llama.cpp's name for the pattern that splits a text into words

    def write(self, w: GGUFWriter) -> None:
        """Write the tokenizer's metadata. BOS is token 1, EOS token 2."""
        w.add_tokenizer_model("llama" if self.merges is None else "gpt2")
        w.add_tokenizer_pre(self.pre)
        w.add_token_list(self.texts)
        w.add_token_types(self.types)
        if self.scores is not None:
            w.add_token_scores(self.scores)
        if self.merges is not None:
            w.add_token_merges(self.merges)
        w.add_unk_token_id(0)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_pad_token_id(0)  # transformers' Phi-3 would otherwise pad with token 32000
        w.add_add_bos_token(self.merges is None)
        w.add_add_space_prefix(False)  # a prefix would not survive the round trip


def synthetic_vocabulary(n_vocab: int, control: Sequence[str]) -> Vocabulary:
    """Make a sentencepiece vocabulary that ends in the control tokens given."""
    least = _MIN_VOCAB + len(control)
    if n_vocab < least:
        raise ValueError(f"n_vocab must be at least {least}, not {n_vocab}")
    letters = string.ascii_lowercase
    runs = (
        start + "".join(run)
        for length in itertools.count(1)
        for start in ("", "▁")
        for run in itertools.product(letters, repeat=length)
    )
    # Sentencepiece reaches a piece by joining shorter pieces, so the letters come first.
    normal: dict[str, None] = {}  # as an ordered set
    for piece in itertools.chain("▁" + letters, _COMMON.split(), runs):
        if len(normal) == n_vocab - least + 1:
            break
        normal[piece] = None
    texts = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *normal, *control]
    types = [TokenType.UNKNOWN] + [TokenType.CONTROL] * (len(CONTROL) - 1)
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(normal)
    types += [TokenType.CONTROL] * len(control)
    scores = [0.0] * (len(CONTROL) + 256) + [-float(i) for i in range(len(normal))]
    scores += [0.0] * len(control)
    return Vocabulary([text.encode() for text in texts], [int(kind) for kind in types], scores)


@cache
def _vocabulary_of(path: Path) -> Vocabulary:
    fields = GGUFReader(path).fields

    def contents(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    texts = [text.encode() for text in contents("tokens")]
    return Vocabulary(texts, contents("token_type"), merges=contents("merges"), pre=contents("pre"))


def copied_vocabulary(path: Path, control: Sequence[str]) -> Vocabulary:
    """Read the byte-level vocabulary of a model, and add control tokens at its end."""
    found = _vocabulary_of(path)
    added = [text.encode() for text in control]
    types = [*found.types, *[int(TokenType.CONTROL)] * len(added)]
    return replace(found, texts=[*found.texts, *added], types=types)
