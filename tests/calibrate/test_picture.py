"""The picture of a search."""

import matplotlib

from pysteer.calibrate.candidates import Trial
from pysteer.calibrate.picture import plot_search
from pysteer.calibrate.search import SearchResult, TrialRecord
from pysteer.calibrate.trials import Outcome


def picture(categories, collateral, path, **words):
    """The text of a picture of three trials for each category."""
    records = [
        TrialRecord(Trial("mean at 5", strength, "all"), Outcome(safe, 0.0, collateral, 5))
        for strength, safe in ((0.75, 0.2), (1.0, 0.6), (1.25, 0.8))
    ]
    trials = dict.fromkeys(categories, records)
    result = SearchResult(trials, dict.fromkeys(categories, records[2]), 3, "trials")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_search(result, 0.01, path, **words)
    return path.read_text()


def test_one_category_is_drawn_over_its_strengths(tmp_path):
    svg = picture(["a"], 0.0, tmp_path / "a.svg")
    assert ">strength</text>" in svg
    assert "other categories" not in svg
    assert "worst category" not in svg
    positions = {line.split('x="')[1].split('"')[0] for line in svg.splitlines() if "<use" in line}
    assert len(positions) > 3


def test_several_categories_are_drawn_over_their_collateral(tmp_path):
    svg = picture(["a", "b"], 0.5, tmp_path / "a.svg", good="in style")
    assert "other categories' prompts made in style, forced" in svg.replace("&apos;", "'")
    assert "worst category" in svg
    assert "own prompts in style" in svg
    assert "safe" not in svg
