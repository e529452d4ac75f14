"""A tiny model with a pack of two categories, a router that tells them apart, and prompts."""

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
    """The tokens of a chat with one message."""
    with closing(HookedLlama(path, n_ctx=64, verbose=False)) as llm:
        return rendered_prompt(llm, {"messages": [user_message(text)]})


def towards(letter, model):
    """A direction that makes the model say one letter: its row of the output matrix."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(model).tensors}
    token = 5 + ord(letter)  # after five control tokens, one for each byte
    row = tensors["output.weight"][token] / tensors["output_norm.weight"]
    return 400 * row / np.linalg.norm(row)


@pytest.fixture(scope="session")
def routed_pack(tiny_llama, tmp_path_factory):
    """A pack of "says q" and "says z", which do, and a router for prompts like those in TEXTS."""
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
    """Five prompts of each category, and three of one that the pack does not have."""
    rows = [Prompt(TEXTS[name].format(i), name) for name in ("says q", "says z") for i in range(5)]
    return [*rows, *(Prompt(TEXTS[""].format(f"x{i}"), "stranger") for i in range(3))]


@pytest.fixture(scope="session")
def benign():
    """Six prompts that no gate opens for."""
    return [Prompt(TEXTS[""].format(i)) for i in range(6)]
