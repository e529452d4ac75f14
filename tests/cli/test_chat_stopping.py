"""Stopping an answer of the chat: by a call, a signal, or a reader that leaves."""

import signal

import pytest
from chats import answer, evaluated, only

from pysteer.cli.chat_events import (
    AnswerComplete,
    Notice,
    TextPiece,
)
from pysteer.cli.chat_terminal import interrupting


@pytest.fixture
def says_q(session):
    """A session whose answer comes letter by letter; unsteered, the tiny model says no text."""
    only(session, "/steer says q 20")
    return session


def continues(session, reference, said, written):
    """Return True if the conversation continues from the text so far."""
    only(session, "/off")
    return answer(session, "so") == reference(said, written, "so")


def test_stop_ends_the_answer_and_keeps_its_text(says_q, llm, reference):
    counts = evaluated(llm)
    pieces = []
    for event in says_q.handle("the cat"):
        if isinstance(event, TextPiece):
            pieces.append(event.text)
            if len(pieces) == 3:
                says_q.stop()
    assert isinstance(event, AnswerComplete)
    assert pieces == ["Q"] * 3
    assert (event.turn.response, event.turn.finish_reason) == ("QQQ", "interrupted")
    assert says_q.turns == [event.turn]
    assert len(counts) == 3  # nothing was computed that nobody reads
    assert continues(says_q, reference, "the cat", "QQQ")


def test_stop_before_the_first_token_forgets_the_message(session, llm, reference):
    original = llm.eval

    def evaluate(tokens):
        session.stop()
        original(tokens)

    llm.eval = evaluate
    event = only(session, "the cat")
    assert isinstance(event, Notice)
    assert session.turns == []
    del llm.eval
    assert answer(session, "on") == reference("on")


def interrupted_after(llm, evaluations, session=None):
    """Raise KeyboardInterrupt from the evaluation with that number, after it is done."""
    original = llm.eval
    left = iter(range(evaluations, -1, -1))

    def evaluate(tokens):
        original(tokens)
        if next(left, 1) == 0:
            if session is not None:
                session.stop()
            raise KeyboardInterrupt

    llm.eval = evaluate


def test_second_interrupt_ends_the_answer_at_once(says_q, llm, reference):
    interrupted_after(llm, 4, says_q)
    assert answer(says_q, "the cat") == "QQQQ"
    assert says_q.turns[-1].finish_reason == "interrupted"
    assert llm.n_tokens == 0  # the cache may hold anything
    assert continues(says_q, reference, "the cat", "QQQQ")


def test_interrupt_without_stop_is_raised(session, llm):
    interrupted_after(llm, 4)
    with pytest.raises(KeyboardInterrupt):
        list(session.handle("the cat"))


def test_closing_the_events_stops_the_answer(says_q, reference):
    events = says_q.handle("the cat")
    assert [next(events), next(events)] == [TextPiece("Q"), TextPiece("Q")]
    events.close()
    (turn,) = says_q.turns
    assert (turn.response, turn.finish_reason) == ("QQ", "interrupted")
    assert continues(says_q, reference, "the cat", "QQ")


def test_first_signal_waits_for_a_token_and_second_does_not(says_q):
    before = signal.getsignal(signal.SIGINT)
    with interrupting(says_q):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # nothing is written yet
        events = says_q.handle("the cat")
        next(events)
        signal.raise_signal(signal.SIGINT)
        assert says_q.stopping
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        (answered,) = events
    assert answered.turn.response == "Q"
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_during_the_prompt_stops_it(says_q, llm, reference):
    original = llm.eval

    def evaluate(tokens):
        original(tokens)
        signal.raise_signal(signal.SIGINT)

    llm.eval = evaluate
    with interrupting(says_q):
        event = only(says_q, "the cat")
    assert isinstance(event, Notice)
    assert says_q.turns == []
    del llm.eval
    only(says_q, "/off")
    assert answer(says_q, "on") == reference("on")
