"""The native callback on hand-made graphs, for cases that no model at hand produces.

The tensors are made through llama.cpp's C interface, and the callback is called as llama.cpp does.
"""

import ctypes
from contextlib import contextmanager

import llama_cpp
import numpy as np
import pytest

from pysteer import _native
from pysteer.llama.versions import load_native

N_LAYER, N_EMBD, N_ROWS = 3, 8, 5
F32, F16, I32, BF16 = 0, 1, 26, 30


class GgmlTensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def ggml(name, result, *arguments):
    function = getattr(llama_cpp.llama_cpp._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


P, S, I64, TENSOR = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(GgmlTensor)


class Graph:
    """A ggml context with tensors in CPU memory, and a hook that sees them."""

    def __init__(self):
        load_native()
        self.context = ggml("ggml_init", P, InitParams)(InitParams(1 << 20, None, False))
        self.buffer = ggml("ggml_backend_cpu_buffer_from_ptr", P, P, ctypes.c_size_t)(
            ggml("ggml_get_mem_buffer", P, P)(self.context), 1 << 20
        )
        self.hook = _native.Hook()
        self.callback = ctypes.CFUNCTYPE(ctypes.c_bool, P, ctypes.c_bool, P)(
            _native.callback_address
        )

    def close(self):
        ggml("ggml_backend_buffer_free", None, P)(self.buffer)
        ggml("ggml_free", None, P)(self.context)

    def tensor(self, name, shape, type_=F32):
        ne = (I64 * len(shape))(*reversed(shape))
        new = ggml("ggml_new_tensor", TENSOR, P, ctypes.c_int, ctypes.c_int, ctypes.POINTER(I64))
        tensor = new(self.context, type_, len(shape), ne)
        return self.named(tensor, name)

    def named(self, tensor, name):
        ggml("ggml_set_name", TENSOR, TENSOR, S)(tensor, name.encode())
        tensor.contents.buffer = self.buffer
        return tensor

    def add(self, name, a, b):
        return self.named(ggml("ggml_add", TENSOR, P, TENSOR, TENSOR)(self.context, a, b), name)

    def ask(self, tensor):
        return self.callback(ctypes.addressof(tensor.contents), True, self.hook.address)

    def computed(self, tensor, *, goes_on=True):
        address = ctypes.addressof(tensor.contents)
        assert self.callback(address, False, self.hook.address) is goes_on

    def bytes_of(self, tensor, count):
        return (ctypes.c_char * count).from_address(tensor.contents.data)

    def fill(self, tensor, values):
        raw = values.tobytes()
        self.bytes_of(tensor, len(raw))[:] = raw

    def read(self, tensor, like):
        raw = bytes(self.bytes_of(tensor, like.nbytes))
        return np.frombuffer(raw, like.dtype).reshape(like.shape)

    def probe(self, *, alter=lambda tensor: None):
        """Probe block outputs, from layer 1 on with a vector added, as a first decode has them."""
        self.vectors = {}
        nodes = [self.tensor("l_out-0", (N_ROWS, N_EMBD))]
        for layer in range(1, N_LAYER):
            vector = self.tensor(f"leaf_{layer}", (N_EMBD,))
            self.fill(vector, np.full(N_EMBD, layer, np.float32))
            block = self.tensor("", (N_ROWS, N_EMBD))
            nodes.append(self.add(f"l_out-{layer}", block, vector))
            self.vectors[layer] = vector
        self.hook.begin_probe(N_LAYER, N_EMBD, N_ROWS)
        for node in nodes:
            alter(node)
            assert not self.ask(node)
        self.hook.end_probe()
        return nodes


@contextmanager
def new_graph():
    graph = Graph()
    try:
        yield graph
    finally:
        graph.close()


@pytest.fixture
def graph():
    with new_graph() as graph:
        yield graph


ADD = {"keep_norm": False, "one_sided": False, "target": False, "low": 0, "high": 0, "angle": 0}


def add_term(made, layers, directions, strength=1.0, *, site="residual", **changed):
    term = {
        "operator": _native.Operator(_native.OperatorKind.add, **ADD),
        "scope": _native.Scope(_native.ScopeKind.all),
        "digest": 1,
    }
    made.add(
        getattr(_native.Site, site),
        np.asarray(layers, np.int32),
        np.ascontiguousarray(np.asarray(directions, np.float32)[:, None]),
        _native.Term(strength=strength, **{**term, **changed}),
    )


def plan(*layers, strength=1.0, injection="automatic"):
    directions = np.random.default_rng(0).standard_normal((len(layers), N_EMBD))
    directions = directions.astype(np.float32)
    made = _native.Plan(N_LAYER, N_EMBD, getattr(_native.Injection, injection))
    add_term(made, layers, directions, strength)
    return made, directions


def sequence(made, n_prompt=N_ROWS):
    return _native.Sequence(made, n_prompt, [], 64)


def steer(graph, *layers, injection="hooked"):
    made, directions = plan(*layers, injection=injection)
    graph.hook.set_sequence(0, sequence(made))
    return directions


def begin(graph, n_rows=N_ROWS, outputs=2):
    graph.hook.begin_decode(np.array([[0, 0, n_rows, outputs]], np.int32))


def rows(dtype=np.float32, shape=(N_ROWS, N_EMBD)):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def test_probe_finds_layers_and_zeroes_vectors(graph):
    graph.probe()
    assert [(f.site, f.layer, f.node, f.on_host) for f in graph.hook.sites] == [
        (_native.Site.residual, layer, f"l_out-{layer}", True) for layer in range(N_LAYER)
    ]
    for vector in graph.vectors.values():
        assert not graph.read(vector, np.empty(N_EMBD, np.float32)).any()


def test_resident_plan_is_written_and_cleared(graph):
    graph.probe()
    made, directions = plan(1, strength=2.0)
    empty = np.empty(N_EMBD, np.float32)

    def decode(sequence):
        graph.hook.set_sequence(0, sequence)
        begin(graph)
        resident = graph.hook.was_resident
        graph.hook.abandon_decode()
        return resident

    assert decode(sequence(made))
    np.testing.assert_array_equal(graph.read(graph.vectors[1], empty), 2 * directions[0])
    assert not graph.read(graph.vectors[2], empty).any()
    assert decode(sequence(plan(2)[0]))
    assert not graph.read(graph.vectors[1], empty).any()
    assert graph.read(graph.vectors[2], empty).any()
    assert not decode(None)
    assert not graph.read(graph.vectors[2], empty).any()


def bf16_bits(values):
    """Round to nearest even, as the format defines it."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("type_", [F32, F16, BF16])
def test_addition_is_exact_for_every_float_type(graph, memory, type_):
    graph.probe()
    directions = steer(graph, 1)
    node = graph.tensor("l_out-1", (N_ROWS, N_EMBD), type_)
    values = rows()
    if type_ == BF16:
        stored = bf16_bits(values)
        expected = bf16_bits(bf16_values(stored) + directions[0])
    else:
        stored = values.astype(np.float16 if type_ == F16 else np.float32)
        expected = (stored.astype(np.float32) + directions[0]).astype(stored.dtype)
    graph.fill(node, stored)
    memory.move(node)
    begin(graph)
    assert graph.ask(node)
    graph.computed(node)
    graph.hook.end_decode()
    memory.move_back(node)
    np.testing.assert_array_equal(graph.read(node, stored), expected)


def test_padded_rows_in_three_dimensions_are_all_steered(graph, memory):
    """Rows of a view lie apart, and batches by sequence have a third dimension."""
    graph.probe()
    directions = steer(graph, 1)
    backing = graph.tensor("", (2, 3, N_EMBD + 4))
    view = ggml("ggml_view_3d", TENSOR, P, TENSOR, *[I64] * 3, *[ctypes.c_size_t] * 3)
    row = 4 * (N_EMBD + 4)
    node = graph.named(view(graph.context, backing, N_EMBD, 3, 2, row, 3 * row, 0), "l_out-1")
    values = rows(shape=(2, 3, N_EMBD + 4))
    graph.fill(backing, values)
    memory.move(node)
    begin(graph, 6)
    assert graph.ask(node)
    graph.computed(node)
    graph.hook.end_decode()
    memory.move_back(node)
    expected = values.copy()
    expected[..., :N_EMBD] += directions[0]
    np.testing.assert_array_equal(graph.read(backing, values), expected)


def test_other_nodes_are_not_asked_for(graph):
    graph.probe()
    steer(graph, 1)
    begin(graph)
    for name in (
        "l_out-0",
        "l_out-2",
        "l_out-3",
        "l_out-11",
        "l_out-1x",
        "l_out-",
        "l_out",
        "xl_out-1",
    ):
        assert not graph.ask(graph.tensor(name, (N_ROWS, N_EMBD))), name
    assert graph.ask(graph.tensor("l_out-1", (N_ROWS, N_EMBD)))
    graph.hook.abandon_decode()
    graph.hook.set_sequence(0, None)
    begin(graph)
    assert not graph.ask(graph.tensor("l_out-1", (N_ROWS, N_EMBD)))


@pytest.mark.parametrize(
    ("shape", "type_", "message"),
    [((N_ROWS, N_EMBD), I32, "has type i32"), ((N_ROWS, 2 * N_EMBD), F32, "contiguous row of 8")],
)
def test_unsupported_node_is_reported_and_untouched(graph, shape, type_, message):
    graph.probe()
    steer(graph, 1)
    node = graph.tensor("l_out-1", shape, type_)
    values = rows(shape=shape)
    graph.fill(node, values)
    begin(graph)
    graph.ask(node)
    graph.computed(node)
    with pytest.raises(RuntimeError, match=message):
        graph.hook.end_decode()
    np.testing.assert_array_equal(graph.read(node, values), values)


def test_unexpected_row_count_in_last_block_is_reported_and_untouched(graph):
    """The last block has one row with logits, or all five; three rows cannot be mapped."""
    graph.probe()
    steer(graph, 2)
    first, last = (graph.tensor(f"l_out-{i}", (n, N_EMBD)) for i, n in ((0, N_ROWS), (2, 3)))
    values = rows(shape=(3, N_EMBD))
    graph.fill(last, values)
    begin(graph, outputs=1)
    assert not graph.ask(first)
    assert graph.ask(last)
    graph.computed(last)
    with pytest.raises(RuntimeError, match="which tokens the 3 rows of site residual, layer 2"):
        graph.hook.end_decode()
    np.testing.assert_array_equal(graph.read(last, values), values)


def test_missing_rows_raise_with_place_and_counts(graph):
    graph.probe()
    steer(graph, 0, 1)
    node = graph.tensor("l_out-0", (N_ROWS, N_EMBD))
    graph.fill(node, rows())
    begin(graph)
    graph.ask(node)
    graph.computed(node)
    with pytest.raises(RuntimeError, match="reached 0 of 5 tokens at site residual, layer 1"):
        graph.hook.end_decode()
    begin(graph, 1)
    with pytest.raises(RuntimeError, match="layer 0"):
        graph.hook.end_decode()


@pytest.mark.parametrize(("outputs", "kept"), [(0, []), (1, [4]), (2, [0, 1, 2, 3, 4])])
def test_last_block_rows_map_to_rows_with_logits(graph, outputs, kept):
    """Two sequences in a batch of two micro-batches: the row number alone tells the token."""
    graph.probe()
    made, directions = plan(0, 2, injection="hooked")
    scope = _native.Scope(_native.ScopeKind.positions, 4, 5)
    one_position = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    add_term(one_position, [0, 2], directions, scope=scope)
    graph.hook.set_sequence(0, sequence(made))
    graph.hook.set_sequence(3, sequence(one_position))
    runs = [[0, 0, N_ROWS, outputs], [3, 0, N_ROWS, outputs], [7, 0, 2, outputs]]
    graph.hook.begin_decode(np.array(runs, np.int32))
    expected = np.zeros((12, N_EMBD), np.float32)
    expected[:N_ROWS] = 1
    expected[9] = 1
    outputs_of = [row + at for at, n in ((0, 5), (5, 5), (10, 2)) for row in range(n)]
    asked = [i for i in outputs_of if outputs == 2 or (outputs == 1 and i in (4, 9, 11))]
    assert [i for i in asked if i < 5] == kept
    for start, stop in ((0, 7), (7, 12)):  # micro-batches
        whole = graph.tensor("l_out-0", (stop - start, N_EMBD))
        graph.fill(whole, np.zeros((stop - start, N_EMBD), np.float32))
        assert graph.ask(whole)
        graph.computed(whole)
        found = graph.read(whole, np.empty((stop - start, N_EMBD), np.float32))
        np.testing.assert_array_equal(found, expected[start:stop] * directions[0])
        some = [i for i in asked if start <= i < stop]
        if not some:
            continue
        last = graph.tensor("l_out-2", (len(some), N_EMBD))
        graph.fill(last, np.zeros((len(some), N_EMBD), np.float32))
        assert graph.ask(last)
        graph.computed(last)
        found = graph.read(last, np.empty((len(some), N_EMBD), np.float32))
        np.testing.assert_array_equal(found, expected[some] * directions[1])
    graph.hook.end_decode()


def test_graph_without_control_vector_raises(graph):
    nodes = graph.probe()
    steer(graph, 1, injection="resident")
    begin(graph)
    assert not graph.ask(nodes[1])  # adds by itself: no need to cut the graph
    graph.hook.end_decode()
    begin(graph)
    graph.ask(graph.tensor("l_out-1", (N_ROWS, N_EMBD)))  # a graph without the vector
    with pytest.raises(RuntimeError, match="reached 0 of"):
        graph.hook.end_decode()


@pytest.mark.parametrize("steered", [False, True])
def test_graph_ends_after_last_captured_node_unless_steered(graph, steered):
    graph.probe()
    if steered:  # the rest of the graph is needed, too
        steer(graph, 2)
    wanted = np.zeros(len(_native.Site.__members__) * N_LAYER, np.uint8)
    wanted[:2] = 1  # the residual of layers 0 and 1
    graph.hook.begin_capture(
        wanted=wanted,
        slots=np.arange(N_ROWS, dtype=np.int32),
        n_slots=N_ROWS,
        n_layer=N_LAYER,
        n_embd=N_EMBD,
    )
    nodes = [graph.tensor(f"l_out-{layer}", (N_ROWS, N_EMBD)) for layer in range(2)]
    begin(graph)
    for layer, node in enumerate(nodes):
        graph.fill(node, rows() + layer)
        assert graph.ask(node)
        graph.computed(node, goes_on=steered or layer == 0)
    graph.hook.abandon_decode()
    captured = graph.hook.end_capture()
    for layer in range(2):
        read = captured.read(_native.Site.residual, layer)
        np.testing.assert_array_equal(read, rows() + layer)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        captured.read(_native.Site.residual, 2)


def test_hook_refuses_changes_during_decode_and_after_detach(graph):
    graph.probe()
    begin(graph)
    with pytest.raises(RuntimeError, match="while a decode is running"):
        graph.hook.set_sequence(0, None)
    with pytest.raises(RuntimeError, match="while a decode is running"):
        begin(graph)
    graph.hook.abandon_decode()
    steer(graph, 1)
    graph.hook.detach()
    with pytest.raises(RuntimeError, match="closed"):
        graph.hook.set_sequence(0, None)
    with pytest.raises(RuntimeError, match="closed"):
        begin(graph)
    assert not graph.ask(graph.tensor("l_out-1", (N_ROWS, N_EMBD)))


def test_misfit_plan_raises_and_keeps_former_plan(graph):
    graph.probe()
    steer(graph, 1)
    node = graph.tensor("l_out-1", (N_ROWS, N_EMBD))
    ones = [1], np.ones((1, N_EMBD), np.float32)
    deeper = _native.Plan(N_LAYER + 1, N_EMBD, _native.Injection.automatic)
    add_term(deeper, *ones)
    attention = _native.Plan(N_LAYER, N_EMBD, _native.Injection.automatic)
    add_term(attention, *ones, site="attention")
    for wrong, message in [
        (deeper, "the plan is for 4 layers of width 8, the model has 3 layers of width 8"),
        (attention, "no site attention, layer 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            graph.hook.set_sequence(0, sequence(wrong))
        begin(graph)
        assert graph.ask(node)
        graph.hook.abandon_decode()
    steer(graph, 0, injection="resident")
    with pytest.raises(ValueError, match="cannot express these rows"):
        begin(graph)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_invalid_directions_raise(value):
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.automatic)
    directions = np.zeros((1, N_EMBD), np.float32)
    directions[0, 3] = value
    add_term(made, [1], directions)
    with pytest.raises(ValueError, match="layer 1 times its strength is not finite"):
        made.check_finite()
    with pytest.raises(ValueError, match=r"no layer 3.*layers 0 to 2"):
        add_term(made, [3], directions)
    with pytest.raises(ValueError, match=r"expected .* \(layers, rows, 8\), found \(1, 1, 8\)"):
        add_term(made, [1, 2], directions)


class Device:
    """Memory beyond the host: tensors in it have addresses that lead nowhere.

    ggml reaches it through the functions of a buffer, copied from a CPU buffer. These record the
    bytes that move, as (offset, size).
    """

    SHIFT = 1 << 47  # to an address that no process has
    SET, GET, IS_HOST = 4, 5, 5  # positions of functions in ggml's buffers and buffer types

    def __init__(self, graph):
        self.reads, self.writes = [], []
        type_ = ggml("ggml_backend_buffer_get_type", P, P)(graph.buffer)
        self._type = (ctypes.c_size_t * 8)(*(ctypes.c_size_t * 8).from_address(type_))
        self._type[self.IS_HOST] = 0
        words = (ctypes.c_size_t * 15).from_address(graph.buffer)
        n = list(words).index(type_) + 4  # behind the type: context, size and usage
        self._buffer = (ctypes.c_size_t * n)(*words[:n])
        self._buffer[n - 4] = ctypes.addressof(self._type)
        move = ctypes.CFUNCTYPE(None, P, TENSOR, P, ctypes.c_size_t, ctypes.c_size_t)
        self._functions = move(self._set), move(self._get)
        for at, function in zip((self.SET, self.GET), self._functions, strict=True):
            self._buffer[at] = ctypes.cast(function, P).value

    def _set(self, _, tensor, data, offset, size):
        self.writes.append((offset, size))
        ctypes.memmove(tensor.contents.data - self.SHIFT + offset, data, size)

    def _get(self, _, tensor, data, offset, size):
        self.reads.append((offset, size))
        ctypes.memmove(data, tensor.contents.data - self.SHIFT + offset, size)

    def move(self, tensor):
        tensor.contents.buffer = ctypes.addressof(self._buffer)
        tensor.contents.data += self.SHIFT
        if tensor.contents.view_src:
            source = ctypes.cast(tensor.contents.view_src, TENSOR).contents
            source.buffer = ctypes.addressof(self._buffer)

    def move_back(self, tensor):
        tensor.contents.data -= self.SHIFT


class Host:
    """Memory where tensors stay as they are."""

    def __init__(self, graph):
        pass

    def move(self, tensor):
        pass

    move_back = move


@pytest.fixture(params=[Host, Device])
def memory(request, graph):
    return request.param(graph)


@pytest.fixture
def device(graph):
    return Device(graph)


def test_probe_names_memory_beyond_the_host(graph, device):
    nodes = graph.probe(alter=lambda node: device.move(node) if node.contents.ne[1] > 1 else None)
    assert [f.on_host for f in graph.hook.sites] == [False] * N_LAYER
    steer(graph, 1, 2, injection="resident")  # llama.cpp adds it there by itself
    begin(graph)
    assert not any(graph.ask(node) for node in nodes)
    graph.hook.end_decode()
    assert device.reads == device.writes == []


def probe_with_a_copy(graph):
    """Probe a graph whose layer 1 adds a copy of its control vector; return the nodes.

    ggml's scheduler makes one where the next layer is on another device.
    """

    def copy(node):
        if node.contents.name == b"l_out-1":
            graph.named(ctypes.cast(node.contents.src[1], TENSOR), "GPU0##0")

    nodes = graph.probe(alter=copy)
    assert [f.layer for f in graph.hook.sites] == list(range(N_LAYER))
    return nodes


def test_layer_with_a_copy_of_its_control_vector_is_steered_by_the_hook(graph):
    nodes = probe_with_a_copy(graph)
    directions = steer(graph, 1, injection="hooked")
    values = rows()
    graph.fill(nodes[1], values)
    begin(graph)
    assert [graph.ask(node) for node in nodes] == [False, True, False]
    graph.computed(nodes[1])
    graph.hook.end_decode()
    np.testing.assert_array_equal(graph.read(nodes[1], values), values + directions[0])
    assert graph.read(graph.vectors[1], directions[0]).max() == 1  # the probe's; llama.cpp's to end


def test_layer_with_a_copy_of_its_control_vector_is_steered_by_a_table(graph):
    """The other layer goes through its control vector."""
    nodes = probe_with_a_copy(graph)
    directions = steer(graph, 1, 2, injection="automatic")
    describe = ggml("ggml_op_desc", S, TENSOR)
    copied = nodes[1].contents.src[1]
    begin(graph)
    assert not any(graph.ask(node) for node in nodes)
    graph.hook.end_decode()
    assert [describe(node) for node in nodes[1:]] == [b"ADD_ID", b"ADD"]
    table, ids = (ctypes.cast(nodes[1].contents.src[k], TENSOR) for k in (1, 2))
    found = graph.read(table, np.zeros((2, N_EMBD), np.float32))
    np.testing.assert_array_equal(found, [np.zeros(N_EMBD), directions[0]])
    np.testing.assert_array_equal(graph.read(ids, np.zeros(N_ROWS, np.int32)), 1)
    np.testing.assert_array_equal(graph.read(graph.vectors[2], directions[1]), directions[1])
    graph.hook.set_sequence(0, None)
    begin(graph)
    assert not any(graph.ask(node) for node in nodes)
    graph.hook.end_decode()
    assert describe(nodes[1]) == b"ADD"
    assert (nodes[1].contents.src[1], nodes[1].contents.src[2]) == (copied, None)


def test_control_vector_that_a_later_graph_copies_is_added_by_the_graph(graph):
    """Large batches of host layers may be computed on a device."""
    nodes = graph.probe()
    steer(graph, 1, injection="resident")
    copied = graph.tensor("GPU0##0", (N_EMBD,))
    node = graph.add("l_out-1", graph.tensor("", (N_ROWS, N_EMBD)), copied)
    begin(graph)
    assert [graph.ask(each) for each in (nodes[0], node, nodes[2])] == [False] * 3
    graph.hook.end_decode()


ROW = 4 * N_EMBD


def scoped(start, stop, *layers):
    """Set a plan for the positions [start, stop) alone; return its directions."""
    directions = np.random.default_rng(0).standard_normal((len(layers), N_EMBD))
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    scope = _native.Scope(_native.ScopeKind.positions, start, stop)
    add_term(made, layers, directions, scope=scope)
    return made, directions.astype(np.float32)


def test_only_steered_rows_are_copied_from_a_device(graph, device):
    graph.probe()
    made, directions = scoped(2, 4, 0)
    graph.hook.set_sequence(0, sequence(made))
    graph.hook.set_sequence(1, sequence(scoped(0, 1, 0)[0]))
    node = graph.tensor("l_out-0", (2 * N_ROWS, N_EMBD))
    values = rows(shape=(2 * N_ROWS, N_EMBD))
    graph.fill(node, values)
    device.move(node)
    graph.hook.begin_decode(np.array([[0, 0, N_ROWS, 2], [1, 0, N_ROWS, 2]], np.int32))
    assert graph.ask(node)
    graph.computed(node)
    graph.hook.end_decode()
    device.move_back(node)
    values[[2, 3, N_ROWS]] += directions[0]
    np.testing.assert_array_equal(graph.read(node, values), values)
    assert device.reads == device.writes == [(2 * ROW, 2 * ROW), (N_ROWS * ROW, ROW)]


def test_micro_batch_without_steered_row_is_not_asked_for(graph):
    graph.probe()
    graph.hook.set_sequence(0, sequence(scoped(4, 6, 0, 1)[0], n_prompt=12))
    begin(graph, 12)
    for start, stop in ((0, 4), (4, 8), (8, 12)):
        for layer in range(N_LAYER):
            node = graph.tensor(f"l_out-{layer}", (stop - start, N_EMBD))
            graph.fill(node, rows(shape=(stop - start, N_EMBD)))
            asked = graph.ask(node)
            assert asked is (start == 4 and layer < 2)
            if asked:
                graph.computed(node)
    graph.hook.end_decode()


def test_only_captured_rows_are_copied_from_a_device(graph, device):
    graph.probe()
    wanted = np.zeros(len(_native.Site.__members__) * N_LAYER, np.uint8)
    wanted[[1, 2]] = 1
    slots = np.array([-1, 0, 0, -1, 1], np.int32)
    graph.hook.begin_capture(wanted=wanted, slots=slots, n_slots=2, n_layer=N_LAYER, n_embd=N_EMBD)
    begin(graph)
    values = rows()
    for layer in (1, 2):
        node = graph.tensor(f"l_out-{layer}", (N_ROWS, N_EMBD))
        graph.fill(node, values)
        device.move(node)
        assert graph.ask(node)
        graph.computed(node, goes_on=layer == 1)
    graph.hook.end_decode()
    means = graph.hook.end_capture().read(_native.Site.residual, 2)
    np.testing.assert_allclose(means, [values[1:3].mean(0), values[4]], rtol=1e-6)
    assert device.reads == 2 * [(ROW, 2 * ROW), (4 * ROW, ROW)]
    assert device.writes == []


def gated(threshold):
    """A plan at layer 1 behind a gate: first component of the last prompt token's row there."""
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    add_term(made, [1], np.ones((1, N_EMBD), np.float32), rule=[0], own_gate=0)
    weights = np.eye(1, N_EMBD)
    gate = _native.Gate(
        _native.Site.residual, [(1, False)], _native.GateKind.probe, weights, [0.0], [], []
    )
    made.set_gate(gate, [threshold], [1], _native.ConflictRule.sum, 0)
    return made


@pytest.mark.parametrize("fires", [True, False])
def test_only_the_row_that_a_gate_reads_is_copied_from_a_device(graph, device, fires):
    graph.probe()
    values = rows()
    made = gated(values[4, 0] - 1e-3 if fires else values[4, 0] + 1e-3)
    state = _native.Sequence(made, N_ROWS, [(0, N_ROWS)], 64)
    graph.hook.set_sequence(0, state)

    def block(values):
        node = graph.tensor("l_out-1", values.shape)
        graph.fill(node, values)
        device.move(node)
        return node

    begin(graph, outputs=1)
    assert not graph.ask(block(values[:3]))  # a micro-batch without the last prompt token
    node = block(values[3:])
    assert graph.ask(node)
    graph.computed(node)
    graph.hook.end_decode()
    assert state.n_decisions == 1
    device.move_back(node)
    found = graph.read(node, values[3:])
    np.testing.assert_array_equal(found, values[3:] + np.float32([[0], [fires]]))
    assert device.reads == [(ROW, ROW)]
    assert device.writes == ([(ROW, ROW)] if fires else [])
    graph.hook.begin_decode(np.array([[0, N_ROWS, 1, 1]], np.int32))
    assert graph.ask(block(values[:1])) is fires  # nothing is cut behind a closed gate
    graph.hook.abandon_decode()


def test_decision_in_the_first_stream_steers_all_streams_on_a_device(graph, device):
    graph.probe(alter=reshaped(N_EMBD, N_ROWS, STREAMS, 1))
    values = rows(shape=(STREAMS, N_ROWS, N_EMBD))
    state = _native.Sequence(gated(values[0, 4, 0] - 1e-3), N_ROWS, [(0, N_ROWS)], 64)
    graph.hook.set_sequence(0, state)
    node = graph.tensor("l_out-1", (STREAMS * N_ROWS, N_EMBD))
    graph.fill(node, values)
    reshaped(N_EMBD, N_ROWS, STREAMS, 1)(node)
    device.move(node)
    begin(graph, outputs=1)
    assert graph.ask(node)
    graph.computed(node)
    graph.hook.end_decode()
    device.move_back(node)
    values[:, 4] += 1
    np.testing.assert_array_equal(graph.read(node, values), values)


def test_overflow_on_a_device_is_reported_and_written_as_zeros(graph, device):
    graph.probe()
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    add_term(made, [1], np.full((1, N_EMBD), 3e38, np.float32))
    graph.hook.set_sequence(0, sequence(made))
    node = graph.tensor("l_out-1", (N_ROWS, N_EMBD))
    values = np.full((N_ROWS, N_EMBD), 3e38, np.float32)
    graph.fill(node, values)
    device.move(node)
    begin(graph)
    graph.ask(node)
    graph.computed(node)
    with pytest.raises(RuntimeError, match="not finite at site residual, layer 1"):
        graph.hook.end_decode()
    device.move_back(node)
    assert not graph.read(node, values).any()


STREAMS = 3


def reshaped(*sizes):
    """Give a tensor other sizes, the same over which it has rows; the memory stays."""

    def alter(tensor):
        for axis, size in enumerate(sizes):
            tensor.contents.ne[axis] = size
            tensor.contents.nb[axis] = 4 * int(np.prod(sizes[:axis], dtype=int))

    return alter


def test_residual_with_rows_in_an_unknown_layout_is_no_site(graph):
    """Token by token, the streams of each: no model of llama.cpp's that is known here."""
    graph.probe(alter=reshaped(N_EMBD, STREAMS, N_ROWS, 1))
    assert graph.hook.sites == []
    made, _ = plan(1)
    with pytest.raises(ValueError, match="no site residual, layer 1"):
        graph.hook.set_sequence(0, sequence(made))


def test_streams_of_a_token_are_steered_alike(graph, memory):
    graph.probe(alter=reshaped(N_EMBD, N_ROWS, STREAMS, 1))
    assert [found.layer for found in graph.hook.sites] == list(range(N_LAYER))
    node = graph.tensor("l_out-0", (STREAMS * N_ROWS, N_EMBD))
    values = rows(shape=(STREAMS, N_ROWS, N_EMBD))
    graph.fill(node, values)
    reshaped(N_EMBD, N_ROWS, STREAMS, 1)(node)
    memory.move(node)
    made, directions = scoped(3, 5, 0)
    graph.hook.set_sequence(0, sequence(made))
    begin(graph)
    assert graph.ask(node)
    graph.computed(node)
    graph.hook.end_decode()
    memory.move_back(node)
    expected = values.copy()
    expected[:, 3:5] += directions[0]
    np.testing.assert_array_equal(graph.read(node, values), expected)


def test_streams_in_another_number_than_in_the_probe_raise(graph):
    graph.probe(alter=reshaped(N_EMBD, N_ROWS, STREAMS, 1))
    node = graph.tensor("l_out-0", (STREAMS * N_ROWS, N_EMBD))  # one stream of more rows
    steer(graph, 0)
    begin(graph)
    assert graph.ask(node)
    graph.computed(node)
    with pytest.raises(RuntimeError, match=f"which tokens the {STREAMS * N_ROWS} rows"):
        graph.hook.end_decode()


@pytest.mark.parametrize("name", ["blk.1.attn_output.weight", "GPU0#blk.1.attn_output.weight#0"])
def test_site_is_recognised_by_a_weight_and_by_its_copy_on_another_device(graph, name):
    """ggml's scheduler copies the weights of host layers to a device for large batches."""
    weight = graph.tensor("blk.1.attn_output.weight", (N_EMBD, N_EMBD))

    def product(matrix):
        rows = graph.tensor("", (N_ROWS, N_EMBD))
        multiply = ggml("ggml_mul_mat", TENSOR, P, TENSOR, TENSOR)
        return graph.named(multiply(graph.context, matrix, rows), "attn_out-1")

    graph.hook.begin_probe(N_LAYER, N_EMBD, N_ROWS)
    graph.ask(product(weight))
    graph.hook.end_probe()
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.automatic)
    add_term(made, [1], np.ones((1, N_EMBD), np.float32), site="attention")
    graph.hook.set_sequence(0, sequence(made))
    begin(graph)
    assert graph.ask(product(graph.named(weight, name)))
    assert not graph.ask(product(graph.tensor("GPU0#blk.1.attn_output.bias#0", (N_EMBD, N_EMBD))))
    graph.hook.abandon_decode()


def foreign_rows(graph, n_rows, *, start=0, n_positions=64, at=("l_out-0",), batches=(3, 2)):
    """Announce foreign rows, show nodes of zeros in micro-batches, and return the last of them."""
    graph.hook.begin_foreign(0, start, n_rows, n_positions)
    found = []
    for name in at:
        for n in batches:
            node = graph.tensor(name, (n, N_EMBD))
            graph.fill(node, np.zeros((n, N_EMBD), np.float32))
            if graph.ask(node):
                graph.computed(node)
            found.append(graph.read(node, np.empty((n, N_EMBD), np.float32)))
    return np.concatenate(found)


def test_foreign_rows_of_unknown_number_are_steered_by_their_positions(graph):
    graph.probe()
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    directions = np.arange(N_EMBD, dtype=np.float32)[None]
    add_term(made, [0], directions, scope=_native.Scope(_native.ScopeKind.positions, 9, 11))
    graph.hook.set_sequence(0, sequence(made, 64))
    found = foreign_rows(graph, 50, start=8)
    assert graph.hook.end_foreign() == 5
    steered = np.array([0, 1, 1, 0, 0], np.float32)[:, None]
    np.testing.assert_array_equal(found, steered * directions)
    begin(graph)  # the next decode is one as ever
    graph.hook.abandon_decode()


def test_foreign_rows_beyond_their_positions_share_the_last(graph):
    graph.probe()
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    directions = np.arange(N_EMBD, dtype=np.float32)[None]
    add_term(made, [0], directions, scope=_native.Scope(_native.ScopeKind.positions, 9, 10))
    graph.hook.set_sequence(0, sequence(made, 64))
    found = foreign_rows(graph, 50, start=8, n_positions=2)
    assert graph.hook.end_foreign() == 5
    steered = np.array([0, 1, 1, 1, 1], np.float32)[:, None]
    np.testing.assert_array_equal(found, steered * directions)


def test_unsteered_foreign_rows_are_counted_and_not_asked_for(graph):
    graph.probe()
    graph.hook.begin_foreign(0, 0, 50, 50)
    for n in (3, 2, 1):
        assert not graph.ask(graph.tensor("l_out-0", (n, N_EMBD)))
    assert graph.hook.end_foreign() == 6


def test_foreign_rows_that_steering_missed_raise(graph):
    graph.probe()
    steer(graph, 0, 1)
    foreign_rows(graph, 50)  # nothing of block 1
    with pytest.raises(RuntimeError, match="reached 0 of 5"):
        graph.hook.end_foreign()


def test_more_foreign_rows_than_announced_raise(graph):
    graph.probe()
    steer(graph, 0)
    foreign_rows(graph, 4)
    with pytest.raises(RuntimeError, match="cannot tell which tokens"):
        graph.hook.end_foreign()
    graph.hook.set_sequence(0, None)
    foreign_rows(graph, 4)
    with pytest.raises(RuntimeError, match="at most 4 rows, found 5"):
        graph.hook.end_foreign()


def test_foreign_rows_with_some_logits_in_a_steered_last_block_raise(graph):
    """The rows with logits are unknown, so that only none and all are clear."""
    graph.probe()
    steer(graph, 0, N_LAYER - 1)
    foreign_rows(graph, 50, at=("l_out-0", f"l_out-{N_LAYER - 1}"), batches=(5,))
    graph.hook.end_foreign()
    graph.hook.begin_foreign(0, 0, 50, 50)
    for name, n in (("l_out-0", 5), (f"l_out-{N_LAYER - 1}", 1)):
        node = graph.tensor(name, (n, N_EMBD))
        assert graph.ask(node)
        graph.computed(node)
    with pytest.raises(RuntimeError, match="cannot tell which tokens"):
        graph.hook.end_foreign()


def test_gate_averages_over_a_span_without_what_it_leaves_out():
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.hooked)
    add_term(made, [0], np.ones((1, N_EMBD)), rule=[0])
    weights = np.ones((1, N_EMBD))
    gate = _native.Gate(
        _native.Site.residual, [(0, True)], _native.GateKind.probe, weights, [0.0], [], []
    )
    made.set_gate(gate, [0.0], [1], _native.ConflictRule.sum, 0)
    with new_graph() as graph:
        graph.probe()
        gated = _native.Sequence(made, 6, [(0, 6)], 64)
        gated.leave_out(2, 5)
        graph.hook.set_sequence(0, gated)
        values = rows(shape=(6, N_EMBD))
        for start, stop in ((0, 2), (5, 6)):
            graph.hook.begin_decode(np.array([[0, start, stop - start, 1]], np.int32))
            node = graph.tensor("l_out-0", (stop - start, N_EMBD))
            graph.fill(node, values[start:stop])
            assert graph.ask(node)
            graph.computed(node)
            graph.hook.end_decode()
        assert gated.decided_at == [5]
        expected = values[[0, 1, 5]].astype(np.float64).mean(axis=0).sum()
        assert gated.scores == pytest.approx([expected], rel=1e-12)


def test_terms_of_positions_beyond_foreign_rows_have_nothing_to_reach(graph):
    graph.probe()
    made = _native.Plan(N_LAYER, N_EMBD, _native.Injection.automatic)
    beyond = _native.Scope(_native.ScopeKind.positions, 5, 9)
    add_term(made, [0], np.ones((1, N_EMBD)), scope=beyond)
    graph.hook.set_sequence(0, sequence(made, 64))
    foreign_rows(graph, 50, n_positions=5)
    assert graph.hook.end_foreign() == 5
