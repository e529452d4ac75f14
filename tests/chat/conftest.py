"""Tiny random models with the chat templates of many families."""

import pytest
from templates import TEMPLATES
from tiny_models import write_tiny

from pysteer import shipped

VOCABULARIES = ("sentencepiece", "byte-level")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A function from template and vocabulary to the path of a tiny random Llama.

    The byte-level vocabulary is the default model's, with the template's control tokens.
    """
    folder = tmp_path_factory.mktemp("chat models")

    def get(name, vocabulary="sentencepiece"):
        path = folder / f"{name}-{vocabulary}.gguf"
        if not path.exists():
            template = TEMPLATES[name]
            copied = {"vocabulary_of": shipped.default_model()}
            write_tiny(
                "llama",
                path,
                n_layer=3,
                n_embd=32,
                chat_template=template.source,
                control=template.control,
                **(copied if vocabulary == "byte-level" else {}),
            )
        return path

    return get
