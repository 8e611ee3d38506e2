"""The rotary kernels on the emulator, beyond the table of cases: 16 bytes at a time and single features, heads that
do not fill a thread's share, rows within wider ones, far positions, in place."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.rope import RopeTable, rope_backward, rope_cos_sin, rope_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

BOTH_PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
ALL_DTYPES = pytest.mark.parametrize("dtype", list(checks.DTYPES))


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def normal(*shape, dtype="float32"):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(checks.DTYPES[dtype])


def placed(array, offset=0, gap=0):
    """The array, begun `offset` elements behind a multiple of 16 bytes, with a gap after each row, and the memory
    around it, which is NaN."""
    rows, width = len(array), int(np.prod(array.shape[1:]))
    store = np.full(rows * (width + gap) + 32, np.nan, array.dtype)
    start = -store.ctypes.data % 16 // array.itemsize + offset
    view = store[start : start + rows * (width + gap)].reshape(rows, width + gap)[:, :width]
    view = np.lib.stride_tricks.as_strided(view, array.shape, (view.strides[0], *array.strides[1:]))
    view[...] = array
    return view, store


def exact(x, table, interleaved, backwards=False):
    """The rotation as a product of complex numbers in float64."""
    wide, half = x.astype(np.float64), table.cos.shape[1]
    step, start = (2, 1) if interleaved else (1, half)
    first, second = slice(0, half * step, step), slice(start, start + half * step, step)
    turn = table.cos.astype(np.float64) + (-1j if backwards else 1j) * table.sin
    turned = (wide[..., first] + 1j * wide[..., second]) * turn[:, None]
    wide[..., first], wide[..., second] = turned.real, turned.imag
    return wide


# Heads and features of which a thread's share is whole, or ends early; table features; offset and gap in elements.
@pytest.mark.parametrize(
    ("shape", "dim", "offset", "gap"),
    [
        pytest.param((6, 8, 32), 32, 0, 0, id="aligned"),
        pytest.param((6, 8, 32), 32, 0, 16, id="aligned, a gap"),
        pytest.param((6, 8, 32), 32, 1, 0, id="begins between"),
        pytest.param((6, 8, 32), 32, 0, 3, id="a gap of 3"),
        pytest.param((3, 17, 48), 16, 0, 16, id="17 heads, a third turns"),
        pytest.param((3, 5, 40), 24, 1, 5, id="5 heads, half a head of 12"),
        pytest.param((2, 37, 128), 128, 0, 0, id="several blocks for a row"),
        pytest.param((2, 17, 86), 86, 0, 0, id="several blocks for a row, the last not full"),
        pytest.param((130, 1, 8), 2, 0, 0, id="many rows, one pair"),
    ],
)
@BOTH_PAIRINGS
@ALL_DTYPES
def test_sizes_and_alignments(shape, dim, offset, gap, dtype, interleaved, on_emulator):
    values = normal(*shape, dtype=dtype)
    table = rope_cos_sin(np.arange(shape[0]) * 7919, dim)
    x, around = placed(values, offset, gap)
    out, around_out = placed(np.zeros_like(values), offset, gap)
    before = np.count_nonzero(np.isnan(around_out))
    y, saved = rope_forward(x, table, interleaved=interleaved, out=out)
    assert y is out
    assert np.count_nonzero(np.isnan(around_out)) == before, "written beside the rows, or NaN in them"
    allowed = {"float32": 5e-7, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    np.testing.assert_allclose(y.astype(np.float64), exact(values, table, interleaved), rtol=allowed, atol=5e-7)
    np.testing.assert_array_equal(y[..., dim:], values[..., dim:])
    dx = rope_backward(x, saved)
    np.testing.assert_allclose(dx.astype(np.float64), exact(values, table, interleaved, True), rtol=allowed, atol=5e-7)
    # In place the same bits come out, and nothing else changes.
    before = around.copy()
    assert rope_forward(x, table, interleaved=interleaved, out=x)[0] is x
    np.testing.assert_array_equal(x, y)
    x[...] = values
    np.testing.assert_array_equal(around.view(np.uint8), before.view(np.uint8))
    rope_backward(x, saved, dx=x)
    np.testing.assert_array_equal(x, dx)


@BOTH_PAIRINGS
def test_far_positions_keep_their_angle(interleaved, on_emulator):
    positions = np.array([0, 1, 999_999, 1_000_000, 123_456_789])
    # A pair (1, 0) turns into its angle's cosine and sine.
    x = np.zeros((5, 2, 64), np.float32)
    cosine, sine = (slice(0, 64, 2), slice(1, 64, 2)) if interleaved else (slice(32), slice(32, 64))
    x[..., cosine] = 1
    y, saved = rope_forward(x, rope_cos_sin(positions, 64), interleaved=interleaved)
    frequencies = np.longdouble(10000) ** (-np.arange(32, dtype=np.longdouble) / 32)
    angles = positions.astype(np.longdouble)[:, None] * frequencies
    for head in range(2):
        np.testing.assert_allclose(y[:, head, cosine], np.cos(angles).astype(np.float64), rtol=0, atol=1e-7)
        np.testing.assert_allclose(y[:, head, sine], np.sin(angles).astype(np.float64), rtol=0, atol=1e-7)
    np.testing.assert_allclose(rope_backward(y, saved), x, rtol=0, atol=3e-7)


@BOTH_PAIRINGS
@ALL_DTYPES
def test_queries_and_keys_of_a_fused_array_in_place(dtype, interleaved, on_emulator):
    fused = normal(20, 6, 32, dtype=dtype)
    before, table = fused.copy(), rope_cos_sin(np.arange(20), 32)
    turned = fused[:, :4]
    rope_forward(turned, table, interleaved=interleaved, out=turned)
    np.testing.assert_array_equal(fused[:, 4:], before[:, 4:])
    want = rope_forward(np.ascontiguousarray(before[:, :4]), table, interleaved=interleaved)[0]
    np.testing.assert_array_equal(turned, want)


@BOTH_PAIRINGS
def test_tables_of_float64_strided_or_shared(interleaved, on_emulator):
    x, table = normal(3, 20, 2, 8), rope_cos_sin(np.arange(20), 8)
    want = rope_forward(x.reshape(60, 2, 8), rope_cos_sin(np.tile(np.arange(20), 3), 8), interleaved=interleaved)[0]
    wide = rope_cos_sin(np.arange(20), 8, dtype=np.float64)
    strided = RopeTable(np.repeat(table.cos, 2, axis=1)[:, ::2], np.asfortranarray(table.sin))
    for same in (table, wide, strided):
        y = rope_forward(x, same, interleaved=interleaved)[0]
        np.testing.assert_array_equal(y.reshape(60, 2, 8), want)


def test_infinities_and_nan_stay_in_their_pair(on_emulator):
    x = normal(4, 2, 32)
    x[1, 0, 3], x[2, 1, 20] = np.inf, np.nan
    y = rope_forward(x, rope_cos_sin(np.arange(4) + 1, 32))[0]
    bad = np.argwhere(~np.isfinite(y)).tolist()
    assert bad == [[1, 0, 3], [1, 0, 19], [2, 1, 4], [2, 1, 20]]
