"""`/why` in the chat: the steering report of an answer, and its table."""

import pytest
from chats import LENGTH, answer, only

from pysteer.cli import console
from pysteer.cli.chat_events import (
    AnswerComplete,
    Explanation,
    TextPiece,
    Turn,
)
from pysteer.cli.chat_view import Printer

REPORT = {
    "mode": "mixed",
    "categories": {
        "says q": {
            "strength": 1.0,
            "gated": True,
            "active": True,
            "fired": True,
            "score": 0.875,
            "threshold": 0.25,
            "site": "residual",
            "layers": [2, 3],
            "tokens_steered": 12,
        },
        "z": {
            "strength": 0.5,
            "gated": False,
            "active": True,
            "fired": None,
            "score": None,
            "threshold": None,
            "site": "attention",
            "layers": [3],
            "tokens_steered": 14,
        },
    },
    "scores": {"says q": 0.875, "y": 0.0625},
    "gate": "probe",
    "prompt_reprocessed": True,
    "checks": 3,
    "tokens_steered": 14,
}


def test_printer_shows_a_steering_report(capsys):
    turn = Turn("hi", "QQ", "stop", "auto", REPORT, None, 1, 0)
    assert Printer(json=False).show(iter([TextPiece("QQ"), AnswerComplete(turn)]))
    out, err = capsys.readouterr()
    assert out == "QQ\n"
    assert err.splitlines() == [
        "says q 1 (score 0.88): 12 tokens steered",
        "z 0.5: 14 tokens steered",
    ]
    assert Printer(json=False).show(iter([Explanation(REPORT)]))
    out, err = capsys.readouterr()
    assert out == ""
    rows = [line.split() for line in err.splitlines()]
    assert ["says", "q", "0.875", "0.25", "open", "1", "residual", "2-3", "12"] in rows
    assert ["z", "forced", "0.5", "attention", "3", "14"] in rows
    assert ["y", "0.0625", "not", "asked"] in rows
    last = err.splitlines()[-1]
    for words in ("mixed", "14 tokens", "gate probe, decided 3 times", "once more"):
        assert words in last


LONG = [f"category_with_a_long_name_{number}" for number in range(10)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_why_tells_shared_values_once_and_cuts_no_name(width, capsys, monkeypatch):
    monkeypatch.setattr(console.err, "width", width)
    first = REPORT["categories"]["says q"] | {"tokens_steered": 0, "fired": False}
    rows = {name: first | {"score": 0.5 + at / 100} for at, name in enumerate(LONG)}
    report = REPORT | {"categories": rows, "scores": {n: r["score"] for n, r in rows.items()}}
    Printer(json=False).show(iter([Explanation(report)]))
    *table, shared, _ = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in table if "category_" in line] == LONG[::-1]
    assert max(map(len, table)) <= width
    assert shared == (
        "all 10 categories: threshold 0.25, gate closed, strength 1, where residual 2-3, "
        "tokens steered 0"
    )
    same = {name: row | {"score": -0.25} for name, row in rows.items()}
    report |= {"categories": same, "scores": dict.fromkeys(LONG, -0.25)}
    Printer(json=False).show(iter([Explanation(report)]))
    shared, _ = capsys.readouterr().err.splitlines()
    assert shared.startswith("all 10 categories: score -0.25, threshold 0.25, gate closed")


def test_why_explains_forced_steering(session):
    only(session, "/steer says q 20")
    answer(session, "hi")
    event = only(session, "/why")
    assert isinstance(event, Explanation)
    assert event.report["mode"] == "forced"
    found = event.report["categories"]["says q"]
    assert (found["strength"], found["gated"], found["active"]) == (20.0, False, True)
    assert found["tokens_steered"] == event.report["tokens_steered"] >= LENGTH
    only(session, "/off")
    answer(session, "hi")
    event = only(session, "/why")
    assert isinstance(event, Explanation)
    assert (event.report["mode"], event.report["categories"]) == ("off", {})


def test_why_explains_a_stopped_answer(session):
    only(session, "/steer says q 20")
    for event in session.handle("hi"):
        if isinstance(event, TextPiece):
            session.stop()
    event = only(session, "/why")
    assert isinstance(event, Explanation)
    assert event.report["categories"]["says q"]["active"]
