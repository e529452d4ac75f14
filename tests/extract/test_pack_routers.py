"""The router of a pack: its prompts and rows, alone and in an extraction."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from extraction import (
    GENERIC,
    GENERIC_DATA,
    TWINS,
    UNSAFE,
    FakeCapture,
    contents,
    extract_fake,
    prompts,
    tail_of,
)

from pysteer.extract.capture import Row
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract, fit_pack_routers
from pysteer.extract.routers import fit as fit_module
from pysteer.extract.routers import prompts as prompts_module
from pysteer.extract.routers.settings import RouterSettings
from pysteer.extract.settings import ExtractSettings


def test_pack_router_equals_router_fitted_alone(tmp_path):
    settings = ExtractSettings(layers=(1, 2), gates=("margin", "probe"), seed=3)
    benign = prompts("hello", "any", 12, listed="")
    data = Data(UNSAFE, TWINS, benign=benign)
    pack = extract(FakeCapture(), data, settings, cache=tmp_path / "1")
    capture = FakeCapture()
    (alone,) = fit_pack_routers(
        capture, [data], cache=tmp_path / "2", settings=RouterSettings(gates=settings.gates, seed=3)
    )
    assert alone == pack.router
    assert list(alone.gates) == ["margin", "probe"]
    # Only each prompt's message and suffix ran, at the router's layers.
    every = {p.prompt for p in [*UNSAFE, *TWINS, *benign]}
    assert {layers for _, _, layers in capture.ran} == {(0, 1, 2)}
    assert capture.ran.total() == 2 * len(every)
    assert {(row.start, row.stop) for row, *_ in capture.ran} == {
        span for row, *_ in capture.ran for span in ((1, len(row.tokens) - 2), tail_of(row))
    }
    again = FakeCapture()
    fit_pack_routers(again, [data], cache=tmp_path / "2", settings=RouterSettings(seed=4))
    assert not again.ran  # activations are kept


def test_routers_fitted_together_equal_single_fits_and_share_runs(tmp_path):
    benign = prompts("hello", "any", 12, listed="")
    whole, part = Data(UNSAFE, TWINS, benign), Data(UNSAFE[:-1], TWINS[:-1], benign[:9])
    capture = FakeCapture()
    together = fit_pack_routers(capture, [whole, part], cache=tmp_path / "together")
    every = {p.prompt for p in [*UNSAFE, *TWINS, *benign]}
    assert capture.ran.total() == 2 * len(every)
    alone = [
        fit_pack_routers(FakeCapture(), [data], cache=tmp_path / f"{i}")[0]
        for i, data in enumerate((whole, part))
    ]
    assert together == alone
    assert together[0] != together[1]


def test_twins_share_a_group_and_categorised_safe_prompts_are_look_alikes(tmp_path, monkeypatch):
    found = {}
    original = fit_module.fit_router

    def watch(h, labels, **options):
        found.update(options, labels=labels, h=h)
        return original(h, labels, **options)

    monkeypatch.setattr(fit_module, "fit_router", watch)
    unsafe = [*UNSAFE, *(replace(p, pair_id=None) for p in prompts("harm", "hate", 3, seed=9))]
    benign = prompts("hello", "other", 12)
    safe = [*TWINS, *GENERIC]
    fit_pack_routers(
        FakeCapture(),
        [Data(unsafe, safe, benign)],
        cache=tmp_path,
        settings=RouterSettings(false_positive_rate=0.3, max_leak=0.2, look_alike_rate=0.4),
    )
    limits = ("false_positive_rate", "max_leak", "look_alike_rate")
    assert [getattr(found["settings"], name) for name in limits] == [0.3, 0.2, 0.4]
    order = [*{(p.prompt, p.category): p for p in unsafe}.values(), *safe, *benign]
    assert found["labels"] == [p.category if "harm" in p.prompt else "" for p in order]
    assert found["look_alikes"] == ["calm" in p.prompt for p in order]
    by_group = {}
    for group, prompt in zip(found["groups"], order, strict=True):
        by_group.setdefault(group, set()).add(prompt.pair_id)
    assert all(len(ids) == 1 for ids in by_group.values())
    assert len([1 for p in order if p.pair_id is None]) == sum(
        ids == {None} for ids in by_group.values()
    )
    reads = found["reads"]
    capture = FakeCapture()
    for index in (0, len(order) - 1):
        tokens = capture.prompt_tokens(order[index].prompt)
        spans = {"user": (1, len(tokens) - 2), "suffix": tail_of(Row(tokens, 0, 1))}
        for at, read in enumerate(reads):
            row = Row(tokens, *spans[read.pooling])
            ((_, alone),) = capture.activations([row], site="residual", layers=[read.layer])
            np.testing.assert_array_equal(found["h"][index, at], alone[0])


@pytest.mark.parametrize("method", ["mean", "lda"])
def test_router_changes_no_direction_and_no_row_runs_twice(method, tmp_path):
    packs, captures = [], []
    for router in (True, False):
        captures.append(FakeCapture())
        chosen = ExtractSettings(method=method, router=router, layers=(1, 2))
        packs.append(extract_fake(captures[-1], tmp_path / str(router), chosen))
    assert contents(packs[0]) == contents(packs[1])
    assert packs[0].router is not None
    assert packs[1].router is None
    with_router = Counter(row for row, *_ in captures[0].ran.elements())
    assert set(with_router.values()) == {1}
    suffixes = {row for row in with_router if (row.start, row.stop) == tail_of(row)}
    assert len(suffixes) == len({p.prompt for p in [*UNSAFE, *TWINS]})
    assert with_router.keys() - suffixes == {row for row, *_ in captures[1].ran}


@pytest.mark.parametrize(
    "data", [Data(UNSAFE[:4], GENERIC), Data(UNSAFE, GENERIC[:4])], ids=["unsafe", "safe"]
)
def test_too_few_prompts_for_a_router_is_logged(data, tmp_path, caplog):
    pack = extract(FakeCapture(), data, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    assert pack.router is None
    assert "no router is fitted: a router needs 5 prompts" in caplog.text


def test_benign_prompts_reach_only_the_router(tmp_path, caplog):
    benign = prompts("hello", "any", 6, listed="")
    data = [Data(UNSAFE, GENERIC), Data(UNSAFE, GENERIC, benign=benign)]
    packs = [
        extract(FakeCapture(), each, ExtractSettings(layers=(1, 2)), cache=tmp_path)
        for each in data
    ]
    assert contents(packs[0]) == contents(packs[1])
    assert packs[1].router.train_counts[0] > packs[0].router.train_counts[0]
    assert "for the router alone" not in caplog.text
    extract(FakeCapture(), data[1], ExtractSettings(layers=(1, 2), router=False), cache=tmp_path)
    assert "benign prompts are for the router alone" in caplog.text


def test_held_out_figures_equal_those_of_the_confusion_table(tmp_path):
    everyday = prompts("hello", "any", 30, listed="")
    data = Data(UNSAFE, GENERIC, everyday)
    pack = extract(FakeCapture(), data, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    found, table = pack.provenance["router"], pack.router.confusion
    assert (found["caught"]["k"], found["caught"]["n"]) == (table[1:, 1:].sum(), table[1:].sum())
    assert found["category"]["k"] == np.trace(table[1:, 1:])
    assert found["everyday"]["k"] + found["safe"]["k"] == table[0, 1:].sum()
    assert found["everyday"]["n"] + found["safe"]["n"] == table[0].sum()
    assert found["everyday"]["n"] > found["safe"]["n"] > 0


@pytest.mark.parametrize(
    ("unsafe", "everyday", "warnings"),
    [
        (20, 100, []),
        (19, 100, ["fewer than 20 prompts in 'hate' (19)"]),
        (20, 99, ["only 99 everyday prompts"]),
        (20, 0, ["no everyday prompts"]),
    ],
)
def test_few_prompts_are_warned_of(unsafe, everyday, warnings, tmp_path, caplog):
    data = Data(prompts("harm", "hate", unsafe), GENERIC, prompts("hello", "any", everyday))
    extract(FakeCapture(), data, ExtractSettings(layers=(1,)), cache=tmp_path)
    assert len(caplog.records) == len(warnings)
    assert all(words in caplog.text for words in warnings)


def test_router_of_very_many_prompts_uses_a_sample(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prompts_module, "MAX_PROMPTS", 25)
    pack = extract(FakeCapture(), GENERIC_DATA, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    assert "the router is fitted to 25 of 27 prompts" in caplog.text
    assert pack.router.train_counts.sum() <= 25
