"""The router of a few prompts, at everyday prompts that it has not seen, by the real gate."""

from contextlib import closing
from pathlib import Path

import pytest

from pysteer import SteeredLlama, shipped
from pysteer.extract import Data, ExtractSettings, LlamaCapture, extract
from pysteer.prompts import Prompt, grouped, load_prompts

HELD_OUT = Path(__file__).parents[2] / "tools" / "default_pack" / "everyday.jsonl"
THINGS = [
    "rain",
    "snow",
    "a fox",
    "an owl",
    "the sea",
    "bread",
    "tea",
    "spring",
    "a clock",
    "the moon",
]
SAFE = [
    Prompt(f"Write a {kind} about {thing}.")
    for thing in THINGS
    for kind in ("poem", "song", "story")
]


def opened(pack, model, prompts, *, enough):
    """Return the number of prompts that open the gate, counted up to `enough`."""
    with closing(SteeredLlama(model, pack=pack, n_ctx=512, verbose=False)) as llm:
        count = 0
        for prompt in prompts:
            llm.create_chat_completion(
                [{"role": "user", "content": prompt.prompt}], steering="auto", max_tokens=1
            )
            count += bool(llm.last_steering.fired)
            if count == enough:
                break
    return count


@pytest.fixture(scope="module")
def fitted(default_model, tmp_path_factory):
    """A function from everyday prompts to a pack learned from 30 unsafe and 30 safe prompts."""
    categories = list(grouped(shipped.demo_prompts()[0]).values())[:3]
    unsafe = [prompt for prompts in categories for prompt in prompts[:10]]
    cache = tmp_path_factory.mktemp("cache")
    with closing(LlamaCapture(default_model, n_ctx=512)) as capture:

        def pack(benign):
            return extract(
                capture, Data(unsafe, SAFE, benign), ExtractSettings(layers=(12,)), cache=cache
            )

        yield pack


def test_everyday_prompts_keep_the_gate_closed_to_others(fitted, default_model, caplog):
    unseen = load_prompts(HELD_OUT)[::15]
    alone = fitted(())
    assert "no everyday prompts" in caplog.text
    assert "everyday" not in alone.provenance["router"]
    with_everyday = fitted(shipped.everyday_prompts())
    assert opened(alone, default_model, unseen, enough=6) == 6
    assert opened(with_everyday, default_model, unseen, enough=2) < 2
    figures = with_everyday.provenance["router"]
    assert figures["everyday"]["high"] < 0.25
    assert figures["caught"]["k"] >= 3


def test_everyday_prompts_are_of_many_kinds_and_in_no_other_data():
    everyday = [p.prompt for p in shipped.everyday_prompts()]
    assert 150 <= len(everyday) <= 300
    assert len(set(everyday)) == len(everyday)
    lengths = sorted(map(len, everyday))
    assert lengths[0] < 5
    assert lengths[-1] > 250
    known = {
        p.prompt
        for path in [
            *HELD_OUT.parent.glob("*.jsonl"),
            *Path(shipped.__file__).parent.glob("data/demo*"),
        ]
        for p in load_prompts(path)
    }
    assert not known & set(everyday)
