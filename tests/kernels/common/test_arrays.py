"""Checks of arguments, which must name what is wrong, and the views that kernels work on."""

import types

import numpy as np
import pytest

from ttr_kernels.adamw import adamw
from ttr_kernels.common import arrays
from ttr_kernels.common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INTEGERS,
    check,
    check_out,
    check_parameter,
    check_parameter_gradient,
    check_same_dtype,
    contiguous_rows,
    flat_rows,
    implementation,
    kernel_view,
    result_rows,
)
from ttr_kernels.embedding import embedding
from ttr_kernels.matmul import linear, matmul
from ttr_kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def test_sizes_of_named_dimensions():
    sizes = check(x=(zeros(2, 3, 4), "B T C"), w=(zeros(4), "C"), nothing=(None, "C"), n=(zeros(7, 2), "N 2"))
    assert sizes == {"B": 2, "T": 3, "C": 4, "N": 7}
    assert check(x=(zeros(5, 6, 7, 4), "... C"), y=(zeros(4), "... C")) == {"C": 4}
    assert check(x=(zeros(5, 6), "...")) == {}
    assert check(x=(zeros(), "...")) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (zeros(2, 3), "B T C")}, r"x: got shape \(2, 3\), expected \(B, T, C\)$"),
        ({"x": (zeros(2, 3), "C"), "w": (zeros(3), "C")}, r"x: got shape \(2, 3\), expected \(C\)"),
        ({"x": (zeros(2, 3), "B C"), "w": (zeros(4), "C")}, r"w: got shape \(4,\), expected \(C\) with C=3"),
        ({"x": (zeros(2, 2), "N N"), "w": (zeros(2, 3), "N N")}, r"w: got shape \(2, 3\), expected \(N, N\) with N=2"),
        ({"x": (zeros(2, 3), "B 2")}, r"x: got shape \(2, 3\), expected \(B, 2\)"),
        ({"x": (zeros(), "... C")}, r"x: got shape \(\), expected \(..., C\)"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(**arguments)


def foreign(module, name):
    """An object of a class that says it comes from another library."""
    return types.new_class(name, exec_body=lambda body: body.update(__module__=module))()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"x: got list, expected numpy.ndarray \(convert with numpy.asarray\)"),
        (1.0, "x: got float, expected numpy.ndarray"),
        (np.float32(1), "x: got numpy.float32, expected numpy.ndarray"),
        (foreign("torch", "Tensor"), r"x: got torch.Tensor, expected numpy.ndarray \(convert with numpy.asarray\)"),
        (foreign("pandas.core.frame", "DataFrame"), r"x: got pandas.core.frame.DataFrame, expected numpy.ndarray"),
        (np.zeros(3, int), "x: got dtype int64, expected float32 or bfloat16 or float16 or float64"),
        (np.zeros(3, ">f4"), "x: got dtype >f4, expected float32"),
        (np.zeros(3, complex), "x: got dtype complex128, expected float32"),
        (np.array([None]), "x: got dtype object, expected float32"),
    ],
)
def test_kinds_and_dtypes_that_do_not_fit(value, message):
    with pytest.raises(TypeError, match=message):
        check(x=(value, "C"))
    with pytest.raises(TypeError, match=message):
        rms_norm(value, np.ones(3, np.float32))


def test_a_list_of_allowed_dtypes():
    check(ids=(zeros(3, dtype=np.int32), "N", INTEGERS))
    with pytest.raises(TypeError, match="ids: got dtype uint8, expected int32 or int64"):
        check(ids=(zeros(3, dtype=np.uint8), "N", INTEGERS))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT64], ids=str)
def test_mixed_dtypes_are_refused_by_name(dtype):
    with pytest.raises(TypeError, match=f"b: got dtype {dtype}, expected float32 like a"):
        check_same_dtype(a=zeros(2), nothing=None, b=zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match=f"b: got dtype {dtype}, expected float32 like a"):
        matmul(zeros(2, 2), zeros(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match=f"residual: got dtype {dtype}, expected float32 like x"):
        rms_norm_forward(zeros(2, 2), zeros(2), residual=zeros(2, 2, dtype=dtype))


def test_parameters_are_float32_or_like_the_activations():
    for dtype in (FLOAT32, BFLOAT16):
        check_parameter("w", zeros(2, dtype=dtype), BFLOAT16)
    for parameter, activations, expected in (
        (FLOAT16, BFLOAT16, "float32 or bfloat16"),
        (BFLOAT16, FLOAT32, "float32"),
        (FLOAT64, FLOAT32, "float32"),
        (FLOAT32, FLOAT64, "float64"),
    ):
        with pytest.raises(TypeError, match=f"w: got dtype {parameter}, expected {expected}$"):
            check_parameter("w", zeros(2, dtype=parameter), activations)
    with pytest.raises(TypeError, match="weight: got dtype float16, expected float32 or bfloat16"):
        linear(zeros(2, 2, dtype=BFLOAT16), zeros(2, 2, dtype=FLOAT16))


def test_gradients_of_parameters_are_float32():
    assert check_parameter_gradient("dw", None, (3,), BFLOAT16).dtype == FLOAT32
    assert check_parameter_gradient("dw", None, (3,), FLOAT64).dtype == FLOAT64
    with pytest.raises(ValueError, match=r"dw: got shape \(3,\) of bfloat16, expected \(3,\) of float32"):
        check_parameter_gradient("dw", zeros(3, dtype=BFLOAT16), (3,), BFLOAT16)


def test_results():
    assert check_out("out", None, (2, 3), BFLOAT16).dtype == BFLOAT16
    given = zeros(2, 3)
    assert check_out("out", given, (2, 3), FLOAT32) is given
    with pytest.raises(ValueError, match=r"out: got shape \(2, 3\) of float32, expected \(2, 4\) of float32"):
        check_out("out", given, (2, 4), FLOAT32)
    with pytest.raises(TypeError, match=r"out: got list, expected numpy.ndarray"):
        check_out("out", [1.0], (1,), FLOAT32)


def test_results_that_cannot_be_written_are_named():
    x, w = np.ones((4, 8), np.float32), np.ones(8, np.float32)
    frozen = np.ones((4, 8), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out: got a read-only array"):
        rms_norm(x, w, out=frozen)
    with pytest.raises(ValueError, match="second_moment: got a read-only array"):
        adamw(x, x, x.copy(), frozen, learning_rate=0.1, step=1)
    with pytest.raises(ValueError, match=r"out: got shape \(4, 8\) with strides \(64, 8\), expected contiguous"):
        rms_norm(x, w, out=zeros(4, 16)[:, ::2])
    with pytest.raises(ValueError, match=r"dx: got shape \(4, 8\) with strides \(4, 16\), expected contiguous"):
        rms_norm_backward(x, rms_norm_forward(x, w)[1], dx=zeros(8, 4).T)


def test_read_only_inputs_are_read():
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    table.flags.writeable = False
    np.testing.assert_array_equal(embedding(np.array([3, 0], np.int32), table), table[[3, 0]])
    np.testing.assert_array_equal(embedding(np.array([2], np.int32), np.broadcast_to(table[:1], (4, 3))), table[:1])


def rows_through_view(array, inner=1):
    flat, rows, stride = flat_rows(array, inner)
    width = int(np.prod(array.shape[array.ndim - inner :]))
    assert np.shares_memory(flat, array) or array.size == 0
    return np.array([flat[i * stride : i * stride + width] for i in range(rows)]).reshape(rows, width)


COUNTED = np.arange(2 * 6 * 4 * 5, dtype=np.float32).reshape(2, 6, 4, 5)


@pytest.mark.parametrize(
    ("array", "inner"),
    [
        pytest.param(COUNTED, 1, id="contiguous"),
        pytest.param(COUNTED, 2, id="contiguous, two inner dimensions"),
        pytest.param(COUNTED[:, :, 1:3], 2, id="part of a fused array"),
        pytest.param(COUNTED[..., 1:4], 1, id="some columns"),
        pytest.param(COUNTED[:1, 2:3], 2, id="one row"),
        pytest.param(COUNTED[:, ::3], 2, id="every third row"),
        pytest.param(COUNTED[:, :1], 2, id="lead of size one"),
        pytest.param(COUNTED[..., :1], 1, id="one column"),
        pytest.param(COUNTED[0, 0, 0], 1, id="a vector"),
        pytest.param(COUNTED[:, :, :, 2:2], 1, id="no columns"),
        pytest.param(COUNTED[:, 3:3], 2, id="no rows"),
        pytest.param(COUNTED.transpose(1, 0, 2, 3)[:1], 2, id="a transposed lead of size one"),
    ],
)
def test_views_as_rows(array, inner):
    want = array.reshape(int(np.prod(array.shape[: array.ndim - inner])), -1) if array.size else None
    got = rows_through_view(array, inner)
    assert got.size == 0 if want is None else np.array_equal(got, want)


@pytest.mark.parametrize(
    ("array", "inner"),
    [
        pytest.param(COUNTED[..., ::2], 1, id="strided columns"),
        pytest.param(COUNTED[..., ::-1], 1, id="columns backwards"),
        pytest.param(COUNTED[..., :3], 2, id="gaps within a row"),
        pytest.param(COUNTED[:, :3], 2, id="unevenly spaced rows"),
        pytest.param(COUNTED.transpose(1, 0, 2, 3), 2, id="transposed lead"),
        pytest.param(COUNTED[0, ::-1], 2, id="rows backwards"),
        pytest.param(np.broadcast_to(COUNTED[0, 0, 0], (3, 5)), 1, id="one row repeated"),
        pytest.param(np.lib.stride_tricks.sliding_window_view(COUNTED.reshape(-1), 5), 1, id="overlapping rows"),
    ],
)
def test_layouts_without_such_a_view(array, inner):
    with pytest.raises(ValueError, match=r"contiguous|rows"):
        flat_rows(array, inner)
    with pytest.raises(ValueError, match=r"dx: got shape .* with strides .*, expected contiguous, evenly spaced rows"):
        result_rows("dx", array, inner)
    flat, rows, stride = contiguous_rows(array, inner)
    assert not np.shares_memory(flat, array)
    np.testing.assert_array_equal(flat.reshape(rows, stride), array.reshape(rows, stride))


def test_kernels_see_16_bit_floats_as_integers():
    assert kernel_view(zeros(3, dtype=BFLOAT16)).dtype == np.uint16
    assert kernel_view(zeros(3, dtype=FLOAT16)).dtype == np.int16
    assert flat_rows(zeros(3, dtype=BFLOAT16))[0].dtype == np.uint16
    x = zeros(3)
    assert np.shares_memory(kernel_view(x), x)


def test_the_dtype_chooses_the_implementation():
    for dtype, module in ((FLOAT32, "cpu"), (BFLOAT16, "cpu"), (FLOAT16, "cpu"), (FLOAT64, "reference")):
        assert implementation(zeros(1, dtype=dtype), "ttr_kernels.rope").__name__ == f"ttr_kernels.rope.{module}"


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64, np.dtype(np.int32)])
@pytest.mark.parametrize("size", [3, (1 << 20) + 5])
def test_zeros_of_any_size(size, dtype):
    # Memory that was used before.
    for _ in range(3):
        arrays.empty(size, dtype).fill(7)
        assert not arrays.zeros(size, dtype).any()
