"""Files that are damaged, or made to do damage: each ends in one FormatError that names the file.

The files are put together here byte by byte, so that nothing of pysteer or gguf decides what a
file can be. Whatever loads all the same must be sound.
"""

import hashlib
import json
import os
import signal
import struct
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysteer import FormatError, SteeringPack, SteeringVector
from pysteer.formats.container import read_metadata
from pysteer.pack.router import Read

U8, I8, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = 0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12
EXTREMES = [0, 1, 3, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
LOADERS = [SteeringVector.load, SteeringPack.load]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class File:
    """A GGUF file in the making, which remembers where its integers are."""

    def __init__(self, version=3, order="<"):
        self.order = order
        self.version = version
        self.values = []
        self.tensors = []
        self.fields = {}

    def integer(self, label, size, number):
        self.fields[label] = (len(self.head), size)
        self.head += struct.pack(self.order + {4: "I", 8: "Q"}[size], number)

    def string(self, label, text):
        raw = text if isinstance(text, bytes) else text.encode()
        self.integer(f"length of {label}", 8, len(raw))
        self.head += raw

    def value(self, key, kind, payload):
        self.values.append((key, kind, payload))
        return self

    def text(self, key, text):
        return self.value(key, STRING, text)

    def tensor(self, name, values, *, shape=None, kind=0, offset=None):
        raw = values if isinstance(values, bytes) else np.asarray(values, "<f4").tobytes()
        if shape is None:
            shape = (len(raw) // 4,)
        self.tensors.append((name, raw, shape, kind, offset))
        return self

    def payload(self, label, kind, payload):
        if kind == STRING:
            self.string(label, payload)
        elif kind == ARRAY and not isinstance(payload, bytes):
            element, items = payload
            self.integer(f"element type of {label}", 4, element)
            self.integer(f"count of {label}", 8, len(items))
            for i, item in enumerate(items):
                self.payload(f"{label}[{i}]", element, item)
        else:
            layouts = {U8: "B", I8: "b", U32: "I", I32: "i", F32: "f", BOOL: "B"}
            layouts |= {U64: "Q", I64: "q", F64: "d"}
            self.head += (
                payload
                if isinstance(payload, bytes)
                else struct.pack(self.order + layouts[kind], payload)
            )

    def build(self):
        self.head = bytearray(b"GGUF")
        self.integer("version", 4, self.version)
        self.integer("number of tensors", 8, len(self.tensors))
        self.integer("number of values", 8, len(self.values))
        for key, kind, payload in self.values:
            self.string(f"key {key}", key)
            self.integer(f"type of {key}", 4, kind)
            self.payload(str(key), kind, payload)
        data = b""
        for name, raw, shape, kind, offset in self.tensors:
            self.string(f"name {name}", name)
            self.integer(f"dimensions of {name}", 4, len(shape))
            for i, size in enumerate(shape):
                self.integer(f"size {i} of {name}", 8, size)
            self.integer(f"tensor type of {name}", 4, kind)
            self.integer(f"offset of {name}", 8, len(data) if offset is None else offset)
            data += raw + bytes(-len(raw) % 32)
        return bytes(self.head) + bytes(-len(self.head) % 32) + data


ROWS = np.arange(1, 17, dtype=np.float32).reshape(2, 8)  # 32 bytes each: no padding anywhere


def vector_file(**options):
    return (
        File(**options)
        .text("general.architecture", "controlvector")
        .text("controlvector.model_hint", "llama")
        .value("controlvector.layer_count", U32, 2)
    )


def a_vector():
    return vector_file().tensor("direction.1", ROWS[0]).tensor("direction.3", ROWS[1])


PACK_VALUES = {
    "general.architecture": (STRING, "pysteer"),
    "pysteer.format_version": (U32, 1),
    "pysteer.categories": (ARRAY, (STRING, ["hate", "malware"])),
    "pysteer.sites": (ARRAY, (STRING, ["residual", "attention"])),
    "pysteer.base_model.architecture": (STRING, "llama"),
    "pysteer.base_model.name": (STRING, "Tiny"),
    "pysteer.base_model.n_layer": (U32, 4),
    "pysteer.base_model.n_embd": (U32, 8),
    "pysteer.base_model.n_vocab": (U32, 320),
    "pysteer.residual_norm.layers": (ARRAY, (I32, [1, 2])),
    "pysteer.residual_norm.values": (ARRAY, (F32, [1.5, 2.5])),
    "pysteer.provenance": (STRING, '{"method": "mean"}'),
}


def a_pack(tensors=True, **changes):
    """A pack; `changes` replace metadata by name, with `__` for dots, or drop it with None."""
    file = File()
    values = {**PACK_VALUES, **{key.replace("__", "."): value for key, value in changes.items()}}
    for key, value in values.items():
        if value is not None:
            file.value(key, *value)
    if tensors:
        file.tensor("category.0.direction.1", ROWS[0]).tensor("category.1.direction.3", ROWS[1])
    return file


ONE_GATE = {
    "thresholds": [0.5],
    "above": [True],
    "true_positive_rates": [1.0],
    "false_positive_rates": [0.0],
    "leak_rates": [0.25],
}
TABLES = {
    "gates": dict.fromkeys(("margin", "multinomial", "probe", "centroid", "cast"), ONE_GATE),
    "confusion": [[4, 1], [0, 3]],
    "train_counts": [20, 12],
    "threshold_rule": "youden",
}
ROUTER_VALUES = {
    "pysteer.router.site": (STRING, "residual"),
    "pysteer.router.layers": (ARRAY, (U32, [2, 0])),
    "pysteer.router.poolings": (ARRAY, (STRING, ["last", "user"])),
    "pysteer.router.categories": (ARRAY, (STRING, ["malware"])),
    "pysteer.router.tables": (STRING, json.dumps(TABLES, separators=(",", ":"))),
}
WIDE = np.concatenate([ROWS, ROWS[::-1]], axis=1)  # two reads
ROUTER_TENSORS = {
    "router.margin.weight": WIDE,
    "router.margin.bias": ROWS[0, :2],
    "router.allowances": np.abs(ROWS[0, :1]),
    "router.weight": WIDE,
    "router.bias": ROWS[0, :2],
    "router.probe.weight": WIDE[:1],
    "router.probe.bias": ROWS[0, :1],
    "router.centroids": WIDE,
    "router.conditions": WIDE[1:],  # last: 64 bytes, so that the file ends without padding
}


def a_routed_pack(values=None, tensors=None, **changes):
    """A pack with a router; `values` and `tensors` replace the router's, or drop them with None."""
    values = {**ROUTER_VALUES, **(values or {})}
    file = a_pack(**changes)
    for key, value in values.items():
        if value is not None:
            file.value(key, *value)
    for name, tensor in {**ROUTER_TENSORS, **(tensors or {})}.items():
        if tensor is not None:
            file.tensor(name, tensor, shape=tuple(reversed(np.shape(tensor))))
    return file


FILES = {"vector": a_vector, "pack": a_pack, "routed": a_routed_pack}


@contextmanager
def bounded(seconds=5, hangs=60):
    """The block must end after some time of its own, however busy the machine is.

    Where there are signals, a block that hangs is interrupted.
    """

    def stop(number, frame):
        raise TimeoutError

    start = time.thread_time()
    if hasattr(signal, "setitimer"):
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, hangs)
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert time.thread_time() - start < seconds


def load(loader, path):
    """The loaded object, or the FormatError; anything else, or a warning, gets out."""
    with warnings.catch_warnings(), bounded():
        warnings.simplefilter("error")
        try:
            return loader(path)
        except FormatError as error:
            message = str(error)
            assert message.startswith(f"{path}: ")
            assert len(message) < len(str(path)) + 2000
            return error


def check_refused(path, content=None):
    if content is not None:
        path.write_bytes(content)
    for loader in LOADERS:
        assert type(load(loader, path)) is FormatError


def check_refused_or_sound(path, content, second):
    path.write_bytes(content)
    assert isinstance(load(read_metadata, path), (dict, FormatError))
    for loader in LOADERS:
        found = load(loader, path)
        if isinstance(found, FormatError):
            continue
        vectors = found.categories.values() if isinstance(found, SteeringPack) else [found]
        assert len({vector.n_embd for vector in vectors}) == 1
        for vector in vectors:
            assert vector.matrix.dtype == np.float32
            assert np.isfinite(vector.matrix).all()
            assert vector.site in ("residual", "attention", "mlp")
        if isinstance(found, SteeringPack):
            check_sound_router(found)
            found.save(second)
            assert load(loader, second) == found


def check_sound_router(pack):
    router = pack.router
    if router is None:
        return
    k, n = len(router.categories), pack.n_embd * len(router.reads)
    assert router.n_embd == pack.n_embd
    assert set(router.categories) <= set(pack.categories)
    kinds = router.gates
    assert "margin" in kinds or "multinomial" in kinds
    shapes = {
        "margin_weight": ("margin", (k + 1, n)),
        "margin_bias": ("margin", (k + 1,)),
        "allowances": ("margin", (k,)),
        "weight": ("multinomial", (k + 1, n)),
        "bias": ("multinomial", (k + 1,)),
        "probe_weight": ("probe", (k, n)),
        "probe_bias": ("probe", (k,)),
        "centroids": ("centroid", (k + 1, n)),
        "conditions": ("cast", (k, n)),
    }
    for name, (kind, shape) in shapes.items():
        values = getattr(router, name)
        assert (values is None) if kind not in kinds else values.shape == shape
    assert router.confusion.shape == (k + 1, k + 1)
    for kind in kinds:
        with np.errstate(all="ignore"):  # flipped bits make numbers near the largest
            assert router.opens(kind, np.ones(n)).shape == (k,)
        for values in vars(router.gates[kind]).values():
            assert np.isfinite(values).all()


# ---- the files themselves --------------------------------------------------------------------


def test_base_files_of_these_tests_are_valid(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(a_vector().build())
    assert SteeringVector.load(path) == SteeringVector({1: ROWS[0], 3: ROWS[1]})
    path.write_bytes(a_pack().build())
    pack = SteeringPack.load(path)
    assert pack["hate"] == SteeringVector({1: ROWS[0]})
    assert pack["malware"] == SteeringVector({3: ROWS[1]}, site="attention")
    assert vars(pack.base_model) == {
        "architecture": "llama",
        "name": "Tiny",
        "n_layer": 4,
        "n_embd": 8,
        "n_vocab": 320,
    }
    assert dict(pack.residual_norm) == {1: 1.5, 2: 2.5}
    assert dict(pack.provenance) == {"method": "mean"}
    assert pack.router is None

    path.write_bytes(a_routed_pack().build())
    router = SteeringPack.load(path).router
    assert (router.site, router.reads) == ("residual", (Read(2, "last"), Read(0, "user")))
    assert router.categories == ("malware",)
    for name, values in ROUTER_TENSORS.items():
        attribute = name.removeprefix("router.").replace(".", "_")
        np.testing.assert_array_equal(getattr(router, attribute), values)
    assert router.confusion.tolist() == [[4, 1], [0, 3]]
    assert router.train_counts.tolist() == [20, 12]
    assert router.threshold_rule == "youden"
    for gate in router.gates.values():
        assert {name: values.tolist() for name, values in vars(gate).items()} == ONE_GATE


@pytest.mark.parametrize("version", [2, 3])
def test_both_gguf_versions_are_read(version, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(vector_file(version=version).tensor("direction.1", ROWS[0]).build())
    assert SteeringVector.load(path) == SteeringVector({1: ROWS[0]})


@pytest.mark.parametrize("alignment", [1, 8, 64, 256])
def test_other_alignments_are_read(alignment, tmp_path):
    file = vector_file().value("general.alignment", U32, alignment).tensor("direction.1", ROWS[0])
    file.build()
    head = bytes(file.head)
    path = tmp_path / "x.gguf"
    path.write_bytes(head + bytes(-len(head) % alignment) + ROWS[0].tobytes())
    assert SteeringVector.load(path) == SteeringVector({1: ROWS[0]})


# ---- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_file_cut_anywhere_raises(kind, tmp_path):
    content = FILES[kind]().build()
    for length in range(len(content)):
        check_refused(tmp_path / "x.gguf", content[:length])


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("kind", FILES)
def test_flipped_byte_raises_or_is_harmless(kind, flip, tmp_path):
    content = FILES[kind]().build()
    # The bytes before the router equal the pack without a router.
    for i in range(content.find(b"pysteer.router") if kind == "routed" else 0, len(content)):
        changed = bytearray(content)
        changed[i] ^= flip
        check_refused_or_sound(tmp_path / "x.gguf", changed, tmp_path / "y.gguf")


@relaxed
@given(
    kind=st.sampled_from(list(FILES)),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=9), st.integers(0, 9)), max_size=4
    ),
)
def test_edited_bytes_raise_or_are_harmless(kind, edits, tmp_path):
    content = bytearray(FILES[kind]().build())
    for where, new, removed in edits:
        at = int(where * len(content))
        content[at : at + removed] = new
    check_refused_or_sound(tmp_path / "x.gguf", content, tmp_path / "y.gguf")


@relaxed
@given(tail=st.binary(max_size=200), magic=st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0"]))
def test_noise_raises(tail, magic, tmp_path):
    check_refused(tmp_path / "x.gguf", magic + tail)


def fields_of(kind):
    file = FILES[kind]()
    file.build()
    return [pytest.param(kind, label, id=f"{kind}: {label}") for label in file.fields]


@pytest.mark.parametrize(("kind", "label"), [p for k in FILES for p in fields_of(k)])
def test_extreme_integer_in_any_field_raises(kind, label, tmp_path):
    file = FILES[kind]()
    content = file.build()
    at, size = file.fields[label]
    original = int.from_bytes(content[at : at + size], "little")
    for number in EXTREMES:
        harmless = (label, number) in [("version", 2), ("number of tensors", 1)]
        if number == original or harmless or number >= 2 ** (8 * size):
            continue
        changed = bytearray(content)
        changed[at : at + size] = number.to_bytes(size, "little")
        check_refused(tmp_path / "x.gguf", changed)


# ---- tensors ---------------------------------------------------------------------------------

F16_TYPE, Q4_0_TYPE, F64_TYPE, BF16_TYPE = 1, 2, 28, 30
REMOVED_TYPE, UNKNOWN_TYPE = 4, 9999


@pytest.mark.parametrize(
    "kind", [F16_TYPE, Q4_0_TYPE, F64_TYPE, BF16_TYPE, REMOVED_TYPE, UNKNOWN_TYPE]
)
@pytest.mark.parametrize("name", ["direction.1", "category.0.direction.1"])
def test_tensor_of_another_type_raises(name, kind, tmp_path):
    file = vector_file() if name == "direction.1" else a_pack(tensors=False)
    check_refused(tmp_path / "x.gguf", file.tensor(name, bytes(64), shape=(8,), kind=kind).build())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", FILES)
def test_direction_that_is_not_finite_raises(kind, value, tmp_path):
    content = FILES[kind]().build()
    check_refused(tmp_path / "x.gguf", content[:-4] + struct.pack("<f", value))
    signalling = content[:-4] + struct.pack("<I", 0x7F800001)
    check_refused(tmp_path / "x.gguf", signalling)


@pytest.mark.parametrize(
    "name",
    [
        "direction.0",
        "direction.01",
        "direction.1 ",
        "direction.+1",
        "direction.-1",
        "direction.1\n",
        "direction.\u0661",  # a digit to str.isdigit()
        "direction.1e1",
        "direction.",
        "direction",
        "Direction.1",
        "direction.1.weight",
        "direction.99999999999999999999",
        "category.0.direction.1",
        "",
        b"direction.\xff",
        "direction.1\0",
    ],
    ids=repr,
)
def test_unknown_tensor_in_a_control_vector_raises(name, tmp_path):
    check_refused(tmp_path / "x.gguf", vector_file().tensor(name, ROWS[0]).build())


@pytest.mark.parametrize(
    "name",
    [
        "direction.1",
        "category.2.direction.1",
        "category.-1.direction.1",
        "category.00.direction.1",
        "category.0.direction.01",
        "category.0.direction.4",  # the base model has 4 layers
        "category.0.direction.99999999999999999999",
        "category.99999999999999999999.direction.1",
        "category.0.direction.",
        "category..direction.1",
        b"category.0.direction.\xff",
    ],
    ids=repr,
)
def test_unknown_tensor_in_a_pack_raises(name, tmp_path):
    check_refused(tmp_path / "x.gguf", a_pack().tensor(name, ROWS[0]).build())


@pytest.mark.parametrize(
    "file",
    [
        a_vector().tensor("direction.1", ROWS[0]),
        a_pack().tensor("category.0.direction.1", ROWS[0]),
        a_vector().text("controlvector.model_hint", "llama"),
        a_pack().text("general.architecture", "pysteer"),
    ],
    ids=["direction", "direction of a pack", "key", "architecture"],
)
def test_duplicate_names_raise(file, tmp_path):
    check_refused(tmp_path / "x.gguf", file.build())


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((2, 4), ROWS[0]),
        ((8, 1), ROWS[0]),
        ((1, 1, 1, 8), ROWS[0]),
        ((), ROWS[0]),
        ((1,) * 5, ROWS[0]),
        ((0,), b""),
        ((8, 0), b""),
        ((2**32, 2**32), ROWS[0]),
        ((2**62, 4), ROWS[0]),
        ((2**63, 2), ROWS[0]),
        ((2**64 - 1,), ROWS[0]),
        ((2**61,), ROWS[0]),
        ((9,), ROWS[0]),
    ],
    ids=repr,
)
def test_tensor_of_another_shape_raises(shape, values, tmp_path):
    file = vector_file().tensor("direction.1", values, shape=shape)
    check_refused(tmp_path / "x.gguf", file.build())


def test_differing_widths_raise(tmp_path):
    file = a_vector().tensor("direction.4", ROWS[0][:7])
    check_refused(tmp_path / "x.gguf", file.build())
    file = a_pack().tensor("category.0.direction.2", np.ones(16))
    check_refused(tmp_path / "x.gguf", file.build())


@pytest.mark.parametrize("offset", [1, 4, 16, 33, 64, 2**31, 2**63, 2**64 - 32])
def test_data_outside_the_file_or_unaligned_raises(offset, tmp_path):
    file = vector_file().tensor("direction.1", ROWS, shape=(8,), offset=offset)
    check_refused(tmp_path / "x.gguf", file.build())


def test_many_tensors_over_the_same_data_raise(tmp_path):
    file = vector_file().tensor("direction.1", ROWS[0])
    for layer in range(2, 50):
        file.tensor(f"direction.{layer}", b"", shape=(8,), offset=0)
    check_refused(tmp_path / "x.gguf", file.build())


# ---- metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (U32, 0),
        (U32, 3),
        (U32, 33),
        (U64, 2**40),
        (U64, 2**63),
        (I32, -32),
        (I64, -(2**63)),
        (STRING, "32"),
        (F32, 32.0),
        (BOOL, 1),
        (ARRAY, (U32, [32])),
    ],
    ids=repr,
)
def test_invalid_alignment_raises(kind, value, tmp_path):
    file = vector_file().value("general.alignment", kind, value).tensor("direction.1", ROWS[0])
    check_refused(tmp_path / "x.gguf", file.build())


@pytest.mark.parametrize("file", [a_vector, a_pack])
@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 0)),
        (ARRAY, struct.pack("<IQ", ARRAY, 0)),
        (ARRAY, struct.pack("<IQ", U8, 2**63)),
        (ARRAY, struct.pack("<IQ", U64, 2**61)),
        (ARRAY, struct.pack("<IQ", STRING, 2**64 - 1)),
        (ARRAY, struct.pack("<IQ", 13, 1) + bytes(8)),
        (ARRAY, struct.pack("<IQ", BOOL, 1) + b"\2"),
        (ARRAY, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 1) + b"\xff"),
        (BOOL, b"\2"),
        (STRING, b"\xff"),
        (STRING, b"\xed\xa0\x80"),  # half of a surrogate pair
        (13, bytes(8)),
        (2**32 - 1, bytes(8)),
    ],
    ids=repr,
)
def test_invalid_metadata_values_raise(kind, payload, file, tmp_path):
    check_refused(tmp_path / "x.gguf", file().value("x", kind, payload).build())


@pytest.mark.parametrize("key", [b"\xff", b"\xed\xa0\x80"])
def test_key_that_is_not_utf8_raises(key, tmp_path):
    check_refused(tmp_path / "x.gguf", a_vector().value(key, U32, 1).build())


def test_array_of_millions_of_values_raises_at_once(tmp_path):
    count = 30_000_000
    payload = struct.pack("<IQ", U8, count) + bytes(count)
    start = time.thread_time()
    check_refused(tmp_path / "x.gguf", a_vector().value("x", ARRAY, payload).build())
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(
    "changes",
    [
        {"pysteer__format_version": None},
        {"pysteer__format_version": (U32, 0)},
        {"pysteer__format_version": (U32, 2)},
        {"pysteer__format_version": (STRING, "1")},
        {"pysteer__categories": None},
        {"pysteer__categories": (STRING, "hate")},
        {"pysteer__categories": (ARRAY, (STRING, []))},
        {"pysteer__categories": (ARRAY, (STRING, ["hate"]))},
        {"pysteer__categories": (ARRAY, (STRING, ["hate", "hate"]))},
        {"pysteer__categories": (ARRAY, (STRING, ["hate", ""]))},
        {"pysteer__categories": (ARRAY, (STRING, ["hate", "\t"]))},
        {"pysteer__categories": (ARRAY, (STRING, ["hate", "malware", "third"]))},
        {"pysteer__categories": (ARRAY, (U32, [1, 2]))},
        {"pysteer__sites": None},
        {"pysteer__sites": (ARRAY, (STRING, ["residual"]))},
        {"pysteer__sites": (ARRAY, (STRING, ["residual", "output"]))},
        {"pysteer__sites": (ARRAY, (STRING, ["residual", ""]))},
        {"pysteer__sites": (U32, 1)},
        {"pysteer__base_model__name": None},
        {"pysteer__base_model__n_layer": None},
        {"pysteer__base_model__n_layer": (U32, 0)},
        {"pysteer__base_model__n_layer": (U32, 3)},
        {"pysteer__base_model__n_layer": (I64, -1)},
        {"pysteer__base_model__n_layer": (F32, 4.0)},
        {"pysteer__base_model__n_layer": (STRING, "4")},
        {"pysteer__base_model__n_layer": (ARRAY, (U32, [4]))},
        {"pysteer__base_model__n_embd": (U32, 9)},
        {"pysteer__base_model__n_vocab": (BOOL, 1)},
        {"pysteer__base_model__architecture": (U32, 1)},
        {"pysteer__residual_norm__layers": None},
        {"pysteer__residual_norm__values": None},
        {"pysteer__residual_norm__values": (ARRAY, (F32, [1.0]))},
        {"pysteer__residual_norm__values": (ARRAY, (F32, [1.0, float("nan")]))},
        {"pysteer__residual_norm__values": (ARRAY, (F64, [1.0, float("inf")]))},
        {"pysteer__residual_norm__values": (ARRAY, (F32, [1.0, -1.0]))},
        {"pysteer__residual_norm__values": (ARRAY, (STRING, ["1", "2"]))},
        {"pysteer__residual_norm__values": (F32, 1.0)},
        {"pysteer__residual_norm__layers": (ARRAY, (I32, [1, -1]))},
        {"pysteer__residual_norm__layers": (ARRAY, (F32, [1.0, 2.0]))},
        {"pysteer__residual_norm__layers": (ARRAY, (BOOL, [0, 1]))},
        {"pysteer__residual_norm__layers": (ARRAY, (I32, [1, 1]))},
    ],
    ids=str,
)
def test_invalid_metadata_of_a_pack_raises(changes, tmp_path):
    check_refused(tmp_path / "x.gguf", a_pack(**changes).build())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        '{"a": [NaN]}',
        '{"a": {"b": [1e999]}}',
        '{"a": [{"\\ud800": 1}]}',
        pytest.param('{"a":' + "[" * 17 + "]" * 17 + "}", id="17 arrays deep"),
        pytest.param('{"a":' * 18 + "1" + "}" * 18, id="18 objects deep"),
        pytest.param("[" * 100_000, id="nested arrays"),
        pytest.param('{"a":' * 100_000, id="nested objects"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="nested and closed"),
        pytest.param(f'{{"a": {"9" * 5000}}}', id="a number of 5000 digits"),
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
    ],
)
def test_invalid_provenance_raises(text, tmp_path):
    check_refused(tmp_path / "x.gguf", a_pack(pysteer__provenance=(STRING, text)).build())


def changed_tables(**changes):
    tables = {key: value for key, value in {**TABLES, **changes}.items() if value is not None}
    return {"pysteer.router.tables": (STRING, json.dumps(tables))}


def a_changed_gate(**changes):
    gate = {key: value for key, value in {**ONE_GATE, **changes}.items() if value is not None}
    return changed_tables(gates={**TABLES["gates"], "cast": gate})


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values",
    [
        *({key: None} for key in ROUTER_VALUES),
        dict.fromkeys(ROUTER_VALUES),
        {"pysteer.router.site": (STRING, "output")},
        {"pysteer.router.site": (U32, 1)},
        {"pysteer.router.layers": (U32, 2)},
        {"pysteer.router.layers": (ARRAY, (U32, [4, 0]))},
        {"pysteer.router.layers": (ARRAY, (U32, [2]))},
        {"pysteer.router.layers": (ARRAY, (U32, [2, 1, 0]))},
        {"pysteer.router.layers": (ARRAY, (I64, [-1, 0]))},
        {"pysteer.router.layers": (ARRAY, (F32, [2.0, 0.0]))},
        {"pysteer.router.layers": (ARRAY, (BOOL, [1, 0]))},
        {"pysteer.router.layers": (ARRAY, (STRING, ["2", "0"]))},
        {"pysteer.router.poolings": (STRING, "last")},
        {"pysteer.router.poolings": (ARRAY, (STRING, ["last", "mean"]))},
        {"pysteer.router.poolings": (ARRAY, (STRING, ["last"]))},
        {"pysteer.router.poolings": (ARRAY, (U32, [0, 1]))},
        {
            "pysteer.router.layers": (ARRAY, (U32, [2, 2])),
            "pysteer.router.poolings": (ARRAY, (STRING, ["last", "last"])),
        },
        {
            "pysteer.router.layers": (ARRAY, (U32, [])),
            "pysteer.router.poolings": (ARRAY, (STRING, [])),
        },
        {  # three places do not share a width of 16
            "pysteer.router.layers": (ARRAY, (U32, [2, 1, 0])),
            "pysteer.router.poolings": (ARRAY, (STRING, ["last"] * 3)),
        },
        {  # one place of width 16, of directions of width 8
            "pysteer.router.layers": (ARRAY, (U32, [2])),
            "pysteer.router.poolings": (ARRAY, (STRING, ["last"])),
        },
        # Keys of an older format of routers.
        {
            "pysteer.router.layers": None,
            "pysteer.router.poolings": None,
            "pysteer.router.layer": (U32, 2),
            "pysteer.router.pooling": (STRING, "last"),
        },
        {"pysteer.router.categories": (STRING, "malware")},
        {"pysteer.router.categories": (ARRAY, (STRING, []))},
        {"pysteer.router.categories": (ARRAY, (STRING, ["fraud"]))},
        {"pysteer.router.categories": (ARRAY, (STRING, ["malware", "hate"]))},
        {"pysteer.router.categories": (ARRAY, (STRING, ["malware", "malware"]))},
        {"pysteer.router.tables": (STRING, "[]")},
        {"pysteer.router.tables": (STRING, "{}")},
        {"pysteer.router.tables": (STRING, "{")},
        {"pysteer.router.tables": (STRING, "[" * 100_000)},
        {"pysteer.router.tables": (U32, 1)},
        *(changed_tables(**{key: None}) for key in TABLES),
        changed_tables(extra=1),
        changed_tables(gates=[]),
        changed_tables(gates={}),
        changed_tables(gates={**TABLES["gates"], "svm": ONE_GATE}),
        changed_tables(gates={**TABLES["gates"], "cast": None}),
        changed_tables(gates={**TABLES["gates"], "cast": [1]}),
        *(a_changed_gate(**{key: None}) for key in ONE_GATE),
        *(a_changed_gate(**{key: [0.5, 0.5]}) for key in ONE_GATE),
        *(a_changed_gate(**{key: []}) for key in ONE_GATE),
        *(a_changed_gate(**{key: "1"}) for key in ONE_GATE),
        *(a_changed_gate(**{key: {"0": 1}}) for key in ONE_GATE),
        *(a_changed_gate(**{key: [[1]]}) for key in ONE_GATE),
        *(a_changed_gate(**{key: [None]}) for key in ONE_GATE),
        *(a_changed_gate(**{key: [10**400]}) for key in ONE_GATE),
        a_changed_gate(above=[1]),
        a_changed_gate(thresholds=[NAN]),
        a_changed_gate(thresholds=[-INFINITY]),
        a_changed_gate(leak_rates=[1.5]),
        a_changed_gate(leak_rates=[-0.5]),
        a_changed_gate(extra=[1]),
        changed_tables(confusion=[[4, 1]]),
        changed_tables(confusion=[[4, 1], [0, 3, 0]]),
        changed_tables(confusion=[[4, 1], [0, -3]]),
        changed_tables(confusion=[[4, 1], [0, 3.5]]),
        changed_tables(confusion=[[4, 1], [0, "3"]]),
        changed_tables(confusion=[[4, 1], [0, 10**30]]),
        changed_tables(confusion=[[4, 1], [0, 2**63]]),
        changed_tables(confusion=[[4, 1], [0, 0]]),
        changed_tables(confusion=7),
        changed_tables(train_counts=[1]),
        changed_tables(train_counts=[1, -1]),
        changed_tables(train_counts={"a": 1}),
        changed_tables(layer_scores=[]),
        changed_tables(threshold_rule="best"),
        changed_tables(threshold_rule=["youden"]),
        changed_tables(threshold_rule="fpr=" + "9" * 100_000),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_invalid_metadata_of_a_router_raises(values, tmp_path):
    check_refused(tmp_path / "x.gguf", a_routed_pack(values).build())


@pytest.mark.parametrize("name", ROUTER_TENSORS)
@pytest.mark.parametrize(
    "change",
    [
        lambda values: None,
        lambda values: np.concatenate([values, values]),
        lambda values: np.concatenate([values, values], axis=-1),
        lambda values: values[None],
        lambda values: values.reshape(values.shape[::-1] if values.ndim > 1 else (-1, 1)),
        lambda values: np.full_like(values, NAN),
        lambda values: np.full_like(values, -INFINITY),
    ],
    ids=["missing", "too many rows", "too wide", "three dimensions", "turned", "NaN", "infinite"],
)
def test_invalid_tensors_of_a_router_raise(change, name, tmp_path):
    tensors = {name: change(ROUTER_TENSORS[name])}
    check_refused(tmp_path / "x.gguf", a_routed_pack(tensors=tensors).build())


def test_zero_condition_vectors_and_stray_tensors_raise(tmp_path):
    zero = {"router.conditions": np.zeros((1, 16))}
    check_refused(tmp_path / "x.gguf", a_routed_pack(tensors=zero).build())
    negative = {"router.allowances": np.full(1, -0.5)}
    check_refused(tmp_path / "x.gguf", a_routed_pack(tensors=negative).build())
    for name in ("router.other", "router.", "router.router.weight", "weight"):
        stray = a_routed_pack(tensors={name: ROWS})
        check_refused(tmp_path / "x.gguf", stray.build())


@pytest.mark.parametrize("kind", TABLES["gates"])
def test_router_tensors_that_do_not_match_its_gates_raise(kind, tmp_path):
    gates = {name: gate for name, gate in TABLES["gates"].items() if name != kind}
    values = changed_tables(gates=gates)
    check_refused(tmp_path / "x.gguf", a_routed_pack(values).build())
    own = {
        "margin": ("margin.weight", "margin.bias", "allowances"),
        "multinomial": ("weight", "bias"),
        "probe": ("probe.weight", "probe.bias"),
        "centroid": ("centroids",),
        "cast": ("conditions",),
    }[kind]
    tensors = {f"router.{name}": None for name in own}
    path = tmp_path / "x.gguf"
    path.write_bytes(a_routed_pack(values, tensors).build())
    assert list(SteeringPack.load(path).router.gates) == list(gates)


def test_router_without_a_classifier_raises(tmp_path):
    values = changed_tables(gates={"probe": ONE_GATE})
    tensors = {
        name: values if name.startswith("router.probe") else None
        for name, values in ROUTER_TENSORS.items()
    }
    check_refused(tmp_path / "x.gguf", a_routed_pack(values, tensors).build())


def test_router_of_another_width_than_the_directions_raises(tmp_path):
    narrow = {name: v[..., :4] if v.ndim > 1 else v for name, v in ROUTER_TENSORS.items()}
    check_refused(tmp_path / "x.gguf", a_routed_pack(tensors=narrow).build())


def test_pack_without_optional_metadata_loads(tmp_path):
    optional = {k.replace(".", "__"): None for k in PACK_VALUES if "norm" in k or "base" in k}
    path = tmp_path / "x.gguf"
    path.write_bytes(a_pack(pysteer__provenance=None, **optional).build())
    pack = SteeringPack.load(path)
    assert (pack.base_model, dict(pack.residual_norm), dict(pack.provenance)) == (None, {}, {})


# ---- other files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"G", b"GGUF", b"GGML" + bytes(100), b"\x80\x02}q\0." * 9, json.dumps({"a": 1}).encode()],
    ids=repr,
)
def test_file_that_is_not_gguf_raises(content, tmp_path):
    check_refused(tmp_path / "x.gguf", content)


def test_big_endian_file_raises(tmp_path):
    file = vector_file(order=">").tensor("direction.1", ROWS[0].astype(">f4").tobytes())
    check_refused(tmp_path / "x.gguf", file.build())


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_other_gguf_version_raises(version, tmp_path):
    file = vector_file(version=version).tensor("direction.1", ROWS[0])
    check_refused(tmp_path / "x.gguf", file.build())


@pytest.mark.parametrize("file", [vector_file(), a_pack(tensors=False), File()])
def test_file_without_directions_raises(file, tmp_path):
    check_refused(tmp_path / "x.gguf", file.build())


def test_folder_or_missing_file_raises(tmp_path):
    check_refused(tmp_path)
    check_refused(tmp_path / "missing.gguf")
    check_refused(tmp_path / ("x" * 300))


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no devices")  # noqa: PTH110
@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_device_raises(device):
    check_refused(device)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_named_pipe_raises_without_waiting(tmp_path):
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    check_refused(path)


@pytest.mark.parametrize("loader", LOADERS)
def test_invalid_path_raises_with_its_name_escaped(loader):
    with pytest.raises(FormatError, match=r"^a\\x00b: "):
        loader("a\0b")


def test_model_file_raises_with_its_architecture(tiny_llama):
    check_refused(tiny_llama)
    assert "'llama'" in str(load(SteeringPack.load, tiny_llama))


def test_metadata_of_a_model_equals_that_of_the_gguf_package(tiny_llama):
    fields = GGUFReader(tiny_llama).fields
    wanted = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert read_metadata(tiny_llama) == wanted
    assert len(wanted["tokenizer.ggml.tokens"]) == 320


def test_file_is_named_even_if_its_name_begins_the_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused((tmp_path / "n").relative_to(tmp_path), b"not a GGUF file at all")


def test_file_name_that_is_not_a_category_name_is_replaced(tmp_path):
    path = tmp_path / " .gguf"
    path.write_bytes(a_vector().build())
    assert list(load(SteeringPack.load, path).categories) == ["vector"]


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "file",
    [
        a_vector().value(LONG, 13, b""),
        vector_file().tensor(LONG, ROWS[0]),
        File().text("general.architecture", LONG),
        File().value("general.architecture", ARRAY, (U8, [1] * 100_000)),
        a_pack(pysteer__format_version=(STRING, LONG)),
    ],
    ids=["key", "tensor", "architecture", "architecture as array", "format version"],
)
def test_messages_name_the_file_once(file, tmp_path):
    check_refused(tmp_path / "x.gguf", file.build())


def test_loaded_vector_does_not_depend_on_the_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(a_vector().build())
    vector = SteeringVector.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert vector == SteeringVector({1: ROWS[0], 3: ROWS[1]})


# ---- files by pysteer, which hold their digest -----------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind of file to its loader, its content and its bytes as pysteer writes them."""
    path = tmp_path_factory.mktemp("saved") / "x.gguf"
    path.write_bytes(a_routed_pack().build())
    pack = SteeringPack.load(path)
    found = {}
    for kind, content in {"vector": SteeringVector({1: ROWS[0]}), "pack": pack}.items():
        content.save(path, overwrite=True)
        found[kind] = (type(content).load, content, path.read_bytes())
    return found


def check_refused_or_equal(path, changed, loader, content):
    path.write_bytes(changed)
    found = load(loader, path)
    assert isinstance(found, FormatError) or found == content


@relaxed
@given(kind=st.sampled_from(["vector", "pack"]), where=st.floats(0, 1), bit=st.integers(0, 7))
def test_flipped_bit_of_a_saved_file_raises_or_changes_nothing(saved, kind, where, bit, tmp_path):
    loader, content, whole = saved[kind]
    changed = bytearray(whole)
    changed[int(where * (len(whole) - 1))] ^= 1 << bit
    check_refused_or_equal(tmp_path / "x.gguf", changed, loader, content)


@relaxed
@given(
    kind=st.sampled_from(["vector", "pack"]),
    start=st.floats(0, 1),
    new=st.binary(min_size=1, max_size=64),
)
def test_overwritten_part_of_a_saved_file_raises_or_changes_nothing(
    saved, kind, start, new, tmp_path
):
    loader, content, whole = saved[kind]
    at = int(start * len(whole))
    changed = whole[:at] + new + whole[at + len(new) :]
    check_refused_or_equal(tmp_path / "x.gguf", changed, loader, content)


@pytest.mark.parametrize("kind", ["vector", "pack"])
def test_saved_file_cut_anywhere_raises_or_is_equal(saved, kind, tmp_path):
    loader, content, whole = saved[kind]
    for length in range(len(whole)):
        check_refused_or_equal(tmp_path / "x.gguf", whole[:length], loader, content)


def test_every_byte_of_the_directions_is_in_the_digest(saved, tmp_path):
    loader, _, whole = saved["vector"]
    at = whole.index(ROWS[0].tobytes())
    for i in range(at, at + 32):
        changed = bytearray(whole)
        changed[i] ^= 1  # another finite number
        (tmp_path / "x.gguf").write_bytes(changed)
        assert "does not match the digest" in str(load(loader, tmp_path / "x.gguf"))


def test_digest_is_the_sha_256_of_the_file_with_zeros_in_its_place(saved):
    for _, _, whole in saved.values():
        at = whole.index(b"pysteer.sha256") + len("pysteer.sha256") + 4 + 8
        digest = whole[at : at + 64].decode()
        assert hashlib.sha256(whole[:at] + b"0" * 64 + whole[at + 64 :]).hexdigest() == digest


@pytest.mark.parametrize("digest", [(STRING, "0" * 63), (STRING, "x" * 64), (U32, 7)])
def test_wrong_digest_raises(digest, tmp_path):
    file = vector_file().value("pysteer.sha256", *digest).tensor("direction.1", ROWS[0])
    check_refused(tmp_path / "x.gguf", file.build())


def test_file_with_its_digest_anywhere_is_read(tmp_path):
    file = vector_file().text("pysteer.sha256", "0" * 64).tensor("direction.1", ROWS[0])
    whole = file.build()
    digest = hashlib.sha256(whole).hexdigest().encode()
    path = tmp_path / "x.gguf"
    path.write_bytes(whole.replace(b"0" * 64, digest))
    assert load(SteeringVector.load, path) == SteeringVector({1: ROWS[0]})
