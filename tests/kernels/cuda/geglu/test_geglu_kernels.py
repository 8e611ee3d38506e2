"""The GeGLU kernels on the emulator, beyond the table of cases: 16 bytes at a time and single elements, rows of several
blocks, gradients of a bias from several blocks, tails, in place."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.geglu import geglu, geglu_backward, geglu_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

BOTH_FORMULAS = pytest.mark.parametrize("approximate", ["tanh", "none"])
ALL_DTYPES = pytest.mark.parametrize("dtype", list(checks.DTYPES))
# What the formula and its products lose, as a share of the largest value, and what a 16-bit result's rounding adds.
ALLOWED = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(checks.DTYPES[dtype])


def placed(array, offset=0, gap=0):
    """The array, begun `offset` elements behind a multiple of 16 bytes, with a gap after each row, and the memory
    around it, which is NaN."""
    rows, width = array.shape
    store = np.full(rows * (width + gap) + 32, np.nan, array.dtype)
    start = -store.ctypes.data % 16 // array.itemsize + offset
    view = store[start : start + rows * (width + gap)].reshape(rows, width + gap)[:, :width]
    view[...] = array
    return view, store


def exactly(x, bias, dy, approximate):
    """(y, dx, dbias) of the reference."""
    wide = [None if a is None else a.astype(np.float64) for a in (x, bias, dy)]
    y, saved = geglu_forward(wide[0], wide[1], approximate=approximate)
    return y, *geglu_backward(wide[2], saved)


@pytest.mark.parametrize(
    ("shape", "offset", "gap"),
    [
        pytest.param((5, 64), 0, 0, id="aligned"),
        pytest.param((5, 64), 0, 8, id="aligned, a gap"),
        pytest.param((5, 64), 1, 0, id="begins between"),
        pytest.param((5, 64), 0, 3, id="a gap of 3"),
        pytest.param((70, 34), 0, 0, id="odd widths"),
        pytest.param((18, 530), 1, 1, id="several blocks of single elements"),
        pytest.param((700, 16), 0, 0, id="several rows of blocks"),
    ],
)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@BOTH_FORMULAS
@ALL_DTYPES
def test_sizes_and_alignments(shape, offset, gap, dtype, biased, approximate, on_emulator):
    width = shape[1] // 2
    values, g = normal(*shape, dtype=dtype), normal(shape[0], width, dtype=dtype, seed=1)
    bias = normal(shape[1], seed=2) if biased else None
    (x, around), (dy, _), (out, around_out) = (placed(a, offset, gap) for a in (values, g, np.zeros_like(g)))
    nan_in, nan_out = np.isnan(around).sum(), np.isnan(around_out).sum()
    want, want_dx, want_dbias = exactly(values, bias, g, approximate)
    y, saved = geglu_forward(x, bias, approximate=approximate, out=out)
    assert y is out
    checks.assert_close("y", y, want, ALLOWED[dtype])
    dx, around_dx = placed(np.zeros_like(values), offset, gap)
    got, dbias = geglu_backward(dy, saved, dx=dx)
    assert got is dx
    checks.assert_close("dx", dx, want_dx, ALLOWED[dtype])
    if biased:
        # Sums are of float32, whatever the activations are rounded to.
        checks.assert_close("dbias", dbias, want_dbias, 3e-6)
        # They are added to what is there, in the same order each time.
        given = np.full((shape[1], 2), 3.0, np.float32)
        geglu_backward(dy, saved, dbias=given[:, 0])
        np.testing.assert_array_equal(given[:, 0], np.float32(3) + dbias)
        np.testing.assert_array_equal(given[:, 1], 3)
    # Over its own input the same bits come out.
    assert geglu_backward(dy, saved, dx=x)[0] is x
    np.testing.assert_array_equal(x, dx)
    # No NaN has come into the rows, and none beside them is overwritten.
    assert [np.isnan(a).sum() for a in (around, around_dx, around_out)] == [nan_in, nan_in, nan_out]


def test_several_blocks_of_16_bytes_for_a_row(on_emulator):
    x, dy = normal(3, 2064), normal(3, 1032, seed=1)
    want, want_dx, _ = exactly(x, None, dy, "tanh")
    y, saved = geglu_forward(x)
    checks.assert_close("y", y, want, ALLOWED["float32"])
    checks.assert_close("dx", geglu_backward(dy, saved)[0], want_dx, ALLOWED["float32"])


@ALL_DTYPES
def test_a_result_that_is_part_of_its_input(dtype, on_emulator):
    x = normal(9, 64, dtype=dtype)
    want, values = geglu(x), x[:, 32:].copy()
    geglu(x, out=x[:, :32])
    np.testing.assert_array_equal(x[:, :32], want)
    np.testing.assert_array_equal(x[:, 32:], values)


@BOTH_FORMULAS
def test_a_bias_of_the_activations_dtype(approximate, on_emulator):
    x, bias = normal(8, 32, dtype="bfloat16"), normal(32, dtype="bfloat16", seed=1)
    y, saved = geglu_forward(x, bias, approximate=approximate)
    np.testing.assert_array_equal(y, geglu(x, bias.astype(np.float32), approximate=approximate))
    dbias = geglu_backward(y, saved)[1]
    assert dbias.dtype == np.float32
    checks.assert_close("dbias", dbias, exactly(x, bias, y, approximate)[2], 3e-6)


@BOTH_FORMULAS
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_tails(biased, approximate, on_emulator):
    gate = np.array([-1e30, -100, -20, -0.0, 0.0, 20, 100, 1e30], np.float32)
    x = np.concatenate([gate, np.ones(8, np.float32)])[None]
    y, saved = geglu_forward(x, np.zeros(16, np.float32) if biased else None, approximate=approximate)
    np.testing.assert_array_equal(y[0], np.array([0, 0, 0, 0, 0, 20, 100, 1e30], np.float32))
    dx, dbias = geglu_backward(np.ones((1, 8), np.float32), saved)
    np.testing.assert_array_equal(dx[0, [0, 1, 2, 5, 6, 7]], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dx[0, 3:5], 0.5)
    np.testing.assert_array_equal(dx[0, 8:], y[0])
    if biased:
        np.testing.assert_array_equal(dbias, dx[0])


@BOTH_FORMULAS
def test_every_gate_that_matters(approximate, on_emulator):
    """Relative to the output where it is large, absolutely where the gate closes."""
    gate = np.linspace(-12, 12, 2400, dtype=np.float32)
    x = np.concatenate([gate, np.ones(2400, np.float32)])[None]
    dy = np.ones((1, 2400), np.float32)
    want, want_dx, _ = exactly(x, None, dy, approximate)
    y, saved = geglu_forward(x, approximate=approximate)
    np.testing.assert_allclose(y, want, rtol=3e-7, atol=3e-7)
    np.testing.assert_allclose(geglu_backward(dy, saved)[0], want_dx, rtol=4e-7, atol=4e-7)


@BOTH_FORMULAS
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_nan_is_not_hidden(dtype, approximate, on_emulator):
    x = normal(2, 64).astype(dtype)
    x[0, 3], x[1, 40] = np.nan, np.nan
    y, saved = geglu_forward(x, approximate=approximate)
    assert np.argwhere(np.isnan(y.astype(np.float32))).tolist() == [[0, 3], [1, 8]]
    dx, _ = geglu_backward(np.ones((2, 32), dtype), saved)
    assert np.argwhere(np.isnan(dx.astype(np.float32))).tolist() == [[0, 3], [0, 35], [1, 8]]


@BOTH_FORMULAS
def test_inputs_whose_rows_are_not_evenly_spaced(approximate, on_emulator):
    x, dy = normal(3, 4, 64), normal(3, 4, 32, seed=1)
    apart = np.full((3, 5, 64), np.nan, np.float32)[:, :4]
    apart[...] = x
    y, saved = geglu_forward(apart, approximate=approximate)
    want, saved_packed = geglu_forward(x, approximate=approximate)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(geglu_backward(dy, saved)[0], geglu_backward(dy, saved_packed)[0])
