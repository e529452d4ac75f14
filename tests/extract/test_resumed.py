"""Extractions that are interrupted, resumed, or repeated with a cache."""

from collections import Counter

import pytest
from extraction import FakeCapture, StopError, contents, extract_fake
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pysteer.extract.settings import ExtractSettings

METHODS = [
    {"method": "mean"},
    {"method": "guided"},
    {"method": "contrast", "options": {"response_tokens": 4}},
    {"method": "lda", "site": "attention"},
    {"method": "pca", "pooling": "response"},
]


@hypothesis_settings(max_examples=20, deadline=None)
@given(which=st.sampled_from(METHODS), stops=st.lists(st.integers(0, 60), max_size=4))
def test_interrupted_extraction_resumes(which, stops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    chosen = ExtractSettings(router=False, layers=(1, 2), **which)
    whole = FakeCapture()
    expected = extract_fake(whole, tmp_path_factory.mktemp("whole"), chosen)
    ran = Counter()
    for stop in stops:
        capture = FakeCapture(stop_after=stop)
        try:
            pack = extract_fake(capture, folder, chosen)
        except StopError:
            assert sum(capture.ran.values()) == stop
        else:
            check_same(pack, expected)
        ran += capture.ran
    capture = FakeCapture()
    check_same(extract_fake(capture, folder, chosen), expected)
    assert ran + capture.ran == whole.ran
    assert set(whole.ran.values()) == {1}


def check_same(pack, expected):
    assert pack.provenance == expected.provenance
    assert pack.residual_norm == expected.residual_norm
    for name, vector in expected.categories.items():
        for layer, row in vector.items():
            # Running means are summed in another order, in float64, then rounded.
            assert pack[name].direction(layer) == pytest.approx(row, rel=1e-6, abs=1e-7)


def test_exception_in_progress_loses_no_work(tmp_path):
    class Reports:
        def start(self, stage, total, unit=""):
            done = []

            def progress(units):
                done.append(units)
                if len(done) == 5:
                    raise KeyboardInterrupt

            return progress

    chosen = ExtractSettings(router=False, layers=(1, 2))
    ran = Counter()
    interrupted = 0
    for _ in range(100):
        capture = FakeCapture()
        try:
            extract_fake(capture, tmp_path / "1", chosen, progress=Reports())
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            ran += capture.ran
    whole = FakeCapture()
    extract_fake(whole, tmp_path / "2", chosen)
    assert interrupted > 10
    # The model may have been one row ahead of the progress.
    assert ran.keys() == whole.ran.keys()
    assert sum(ran.values()) <= sum(whole.ran.values()) + interrupted


def test_router_activations_are_not_used_for_another_site(tmp_path):
    found = []
    for router in (True, False):
        chosen = ExtractSettings(router=router, site="attention")
        found.append(contents(extract_fake(FakeCapture(), tmp_path / str(router), chosen)))
    assert found[0] == found[1]


def test_changed_model_file_runs_again(tmp_path):
    chosen = ExtractSettings(router=False, layers=(1, 2), method="contrast")
    first, second = FakeCapture(), FakeCapture(identity="the file, changed")
    extract_fake(first, tmp_path, chosen)
    extract_fake(second, tmp_path, chosen)
    assert first.ran == second.ran


def test_other_settings_reuse_shared_results(tmp_path):
    extract_fake(FakeCapture(), tmp_path, ExtractSettings(layers=(1, 2)))
    capture = FakeCapture()
    extract_fake(capture, tmp_path, ExtractSettings(layers=(1, 2), method="lda", unit_norm=True))
    assert not capture.ran


def test_progress_reaches_every_total(tmp_path):
    stages = []

    class Reports:
        def start(self, stage, total, unit=""):
            found = [stage, total, unit, 0]
            stages.append(found)

            def progress(units):
                assert units >= 0
                found[3] += units

            return progress

    for which in METHODS:
        chosen = ExtractSettings(layers=(1, 2), **which)
        extract_fake(FakeCapture(), tmp_path / which["method"], chosen, progress=Reports())
    assert {unit for _, _, unit, _ in stages} == {"tokens", "answers"}
    for stage in stages:
        assert stage[1] == stage[3] > 0, stage
