"""A pack of two categories for a tiny model, with a router, and prompts."""

from contextlib import closing

import numpy as np
import pytest
from gguf import GGUFReader
from routers import router_for

from pysteer import HookedLlama, SteeringPack, SteeringVector
from pysteer.chat.handler import rendered_prompt
from pysteer.chat.messages import user_message
from pysteer.prompts import Prompt

TEXTS = {"says q": "what what what {}", "says z": "00 11 22 33 {}", "": "(some) [thing] {}"}


def chat_tokens(path, text):
    """Return the tokens of a chat with one message."""
    with closing(HookedLlama(path, n_ctx=64, verbose=False)) as llm:
        return rendered_prompt(llm, {"messages": [user_message(text)]})


def towards(letter, model):
    """Return a direction towards a letter: the row of the letter in the output matrix."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(model).tensors}
    token = 5 + ord(letter)  # five control tokens, then one token for each byte
    row = tensors["output.weight"][token] / tensors["output_norm.weight"]
    return 400 * row / np.linalg.norm(row)


@pytest.fixture(scope="session")
def routed_pack(tiny_llama, tmp_path_factory):
    """A pack whose categories "says q" and "says z" say a letter, with a router for TEXTS."""
    path = tmp_path_factory.mktemp("packs") / "routed.gguf"
    prompts = {name: chat_tokens(tiny_llama, text.format(0)) for name, text in TEXTS.items()}
    vectors = {
        f"says {letter}": SteeringVector(
            dict.fromkeys([2, 3], towards(letter.upper(), tiny_llama).astype(np.float32))
        )
        for letter in "qz"
    }
    SteeringPack(vectors, router=router_for(tiny_llama, prompts)).save(path)
    return path


@pytest.fixture(scope="session")
def harmful():
    """Five prompts of each category, and three of a category that the pack lacks."""
    rows = [Prompt(TEXTS[name].format(i), name) for name in ("says q", "says z") for i in range(5)]
    return [*rows, *(Prompt(TEXTS[""].format(f"x{i}"), "stranger") for i in range(3))]


@pytest.fixture(scope="session")
def benign():
    """Six prompts for which no gate opens."""
    return [Prompt(TEXTS[""].format(i)) for i in range(6)]
