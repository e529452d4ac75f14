"""Progress bars: rates of what was measured, and the line before the first stage."""

from pysteer.cli.bars import Announced, Rate
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


def test_first_line_comes_once_and_before_the_first_stage(capsys):
    progress = Announced(SILENT, "tiny, no pack: unsteered")
    assert capsys.readouterr().out == ""
    for expected in ("tiny, no pack: unsteered\n", ""):
        progress.start("answering", 3)(1)
        assert capsys.readouterr().out == expected
