"""The learning curve of a router, on prompts whose words tell the subcategory alone."""

import json

import pytest
from router_curve import SPLITS, main
from typer import BadParameter

from pysteer.prompts import Prompt, write_prompts


@pytest.fixture
def files(tmp_path):
    """Prompt files: each subcategory has its own word, and categories have no common word."""
    unsafe = [
        Prompt(f"harm {category}{kind} {i}", category, subcategory=f"{category}{kind}")
        for category in ("hate", "malware")
        for kind in "abcd"
        for i in range(5)
    ]
    benign = [Prompt(f"please and thank you {i}") for i in range(20)]
    paths = tmp_path / "unsafe.jsonl", tmp_path / "benign.jsonl"
    for prompts, path in zip((unsafe, benign), paths, strict=True):
        write_prompts(prompts, path)
    return paths


def test_router_curve_of_words_tells_only_seen_subcategories(files, tiny_llama, capsys):
    main(*files, tiny_llama, seeds=2, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    seen, unseen = ([row for row in rows if row["subcategories"] == name] for name in SPLITS)
    assert [row["prompts"] for row in seen] == [5, 8, 12, 16]  # of 20, four are in the test
    assert [row["prompts"] for row in unseen] == [5, 8, 11, 15]  # of 20, five are in the test
    assert seen[-1]["words"]["mean"] == 1
    assert unseen[-1]["words"]["mean"] < 0.8
    for row in rows:
        spread = row["router"]
        assert 0 <= spread["least"] <= spread["mean"] <= spread["largest"] <= 1


def test_router_curve_of_too_few_prompts_raises(files, tiny_llama, tmp_path):
    few = tmp_path / "few.jsonl"
    write_prompts([Prompt(f"harm {i}", "hate") for i in range(4)], few)
    with pytest.raises(BadParameter, match="too few"):
        main(few, files[1], tiny_llama, seeds=1)
