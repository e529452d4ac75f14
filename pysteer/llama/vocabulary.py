"""Tokens and their texts, through llama.cpp's public functions."""

from __future__ import annotations

import llama_cpp
from llama_cpp import Llama

from pysteer.errors import SteeringError


def token_piece(llm: Llama, token: int) -> bytes:
    """Return the text of a token as bytes, special tokens included.

    Raises:
        SteeringError: the vocabulary has no such token; llama.cpp would end the process.
    """
    if not 0 <= token < llm.n_vocab():
        raise SteeringError(f"unknown token {token}; tokens are 0 to {llm.n_vocab() - 1}")
    return llm.detokenize([token], special=True)


def ends_text(llm: Llama, token: int) -> bool:
    """Return True if a token ends the text."""
    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llm.model), token))
