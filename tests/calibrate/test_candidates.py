"""Candidate vectors against `extract`."""

import numpy as np
import pytest
from prompting import prompts

from pysteer.calibrate.candidates import Trial, find_candidates
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import PromptSet
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.settings import ExtractSettings
from pysteer.progress import SILENT

UNSAFE = [*prompts("harm", "hate", 6), *prompts("harm", "malware", 5)]
BENIGN = prompts("please", "", 6)


@pytest.fixture(scope="module")
def capture(tiny_llama):
    return LlamaCapture(tiny_llama, n_ctx=256, n_threads=1)


@pytest.fixture(scope="module")
def found(capture, tmp_path_factory):
    settings = CalibrateSettings(methods=("mean", "contrast"), layers=(1, 2, 3))
    return find_candidates(
        capture,
        PromptSet(UNSAFE, [], BENIGN),
        [],
        settings,
        cache=tmp_path_factory.mktemp("cache"),
        progress=SILENT,
    )


def test_candidates_are_each_layer_and_all_layers_of_each_method(found):
    sets = ("2", "1", "3", "1+2+3")  # the middle layer first
    ways = ("mean of all", "mean", "contrast of all", "contrast")  # the mean over categories first
    names = [f"{way} at {one}" for way in ways for one in sets]
    assert list(found.vectors) == names
    assert found.starts == [Trial(name, 1.0, "prompt") for name in names]
    for vectors in found.vectors.values():
        assert set(vectors) == {"hate", "malware"}


def test_first_scope_is_tried_first_where_prompt_scope_is_not_allowed(capture, tmp_path):
    settings = CalibrateSettings(methods=("mean",), layers=(1,), scopes=("response", "all"))
    part = PromptSet(UNSAFE, [], BENIGN)
    found = find_candidates(capture, part, [], settings, cache=tmp_path, progress=SILENT)
    assert found.starts == [
        Trial(f"{way} at 1", 1.0, "response") for way in ("mean of all", "mean")
    ]


@pytest.mark.parametrize("layers", [(2,), (1, 2, 3)])
def test_shared_candidate_is_mean_over_categories_at_their_length(found, layers):
    name = "+".join(map(str, layers))
    own = list(found.vectors[f"mean at {name}"].values())
    shared = found.vectors[f"mean of all at {name}"]
    assert shared["hate"] == shared["malware"] != own[0]
    for layer in layers:
        rows = [vector.direction(layer) for vector in own]
        direction = shared["hate"].direction(layer)
        np.testing.assert_allclose(np.linalg.norm(direction), np.linalg.norm(rows[0]), rtol=1e-5)
        total = rows[0] + rows[1]
        np.testing.assert_allclose(
            direction / np.linalg.norm(direction), total / np.linalg.norm(total), atol=1e-6
        )


def test_candidate_at_all_layers_equals_extraction(found, capture, tmp_path):
    settings = ExtractSettings(method="mean", layers=(1, 2, 3), router=False, held_out=0.0)
    pack = extract(capture, Data(UNSAFE, BENIGN), settings, cache=tmp_path)
    assert dict(found.vectors["mean at 1+2+3"]) == dict(pack.categories)
    assert found.residual_norm == pack.residual_norm


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_candidate_at_one_layer_equals_extraction_at_layer(found, capture, tmp_path, layer):
    settings = ExtractSettings(method="mean", layers=(layer,), router=False, held_out=0.0)
    pack = extract(capture, Data(UNSAFE, BENIGN), settings, cache=tmp_path)
    for name, vector in pack.categories.items():
        alone = found.vectors[f"mean at {layer}"][name]
        assert alone.layers == (layer,)
        np.testing.assert_allclose(alone.direction(layer), vector.direction(layer), rtol=1e-5)


def test_candidate_pack_holds_every_vector_under_distinct_name(found):
    from pysteer import SteeringPack

    pack = found.pack(SteeringPack(found.vectors["mean at 1"]))
    assert len(pack.categories) == 2 * 16
    for name in found.vectors:
        for category in ("hate", "malware"):
            assert pack[found.category_of(name, category)] == found.vectors[name][category]


@pytest.mark.torch
@pytest.mark.parametrize("steps", [0, 3])
def test_learned_candidates_use_lowest_layer_and_benign_prompts(steps, tiny_llama, tmp_path):
    """The twins, with the words of the unsafe prompts, stay out."""
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    capture = TorchCapture(TorchModel(str(tiny_llama)))
    settings = CalibrateSettings(methods=("learned",), layers=(1, 2), category_steps=steps)
    part = PromptSet(UNSAFE, prompts("calm", "hate", 6), BENIGN)
    found = find_candidates(capture, part, [], settings, cache=tmp_path, progress=SILENT)
    assert found.starts == [Trial("learned at 1", 1.0, "all")]
    options = {"category_steps": steps}
    alone = ExtractSettings(
        method="learned", options=options, layers=(1,), router=False, held_out=0.0
    )
    pack = extract(capture, Data(UNSAFE, BENIGN), alone, cache=tmp_path / "another")
    vectors = found.vectors["learned at 1"]
    assert dict(vectors) == dict(pack.categories)
    assert steps or vectors["hate"] == vectors["malware"]
