"""Progress of commands: rates, lines without a terminal, and the line before the first stage."""

from pysteer.cli.bars import Announced, Lines, Rate
from pysteer.progress import SILENT


def test_rate_leaves_out_what_is_known_at_the_start():
    now = 0.0
    rate = Rate(lambda: now)
    rate.add(90_000)  # from an earlier run, in no time
    assert rate.per_second() is None
    now = 1.5
    rate.add(100)
    assert rate.per_second() is None
    now = 3.5
    rate.add(400)
    assert rate.per_second() == 200
    now = 5.5
    rate.add(0)
    assert rate.per_second() == 100


def test_rate_of_a_moment_is_unknown():
    now = 0.0
    rate = Rate(lambda: now)
    for _ in range(100):
        now += 1e-4
        rate.add(30)
    assert rate.per_second() is None


def test_lines_of_progress_are_on_standard_error_and_ten_seconds_apart(capsys):
    now = 0.0
    progress = Lines(lambda: now)
    printed = []
    for stage, unit in (("activations", "tokens"), ("answering", "")):
        advance = progress.start(stage, 60, unit)
        for _ in range(6):
            now += 4
            advance(10)
            captured = capsys.readouterr()
            assert captured.out == ""
            if captured.err:
                printed.append((now, captured.err))
    assert printed == [
        (12, "activations: 30 of 60 tokens, 12 s\n"),
        (24, "activations: 60 of 60 tokens, 24 s\n"),
        (36, "answering: 30 of 60, 12 s\n"),
        (48, "answering: 60 of 60, 24 s\n"),
    ]


def test_first_line_comes_once_and_before_the_first_stage(capsys):
    progress = Announced(SILENT, "tiny, no pack: unsteered")
    assert capsys.readouterr().out == ""
    for expected in ("tiny, no pack: unsteered\n", ""):
        progress.start("answering", 3)(1)
        assert capsys.readouterr().out == expected
