"""Helpers of the chat's tests: a model that says letters, and ways to inspect a session."""

from contextlib import nullcontext
from types import MappingProxyType

import numpy as np
from gguf import GGUFReader

from pysteer import SteeringPack, SteeringVector
from pysteer.cli.chat_events import AnswerComplete, TextPiece, UserError

CONTEXT = 512
LENGTH = 12


def towards(letter, model):
    """Return a direction that makes the model say a letter: its row of the output matrix."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(model).tensors}
    token = 5 + ord(letter)  # after five control tokens, one for each byte
    row = tensors["output.weight"][token] / tensors["output_norm.weight"]
    return 20 * row / np.linalg.norm(row)


def sent(llm):
    """Return a list that fills with messages and steering of every request from now on."""
    requests = []
    original = llm.create_chat_completion

    def create_chat_completion(messages, **arguments):
        requests.append((messages, arguments.get("steering", "left out")))
        return original(messages, **arguments)

    llm.create_chat_completion = create_chat_completion
    return requests


def evaluated(llm):
    """Return a list that fills with the number of tokens of every evaluation from now on."""
    counts = []
    original = llm.eval

    def evaluate(tokens):
        counts.append(len(tokens))
        original(tokens)

    llm.eval = evaluate
    return counts


def only(session, text):
    """Return the single event of an entry."""
    (event,) = session.handle(text)
    return event


def answer(session, text):
    """Return the answer to a message, and check its events."""
    *before, last = session.handle(text)
    assert isinstance(last, AnswerComplete)
    assert all(isinstance(event, TextPiece) for event in before)
    pieces = [event.text for event in before]
    assert last.turn.response == "".join(pieces)
    assert last.turn is session.turns[-1]
    return last.turn.response


def mistake(session, text, *words):
    """Check that an entry leads to one line with some words in it, and changes nothing."""
    before = list(session.turns), session.requested, session.system
    event = only(session, text)
    assert isinstance(event, UserError)
    for word in words:
        assert word in event.text
    assert (session.turns, session.requested, session.system) == before


class Echo:
    """A model that answers with the last message in capitals; its tokens are characters."""

    pack = SteeringPack(
        {"a": SteeringVector({1: np.ones(4)}), "b c": SteeringVector({1: [1.0] * 4})}
    )
    chat_format = None
    _chat_handlers = MappingProxyType({})

    def __init__(self, n_ctx=10**6):
        self.requests = []
        self._n_ctx = n_ctx

    def n_ctx(self):
        return self._n_ctx

    def tokenize(self, text, *_):
        return list(text)

    def chat_handler(self, *, llama, messages, **_):
        llama.create_completion(prompt=list("".join(m["content"] for m in messages)))

    def steering(self, asked):
        for name in asked if isinstance(asked, dict) else ():
            _ = self.pack[name]
        return nullcontext()

    def close(self):
        pass

    def create_chat_completion(self, messages, **arguments):
        self.requests.append((messages, arguments))
        for delta in ({"role": "assistant"}, {"content": messages[-1]["content"].upper()}):
            yield {"choices": [{"delta": delta, "finish_reason": None}]}
        yield {"choices": [{"delta": {}, "finish_reason": "stop"}], "steering": {"categories": {}}}
