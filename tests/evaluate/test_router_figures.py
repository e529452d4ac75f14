"""Confusion and F1, counted by hand."""

import pytest

from pysteer.evaluate.router_figures import RoutedPrompt, router_figures

ROUTED = [
    RoutedPrompt("a", ["a"], {}),
    RoutedPrompt("a", ["a"], {}),
    RoutedPrompt("a", ["b"], {}),
    RoutedPrompt("a", [], {}),
    RoutedPrompt("b", ["b"], {}),
    RoutedPrompt("b", ["a", "b"], {"a": 0.9, "b": 0.8}),  # b is further past its threshold
    RoutedPrompt("other", ["a"], {}),
    RoutedPrompt("other", [], {}),
    RoutedPrompt("benign", [], {}),
    RoutedPrompt("benign", [], {}),
    RoutedPrompt("benign", ["b"], {}),
]


def test_router_figures_equal_hand_count():
    found = router_figures(ROUTED, ["a", "b"], {"a": 0.8, "b": 0.5})
    assert found.rows == ["a", "b", "other", "benign"]
    assert found.columns == ["a", "b", "nothing"]
    assert found.confusion == [[2, 1, 1], [0, 2, 0], [1, 0, 1], [0, 1, 2]]
    # Without "other", about which no decision of the router is right or wrong:
    # a: precision 2/2, recall 2/4; b: 2/4 and 2/2; benign: 2/3 and 2/3.
    f1 = {"a": 2 * 0.5 / 1.5, "b": 2 * 0.5 / 1.5, "benign": 2 / 3}
    assert found.f1 == pytest.approx(f1)
    assert found.macro_f1 == pytest.approx(sum(f1.values()) / 3)
    assert (found.false_positives.k, found.false_positives.n) == (1, 3)
    assert found.false_positives_of == {"a": 0, "b": 1}
    assert {name: (one.k, one.n) for name, one in found.caught.items()} == {
        "a": (3, 4),
        "b": (2, 2),
        "other": (1, 2),
    }


def test_category_furthest_past_its_threshold_counts_as_found():
    one = [RoutedPrompt("b", ["a", "b"], {"a": 0.9, "b": 0.8})]
    assert router_figures(one, ["a", "b"], {"a": 0.5, "b": 0.7}).confusion == [[1, 0, 0]]
    assert router_figures(one, ["a", "b"], {"a": 0.85, "b": 0.7}).confusion == [[0, 1, 0]]


def test_router_figures_without_benign_prompts_have_no_benign_class():
    found = router_figures(ROUTED[:6], ["a", "b"], {"a": 0.8, "b": 0.5})
    assert found.rows == ["a", "b"]
    assert set(found.f1) == {"a", "b"}
    assert found.false_positives.n == 0


def test_router_figures_of_unknown_categories_have_no_f1():
    found = router_figures(ROUTED[6:8], ["a"], {})
    assert found.macro_f1 is None
    assert found.confusion == [[1, 1]]
