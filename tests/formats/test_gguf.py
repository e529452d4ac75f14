"""The files pysteer writes, read by two others: gguf's own reader and llama.cpp's parser."""

import ctypes
import json
import os
import re
import stat
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pysteer import BaseModel, FormatError, SteeringError, SteeringPack, SteeringVector
from pysteer.pack.router import CLASSIFIERS, GATES, POOLINGS, Gate, Read, Router

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
names = words.filter(lambda name: name.strip() and name.isprintable())


@st.composite
def steering_vectors(draw, width=None, first_layer=1, site="residual"):
    width = width or draw(st.integers(1, 70))
    layers = draw(st.sets(st.integers(first_layer, 200), min_size=1, max_size=4))
    row = hnp.arrays(np.float32, width, elements=finite)
    return SteeringVector({layer: draw(row) for layer in layers}, site=site)


exact = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    words | st.integers() | st.booleans() | exact | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
sites = st.sampled_from(["residual", "attention", "mlp"])


@st.composite
def routers(draw, categories, width):
    k = len(categories)
    count = st.integers(0, 2**53)

    def floats(*shape, elements=finite, dtype=np.float32):
        # Not hypothesis' arrays: with several of them in one example its data runs out.
        seed = draw(st.integers(0, 2**32 - 1))
        values = np.random.default_rng(seed).normal(size=shape).astype(dtype)
        values.flat[0] = draw(elements)
        return values

    def gate():
        rates = st.lists(st.floats(0, 1), min_size=k, max_size=k)
        return Gate(
            floats(k, elements=exact, dtype=np.float64),
            draw(st.lists(st.booleans(), min_size=k, max_size=k)),
            *(draw(rates) for _ in range(3)),
        )

    places = st.builds(Read, st.integers(0, 200), st.sampled_from(POOLINGS))
    reads = draw(st.lists(places, min_size=1, max_size=3, unique=True))
    classifier = draw(st.sampled_from(CLASSIFIERS))
    kinds = sorted(draw(st.sets(st.sampled_from(GATES))) | {classifier})
    width *= len(reads)
    arrays = {
        "margin": lambda: {
            "margin_weight": floats(k + 1, width),
            "margin_bias": floats(k + 1),
            "allowances": np.abs(floats(k)),
        },
        "multinomial": lambda: {"weight": floats(k + 1, width), "bias": floats(k + 1)},
        "probe": lambda: {"probe_weight": floats(k, width), "probe_bias": floats(k)},
        "centroid": lambda: {"centroids": floats(k + 1, width)},
        "cast": lambda: {"conditions": floats(k, width, elements=st.floats(0.5, 2**100, width=32))},
    }
    return Router(
        site=draw(sites),
        reads=reads,
        categories=categories,
        gates={kind: gate() for kind in kinds},
        confusion=np.eye(k + 1, dtype=np.int64) + draw(st.integers(0, 2**52)),
        threshold_rule=draw(st.sampled_from(["youden", "fpr=0.01", "fpr=1e-05"])),
        train_counts=draw(st.lists(count, min_size=k + 1, max_size=k + 1)),
        **{name: values for kind in kinds for name, values in arrays[kind]().items()},
    )


@st.composite
def packs(draw):
    width = draw(st.integers(1, 40))
    categories = {
        name: draw(steering_vectors(width=width, first_layer=0, site=draw(sites)))
        for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))
    }
    model = BaseModel(draw(words), draw(words), 201, width, draw(st.integers(1, 10**6)))
    norm = st.floats(0, 2.0**100, width=32)
    known = draw(st.lists(st.sampled_from(list(categories)), unique=True))
    return SteeringPack(
        categories,
        base_model=draw(st.none() | st.just(model)),
        residual_norm=draw(st.dictionaries(st.integers(0, 200), norm, max_size=3)),
        provenance=draw(st.dictionaries(words, json_values, max_size=3)),
        router=draw(routers(known, width)) if known else None,
    )


# ---- llama.cpp's parser, and its rules for control vectors -----------------------------------


class InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def ggml_library():
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(p for p in folder.iterdir() if "ggml-base" in p.name)))
    pointer, size, index = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    signatures = {
        "gguf_init_from_file": (pointer, [ctypes.c_char_p, InitParams]),
        "gguf_free": (None, [pointer]),
        "gguf_get_version": (ctypes.c_uint32, [pointer]),
        "gguf_find_key": (index, [pointer, ctypes.c_char_p]),
        "gguf_get_val_str": (ctypes.c_char_p, [pointer, index]),
        "gguf_get_kv_type": (ctypes.c_int, [pointer, index]),
        "gguf_get_n_tensors": (index, [pointer]),
        "gguf_get_tensor_name": (ctypes.c_char_p, [pointer, index]),
        "gguf_get_tensor_type": (ctypes.c_int, [pointer, index]),
        "gguf_get_tensor_ne": (ctypes.POINTER(ctypes.c_int64), [pointer, index]),
        "gguf_get_tensor_offset": (size, [pointer, index]),
        "gguf_get_data_offset": (size, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


GGML = ggml_library()


def llama_cpp_control_vector(path):
    """Read a file by the rules of llama.cpp's `--control-vector`; ValueError if it refuses."""
    context = GGML.gguf_init_from_file(os.fsencode(path), InitParams(True, None))
    if not context:
        raise ValueError("not a GGUF file")
    try:
        directions = {}
        for i in range(GGML.gguf_get_n_tensors(context)):
            name = GGML.gguf_get_tensor_name(context, i).decode()
            match = re.fullmatch(r"direction\.(\d+)", name)
            if not match or int(match[1]) == 0:
                raise ValueError(f"name {name}")
            if GGML.gguf_get_tensor_type(context, i) != GGMLQuantizationType.F32:
                raise ValueError("type")
            sizes = GGML.gguf_get_tensor_ne(context, i)[:4]
            if sizes[1:] != [1, 1, 1]:
                raise ValueError("dimensions")
            if directions and len(next(iter(directions.values()))) != sizes[0]:
                raise ValueError("widths")
            start = GGML.gguf_get_data_offset(context) + GGML.gguf_get_tensor_offset(context, i)
            values = np.fromfile(path, "<f4", sizes[0], offset=start)
            if len(values) != sizes[0]:
                raise ValueError("truncated")
            directions[int(match[1])] = values
        return directions
    finally:
        GGML.gguf_free(context)


def llama_cpp_string(path, key):
    """A string in the metadata, as llama.cpp's parser reads it; None if it is not there."""
    context = GGML.gguf_init_from_file(os.fsencode(path), InitParams(True, None))
    assert context
    try:
        index = GGML.gguf_find_key(context, key.encode())
        if index < 0:
            return None
        assert GGML.gguf_get_kv_type(context, index) == GGUFValueType.STRING
        return GGML.gguf_get_val_str(context, index).decode()
    finally:
        GGML.gguf_free(context)


def same_values(found, expected):
    return found.keys() == expected.keys() and all(
        found[key].tobytes() == np.asarray(expected[key]).tobytes() for key in expected
    )


# ---- control vectors -------------------------------------------------------------------------


@relaxed
@given(vector=steering_vectors())
def test_llama_cpp_and_gguf_read_the_saved_vector(vector, tmp_path):
    path = tmp_path / "v.gguf"
    vector.save(path, model_hint="llama")
    expected = dict(vector.items())
    assert same_values(llama_cpp_control_vector(path), expected)

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert same_values(
        {int(name.removeprefix("direction.")): t.data for name, t in tensors.items()}, expected
    )
    assert {t.tensor_type for t in tensors.values()} == {GGMLQuantizationType.F32}
    assert reader.get_field("controlvector.layer_count").contents() == len(vector.layers)
    assert reader.get_field("GGUF.version").contents() == 3


@relaxed
@given(vector=steering_vectors())
def test_vector_round_trips_through_a_file(vector, tmp_path):
    path = tmp_path / "v.gguf"
    vector.save(path)
    assert SteeringVector.load(path) == vector
    assert SteeringVector.load(str(path)).digest == vector.digest
    assert dict(SteeringPack.load(path).categories) == {"v": vector}


@pytest.mark.parametrize("hint", ["llama", "qwen2", "é" * 40])
def test_vector_file_has_the_metadata_of_llama_cpp(hint, tmp_path):
    path = tmp_path / "v.gguf"
    SteeringVector({1: [1.0]}).save(path, model_hint=hint)
    assert llama_cpp_string(path, "general.architecture") == "controlvector"
    assert llama_cpp_string(path, "controlvector.model_hint") == hint


@pytest.mark.parametrize(
    "vector",
    [
        SteeringVector({0: [1.0], 1: [1.0]}),
        SteeringVector({0: [1.0]}),
        SteeringVector({2: [1.0]}, site="attention"),
    ],
    ids=["layers 0 and 1", "layer 0", "attention"],
)
def test_vector_that_a_control_vector_cannot_express_raises(vector, tmp_path):
    path = tmp_path / "v.gguf"
    with pytest.raises(SteeringError):
        vector.save(path)
    assert not list(tmp_path.iterdir())
    SteeringPack({"a": SteeringVector({0: [1.0]}, site="attention")}).save(path)  # a pack can


def write_foreign(path, tensors, *, architecture="controlvector", strings=()):
    """A control vector as other tools write it."""
    writer = GGUFWriter(path, architecture)
    for key, value in strings:
        writer.add_string(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_vector_of_another_tool_is_read(tmp_path):
    rows = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    path = write_foreign(
        tmp_path / "other.gguf",
        {"direction.12": rows[0], "direction.2": rows[1], "direction.1": rows[2]},
        strings=[("controlvector.model_hint", "mistral"), ("some.other", "key")],
    )
    expected = {12: rows[0], 2: rows[1], 1: rows[2]}
    assert same_values(dict(SteeringVector.load(path).items()), expected)
    assert same_values(llama_cpp_control_vector(path), expected)
    assert SteeringVector.load(path).site == "residual"


ROW = np.ones(4, np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"direction.0": ROW},
        {"direction.1": ROW.astype(np.float64)},
        {"direction.1": ROW.astype(np.float16)},
        {"direction.1": ROW.reshape(2, 2)},
        {"direction.1": ROW, "direction.2": ROW[:3]},
        {"direction.1": ROW, "bias": ROW},
        {"category.0.direction.1": ROW},
    ],
    ids=["layer 0", "F64", "F16", "two dimensions", "widths", "a stray tensor", "a pack's name"],
)
def test_pysteer_and_llama_cpp_refuse_the_same_files(tensors, tmp_path):
    path = write_foreign(tmp_path / "v.gguf", tensors)
    with pytest.raises(ValueError, match=r"name|type|dimensions|widths"):
        llama_cpp_control_vector(path)
    with pytest.raises(FormatError, match=re.escape(str(path))):
        SteeringVector.load(path)


# ---- packs -----------------------------------------------------------------------------------


@relaxed
@given(pack=packs())
def test_pack_round_trips_through_a_file(pack, tmp_path):
    path = tmp_path / "p.gguf"
    pack.save(path)
    again = SteeringPack.load(path)
    assert again == pack
    assert list(again.categories) == list(pack.categories)
    assert {n: v.site for n, v in again.categories.items()} == {
        n: v.site for n, v in pack.categories.items()
    }
    assert again.base_model == pack.base_model
    assert again.router == pack.router


@relaxed
@given(pack=packs())
def test_gguf_reads_the_saved_pack_and_llama_cpp_refuses_it(pack, tmp_path):
    path = tmp_path / "p.gguf"
    pack.save(path)
    with pytest.raises(ValueError, match=r"name category"):
        llama_cpp_control_vector(path)
    assert llama_cpp_string(path, "general.architecture") == "pysteer"
    with pytest.raises(FormatError, match="this is a pack"):
        SteeringVector.load(path)

    reader = GGUFReader(path)

    def content(key):
        field = reader.get_field(f"pysteer.{key}")
        return None if field is None else field.contents()

    assert content("format_version") == 1
    assert content("categories") == list(pack.categories)
    assert content("sites") == [vector.site for vector in pack.categories.values()]
    assert json.loads(content("provenance")) == dict(pack.provenance)
    if pack.base_model is None:
        assert content("base_model.n_embd") is None
    else:
        for name, value in vars(pack.base_model).items():
            assert content(f"base_model.{name}") == value
    if pack.residual_norm:
        layers, norms = content("residual_norm.layers"), content("residual_norm.values")
        assert dict(zip(layers, norms, strict=True)) == dict(pack.residual_norm)
    expected = {
        f"category.{i}.direction.{layer}": row
        for i, vector in enumerate(pack.categories.values())
        for layer, row in vector.items()
    }
    router = pack.router
    if router is None:
        assert not [key for key in reader.fields if "router" in key]
    else:
        tensors = {
            "margin": {"margin.weight": "margin_weight", "margin.bias": "margin_bias"}
            | {"allowances": "allowances"},
            "multinomial": {"weight": "weight", "bias": "bias"},
            "probe": {"probe.weight": "probe_weight", "probe.bias": "probe_bias"},
            "centroid": {"centroids": "centroids"},
            "cast": {"conditions": "conditions"},
        }
        for kind in router.gates:
            for name, attribute in tensors[kind].items():
                expected[f"router.{name}"] = getattr(router, attribute)
        assert content("router.site") == router.site
        assert content("router.layers") == [read.layer for read in router.reads]
        assert content("router.poolings") == [read.pooling for read in router.reads]
        assert reader.fields["pysteer.router.layers"].types[-1] == GGUFValueType.UINT32
        assert content("router.categories") == list(router.categories)
        tables = json.loads(content("router.tables"))
        assert tables["confusion"] == router.confusion.tolist()
        assert tables["threshold_rule"] == router.threshold_rule
        assert tables["train_counts"] == router.train_counts.tolist()
        assert set(tables["gates"]) == set(router.gates)
        for kind in router.gates:
            assert tables["gates"][kind] == {
                name: values.tolist() for name, values in vars(router.gates[kind]).items()
            }
    assert same_values({tensor.name: tensor.data for tensor in reader.tensors}, expected)
    for tensor in reader.tensors:
        assert tensor.data.shape == np.shape(expected[tensor.name])


VECTOR = SteeringVector({1: [1.0, 2.0]})


def a_model(**changes):
    sizes = {"architecture": "llama", "name": "Tiny", "n_layer": 4, "n_embd": 2, "n_vocab": 320}
    return BaseModel(**{**sizes, **changes})


def save_and_load(build, path):
    pack = build()
    pack.save(path)
    assert SteeringPack.load(path) == pack


def test_base_model_without_a_name_round_trips(tmp_path):
    save_and_load(
        lambda: SteeringPack({"a": VECTOR}, base_model=a_model(name="")), tmp_path / "p.gguf"
    )


def test_residual_norms_keep_float64_precision(tmp_path):
    save_and_load(
        lambda: SteeringPack({"a": VECTOR}, residual_norm={1: 1.1, 2: 1e39}), tmp_path / "p.gguf"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"provenance": {"layers": [1, 2]}},
        {"provenance": {"x": None}},
        {"provenance": {"x": {"y": {"z": [[{}], []]}}}},
        {"provenance": {"x": {"y": float("nan")}}},
        pytest.param({"provenance": {"x": [10**5000]}}, id="5000 digits"),
        {"provenance": {"x": np.float32(1)}},
        {"provenance": {"x": np.float64(1)}},
        {"provenance": {"x": float("nan")}},
        {"provenance": {1: "x"}},
        {"provenance": {"x": "\ud800"}},
        {"residual_norm": {-1: 1.0}},
        {"residual_norm": {2**31: 1.0}},
        {"base_model": {"n_vocab": 0}},
        {"base_model": {"n_vocab": -1}},
        {"base_model": {"n_vocab": 2**32}},
        {"base_model": {"architecture": "\ud800"}},
        {"categories": {"\ud800": VECTOR}},
    ],
    ids=str,
)
def test_saved_pack_is_loadable_or_save_raises(changes, tmp_path):
    path = tmp_path / "p.gguf"
    arguments = {"categories": {"a": VECTOR}, **changes}
    try:
        if "base_model" in changes:
            arguments["base_model"] = a_model(**changes["base_model"])
        save_and_load(lambda: SteeringPack(**arguments), path)
    except FormatError:
        pytest.fail("it was saved, and cannot be loaded")
    except SteeringError:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hint", ["", " ", None, 7])
def test_model_hint_without_text_raises(hint, tmp_path):
    with pytest.raises(SteeringError, match=r"model_hint.*such as 'llama'"):
        VECTOR.save(tmp_path / "v.gguf", model_hint=hint)
    assert not list(tmp_path.iterdir())


def test_model_hint_left_out_is_written_as_unknown(tmp_path):
    """repeng reads no file without a hint."""
    VECTOR.save(tmp_path / "v.gguf")
    assert llama_cpp_string(tmp_path / "v.gguf", "controlvector.model_hint") == "unknown"


def test_model_hint_that_is_not_unicode_raises(tmp_path):
    with pytest.raises(SteeringError):
        VECTOR.save(tmp_path / "v.gguf", model_hint="\ud800")


# ---- replacing a file ------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
@pytest.mark.parametrize(
    "step", ["write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"]
)
@pytest.mark.parametrize("older", [None, b"older"])
def test_failed_save_leaves_the_folder_unchanged(older, step, error, tmp_path, monkeypatch):
    path = tmp_path / "v.gguf"
    if older is not None:
        path.write_bytes(older)
    real = getattr(GGUFWriter, step)

    def fail(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise error

    monkeypatch.setattr(GGUFWriter, step, fail)
    expected = SteeringError if isinstance(error, OSError) else Interrupted
    with pytest.raises(expected) as caught:
        VECTOR.save(path, overwrite=True)
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert "No space left" in str(caught.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == (
        [] if older is None else [("v.gguf", older)]
    )


def test_full_disk_leaves_the_older_file_whole(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "v.gguf"
    VECTOR.save(path)
    large = SteeringVector({1: np.ones(100_000, np.float32)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SteeringError, match=re.escape(str(path))):
            large.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]
    assert SteeringVector.load(path) == VECTOR
    large.save(path)
    assert SteeringVector.load(path) == large


def test_save_replaces_the_file_not_its_content(tmp_path):
    path, open_elsewhere = tmp_path / "v.gguf", tmp_path / "link.gguf"
    VECTOR.save(path)
    os.link(path, open_elsewhere)
    (2 * VECTOR).save(path)
    assert SteeringVector.load(open_elsewhere) == VECTOR
    assert SteeringVector.load(path) == 2 * VECTOR


@pytest.mark.parametrize("where", ["missing/v.gguf", ".", "a file/v.gguf"])
def test_invalid_target_raises_with_its_name(where, tmp_path):
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(SteeringError, match="cannot write"):
        VECTOR.save(tmp_path / where)
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


def test_target_that_is_a_folder_raises(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SteeringError, match=re.escape(str(tmp_path / "folder"))):
        VECTOR.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_saved_file_has_the_permissions_of_a_new_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        VECTOR.save(tmp_path / "v.gguf")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "v.gguf").stat().st_mode) == 0o666 & ~umask
