"""SteeringVector: arguments, arithmetic against plain numpy, and equality."""

import copy
import os
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pysteer import SteeringError, SteeringVector

WIDTH = 5
floats = st.floats(-(2.0**40), 2.0**40, width=32)
rows = hnp.arrays(np.float32, WIDTH, elements=floats).map(lambda row: row + 0)  # no -0.0
vectors = st.builds(
    SteeringVector,
    st.dictionaries(st.integers(0, 7), rows, min_size=1, max_size=4),
    site=st.sampled_from(["residual", "attention"]),
)
factors = st.floats(-(2.0**20), 2.0**20, width=32)


def dense(vector):
    """The vector as an array of 8 layers; layers without a direction are zero."""
    out = np.zeros((8, WIDTH), np.float32)
    for layer in vector.layers:
        out[layer] = vector.direction(layer)
    return out


@given(st.dictionaries(st.integers(0, 10**5), rows, min_size=1, max_size=5))
def test_vector_holds_its_arguments(directions):
    vector = SteeringVector(directions)
    assert vector.site == "residual"
    assert vector.layers == tuple(sorted(directions))
    assert vector.n_embd == WIDTH
    assert vector.matrix.dtype == np.float32
    assert vector.matrix.flags.c_contiguous
    assert vector.matrix.shape == (len(directions), WIDTH)
    assert {layer: row.tolist() for layer, row in vector.items()} == {
        layer: row.tolist() for layer, row in directions.items()
    }
    for layer, row in directions.items():
        assert vector.direction(layer).tolist() == row.tolist()


@given(vectors, vectors)
def test_sum_and_difference_count_missing_layers_as_zero(a, b):
    if a.site != b.site:
        with pytest.raises(SteeringError):
            a + b
        with pytest.raises(SteeringError):
            a - b
        return
    np.testing.assert_array_equal(dense(a + b), dense(a) + dense(b))
    np.testing.assert_array_equal(dense(a - b), dense(a) - dense(b))
    assert (a + b).layers == tuple(sorted({*a.layers, *b.layers}))
    assert (a + b).site == a.site


@given(vectors, factors)
def test_products_scale_every_direction_and_keep_the_rest(vector, factor):
    expected = vector.matrix * np.float32(factor)
    for product in (vector * factor, factor * vector, np.float64(factor) * vector):
        assert isinstance(product, SteeringVector)
        assert (product.site, product.layers) == (vector.site, vector.layers)
        np.testing.assert_array_equal(product.matrix, expected)


@given(vectors)
def test_negation_and_division_scale(vector):
    np.testing.assert_array_equal((-vector).matrix, -vector.matrix)
    np.testing.assert_array_equal((vector / 4).matrix, vector.matrix / 4)
    np.testing.assert_allclose((vector / 3).matrix, vector.matrix / 3, rtol=1e-6)
    assert (-vector).site == (vector / 4).site == vector.site


@given(vectors)
def test_arithmetic_identities_hold(vector):
    assert vector + vector == 2 * vector
    assert vector - vector == 0 * vector
    negative = -vector
    assert -negative == vector
    assert vector * 1 == vector / 1 == vector
    assert vector - 2 * vector == -vector


@given(vectors)
def test_arithmetic_does_not_change_its_operands(vector):
    before = vector.matrix.copy()
    _ = vector + vector, vector - vector, vector * 3, -vector, vector / 2
    np.testing.assert_array_equal(vector.matrix, before)


def test_fractions_and_numpy_scalars_scale():
    vector = SteeringVector({1: [2.0, 4.0]})
    half = SteeringVector({1: [1.0, 2.0]})
    for factor in (Fraction(1, 2), np.float32(0.5), np.float16(0.5)):
        assert vector * factor == half


@pytest.mark.parametrize(
    "factor",
    [float("nan"), float("inf"), -float("inf"), 1e39, 1e300, pytest.param(10**400, id="10**400")],
)
def test_factor_that_is_not_finite_in_float32_raises(factor):
    with np.errstate(all="ignore"), pytest.raises(SteeringError):
        SteeringVector({1: [0.0, 1.0]}) * factor


@pytest.mark.parametrize("divisor", [0, 0.0, -0.0, float("nan"), 1e-45], ids=str)
def test_invalid_divisor_raises(divisor):
    with np.errstate(all="ignore"), pytest.raises(SteeringError):
        SteeringVector({1: [1.0]}) / divisor


@pytest.mark.parametrize("other", ["2", None, [1.0], {}, 1j])
def test_operand_of_another_type_raises_type_error(other):
    vector = SteeringVector({1: [1.0]})
    for operation in ("__add__", "__sub__", "__mul__", "__truediv__"):
        assert getattr(vector, operation)(other) is NotImplemented


def test_sum_of_different_widths_raises():
    with pytest.raises(SteeringError, match=r"width 1.*width 2"):
        SteeringVector({1: [1.0]}) + SteeringVector({1: [1.0, 2.0]})


def test_sum_that_overflows_float32_raises():
    vector = SteeringVector({3: [3e38]})
    with np.errstate(all="ignore"), pytest.raises(SteeringError, match="layer 3"):
        vector + vector


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        ({}, "at least one layer"),
        ({-1: [1.0]}, "negative"),
        ({1: [1.0], 2: [1.0, 2.0]}, "layer 2"),
        ({1: []}, "shape"),
        ({1: [[1.0]]}, "shape"),
        ({1: 1.0}, "shape"),
        ({4: [1.0, float("nan")]}, "layer 4"),
        ({4: [float("inf")]}, "layer 4"),
        ({4: [-float("inf")]}, "layer 4"),
        ({4: np.array([1e39])}, "layer 4"),
        ({1.5: [1.0]}, "layer"),
        ({"1": [1.0]}, "layer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_invalid_direction_raises_with_its_layer(directions, words):
    with np.errstate(all="ignore"), pytest.raises(SteeringError, match=words):
        SteeringVector(directions)


@pytest.mark.parametrize("site", ["ffn", "", "Residual", None, 0])
def test_unknown_site_raises(site):
    with pytest.raises(SteeringError, match="residual, attention"):
        SteeringVector({1: [1.0]}, site=site)


def test_layer_without_a_direction_raises_key_error():
    vector = SteeringVector({1: [1.0], 3: [2.0]})
    for layer in (0, 2, 4, -1):
        with pytest.raises(KeyError):
            vector.direction(layer)


def test_values_are_a_read_only_copy():
    source = np.ones(3, np.float32)
    vector = SteeringVector({1: source})
    source[0] = 9
    assert vector.direction(1).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        vector.matrix[0, 0] = 2
    with pytest.raises(ValueError, match="read-only"):
        vector.direction(1)[0] = 2
    with pytest.raises(AttributeError):
        vector.site = "attention"


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_copies_are_equal_and_immutable(duplicate):
    vector = SteeringVector({1: [1.0, 2.0]}, site="attention")
    again = duplicate(vector)
    assert again == vector
    assert again.digest == vector.digest
    assert not again.matrix.flags.writeable


@given(vectors, vectors)
def test_equality_compares_site_layers_and_values(a, b):
    same = (a.site, a.layers) == (b.site, b.layers) and a.matrix.tolist() == b.matrix.tolist()
    assert (a == b) is same
    assert (a.digest == b.digest) is same


@pytest.mark.parametrize(
    "other",
    [
        SteeringVector({1: [1.0, 2.0], 3: [3.0, 4.0]}),  # another layer
        SteeringVector({1: [1.0, 2.0], 2: [3.0, 4.5]}),  # another value
        SteeringVector({1: [1.0, 2.0], 2: [3.0, 4.0]}, site="attention"),
        SteeringVector({1: [1.0, 2.0]}),
        SteeringVector({1: [1.0, 2.0, 3.0, 4.0]}),
    ],
)
def test_any_difference_makes_vectors_and_digests_unequal(other):
    vector = SteeringVector({1: [1.0, 2.0], 2: [3.0, 4.0]})
    assert vector != other
    assert vector.digest != other.digest


def test_hash_ignores_the_sign_of_zero():
    vector = SteeringVector({1: [1.0, -1.0]})
    a, b = vector - vector, 0 * vector
    assert a == b
    assert a.digest == b.digest
    assert len({a, b}) == 1


def test_digest_is_the_same_in_any_process():
    code = "from pysteer import SteeringVector as V; print(V({1: [1.5, 2], 3: [4, 5]}).digest)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == SteeringVector({1: [1.5, 2], 3: [4, 5]}).digest


@pytest.mark.parametrize("layers", [[1], [1, 2, 3, 4, 5, 6]])
def test_repr_is_short(layers):
    text = repr(SteeringVector({layer: [1.0, 2.0] for layer in layers}))
    assert "residual" in text
    assert "n_embd=2" in text
    assert ("..." in text) is (len(layers) > 4)


# ---- arrays of other packages ------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int32"])
@pytest.mark.parametrize("gradient", [False, True])
def test_tensor_of_torch_is_taken_exactly(dtype, gradient):
    torch = pytest.importorskip("torch")
    if gradient and dtype == "int32":
        return
    tensor = torch.tensor([1.5, -3.0, 2.0**-9, 256.0, 7.0], dtype=getattr(torch, dtype))
    tensor.requires_grad_(gradient)
    expected = [float(number) for number in tensor.detach().to(torch.float64)]
    assert SteeringVector({3: tensor}).direction(3).tolist() == expected
    assert tensor.requires_grad == gradient
    with pytest.raises(SteeringError, match="NaN"):
        SteeringVector({3: torch.full((5,), float("nan"), dtype=torch.bfloat16)})


def test_bfloat16_of_ml_dtypes_is_taken_exactly():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    row = np.array([1.5, -3.0, 2.0**-9, 256.0, 7.0]).astype(ml_dtypes.bfloat16)
    assert SteeringVector({3: row}).direction(3).tolist() == [1.5, -3.0, 2.0**-9, 256.0, 7.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (np.array([1 + 2j, 0]), "complex128"),
        (np.array(["1", "2"]), "<U1"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
        (np.zeros(2, [("a", "f4")]), "not of real numbers"),
        ([1 + 2j], "complex128"),
        ([[1, 2], [3]], "not an array of numbers"),
        (object(), "not an array of numbers"),
    ],
)
def test_array_of_other_values_raises_with_its_type(row, words):
    with pytest.raises(SteeringError, match=words):
        SteeringVector({3: row})
