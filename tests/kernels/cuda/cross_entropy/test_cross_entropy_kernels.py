"""The cross-entropy kernels on the emulator, beyond the table of cases: vocabularies of several tiles, rows that begin
anywhere, gradients in place, wrong and ignored targets, numbers that stay on the device."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT64
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    gpu,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": -1}


@pytest.fixture
def on_emulator():
    with use_executor(emulator.EmulatorExecutor("check", 2)), emulator.poisoned_empty():
        yield


def logits_at(rng, rows, width, dtype, gap=0, offset=0, scale=1.0):
    """Rows with a gap of NaN after each, the first `offset` elements after a multiple of 64 bytes."""
    memory = np.full(rows * (width + gap) + 128, np.nan, dtype)
    begin = -memory.ctypes.data % 64 // memory.itemsize + offset
    logits = memory[begin : begin + rows * (width + gap)].reshape(rows, width + gap)[:, :width]
    logits[...] = scale * rng.standard_normal((rows, width))
    return logits


def some_targets(rng, rows, width, dtype=np.int32):
    targets = rng.integers(0, width, rows).astype(dtype)
    targets[1::3] = -1
    return targets


def exact(logits, targets, dloss=1.0, **options):
    """Loss, losses and gradient in float64."""
    loss, saved = cross_entropy_forward(logits.astype(FLOAT64), targets, **options)
    losses = saved.losses.copy()
    return loss, losses, cross_entropy_backward(dloss, saved)


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize(("rows", "width"), [(3, 50257), (2, 9001)])
def test_vocabularies_of_several_tiles(rows, width, dtype, on_emulator):
    dtype, rng = checks.DTYPES[dtype], np.random.default_rng(1)
    logits = logits_at(rng, rows, width, dtype, offset=1, scale=3.0)
    targets = some_targets(rng, rows, width)
    targets[0] = width - 1
    want, want_losses, want_gradient = exact(logits, targets, 2.0, **OPTIONS)
    loss, saved = cross_entropy_forward(logits, targets, **OPTIONS)
    checks.assert_close("loss", loss, want, 2e-6)
    checks.assert_close("losses", saved.losses, want_losses, 2e-6)
    gradient = cross_entropy_backward(2.0, saved)
    checks.assert_close("gradient", gradient, want_gradient, checks.ERROR[dtype])
    in_place = cross_entropy_backward(2.0, saved, dlogits=logits)
    assert in_place is logits
    np.testing.assert_array_equal(in_place, gradient)


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize(("width", "gap", "offset"), [(40, 8, 0), (40, 3, 5), (65, 0, 1), (600, 1, 7), (9000, 0, 3)])
def test_losses_and_gradient_in_place_wherever_rows_begin(width, gap, offset, dtype, on_emulator):
    dtype, rng = checks.DTYPES[dtype], np.random.default_rng(2)
    logits = logits_at(rng, 6, width, dtype, gap, offset)
    logits[:, [width // 3, width // 2]] = 9.0  # a tie
    if width > 8192:
        logits[3, [20, 20 + 8192]] = 9.0  # a tie between two tiles of one thread
        logits[3, [width // 3, width // 2]] = 0.0
    logits[4, 0] = 10.0
    logits[5, -1] = 10.0
    targets = some_targets(rng, 6, width)
    _, want_losses, want_gradient = exact(logits, targets, **OPTIONS)
    _, saved = cross_entropy_forward(logits, targets, **OPTIONS)
    losses, best = np.empty(6, np.float32), np.empty(6, np.int32)
    expected_best = logits.astype(np.float64).argmax(axis=1)
    before = logits.copy()
    for gradient in (False, True):
        assert np.array_equal(logits, before)
        gpu.losses_and_gradient(logits, targets, saved.smoothing, saved.count, losses, best, gradient)
        np.testing.assert_array_equal(best, expected_best)
        checks.assert_close("losses", losses, want_losses, 2e-6)
    checks.assert_close("gradient", logits, want_gradient, checks.ERROR[dtype])
    if gap:
        assert np.isnan(np.lib.stride_tricks.as_strided(logits, (6, width + gap))[:, width:]).all()


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
def test_the_first_of_equal_logits_where_one_thread_has_both(dtype, on_emulator):
    """In a vector, and before the first or behind the last one."""
    dtype, width = checks.DTYPES[dtype], 98
    vector = 16 // dtype.itemsize
    logits = logits_at(np.random.default_rng(11), 1, width, dtype, offset=1)
    begin = -logits.ctypes.data % 16 // dtype.itemsize
    behind = begin + (width - begin) // vector * vector
    assert 0 < begin < behind < width
    targets, losses, best = np.zeros(1, np.int32), np.empty(1, np.float32), np.empty(1, np.int32)
    _, saved = cross_entropy_forward(logits, targets)
    for equal in ([0, begin], [begin + vector * vector, behind]):
        logits[0] = 1.0
        logits[0, equal] = 9.0
        gpu.losses_and_gradient(logits, targets, saved.smoothing, saved.count, losses, best, False)
        assert best[0] == equal[0]


@pytest.mark.parametrize("offset", [0, 3])
def test_gradient_elsewhere(offset, on_emulator):
    rng = np.random.default_rng(3)
    logits = logits_at(rng, 5, 45, BFLOAT16, gap=4, offset=1)
    targets = some_targets(rng, 5, 45)
    dlogits = logits_at(rng, 5, 45, BFLOAT16, gap=3, offset=offset)
    _, saved = cross_entropy_forward(logits, targets)
    assert cross_entropy_backward(1.0, saved, dlogits=dlogits) is dlogits
    checks.assert_close("gradient", dlogits, exact(logits, targets)[2], checks.ERROR[np.dtype(BFLOAT16)])


def test_a_gradient_on_the_device_gives_the_bits_of_a_number(on_emulator):
    rng = np.random.default_rng(4)
    logits = logits_at(rng, 5, 45, np.float32)
    _, saved = cross_entropy_forward(logits, some_targets(rng, 5, 45))
    assert type(saved.count) is np.ndarray
    assert saved.count.dtype == np.int32
    want = cross_entropy_backward(0.3, saved)
    for dloss in (np.array(0.3, np.float32), np.array([0.3], np.float32), np.array(0.3)):
        np.testing.assert_array_equal(cross_entropy_backward(dloss, saved), want)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_targets_of_any_stride(dtype, on_emulator):
    rng = np.random.default_rng(5)
    logits = logits_at(rng, 9, 45, np.float32)
    targets = some_targets(rng, 9, 45, dtype)
    wide = np.zeros((9, 3), dtype)
    wide[::-1, 1] = targets
    loss, saved = cross_entropy_forward(logits, wide[::-1, 1])
    want, _, want_gradient = exact(logits, targets)
    checks.assert_close("loss", loss, want, 2e-6)
    checks.assert_close("gradient", cross_entropy_backward(1.0, saved), want_gradient, 2e-6)


@pytest.mark.parametrize("width", [20, 700])
@pytest.mark.parametrize("wrong", [-2, None, np.iinfo(np.int32).max])
def test_a_wrong_target_makes_loss_and_its_row_nan(wrong, width, on_emulator):
    rng = np.random.default_rng(6)
    logits = logits_at(rng, 4, width, np.float32)
    targets = np.array([3, width if wrong is None else wrong, 5, -1], np.int32)
    loss, saved = cross_entropy_forward(logits, targets)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(saved.losses), [False, True, False, False])
    gradient = cross_entropy_backward(1.0, saved)
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=1), [False, True, False, False])
    assert np.isnan(gradient[1]).all()


@pytest.mark.parametrize("width", [20, 9000])
def test_all_ignored(width, on_emulator):
    logits = np.full((3, width), np.nan, np.float32)
    logits[1] = 1e30
    targets = np.full(3, 7, np.int64)
    loss, saved = cross_entropy_forward(logits, targets, ignore_index=7, label_smoothing=0.1, z_loss=0.1)
    assert loss == 0
    assert (saved.losses == 0).all()
    assert (cross_entropy_backward(1.0, saved) == 0).all()
    losses, best = np.empty(3, np.float32), np.empty(3, np.int32)
    gpu.losses_and_gradient(logits, targets, saved.smoothing, saved.count, losses, best, True)
    assert (logits == 0).all()
    assert (losses == 0).all()
    assert ((best >= 0) & (best < width)).all()


@pytest.mark.parametrize("width", [33, 9000])
def test_excluded_classes_and_huge_logits(width, on_emulator):
    rng = np.random.default_rng(7)
    logits = logits_at(rng, 4, width, np.float32, scale=1e4)
    logits[0, : width - 1] = -np.inf
    logits[1, ::2] = -np.inf
    logits[2] += 3e4
    logits[3, : width - 5] = np.finfo(np.float32).min
    targets = np.array([width - 1, 1, 2, width - 2], np.int32)
    loss, saved = cross_entropy_forward(logits, targets)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1)
    want = np.log(total) - shifted[np.arange(4), targets]
    np.testing.assert_allclose(saved.losses, want, rtol=1e-6)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-6)
    probabilities = np.exp(shifted) / total[:, None]
    probabilities[np.arange(4), targets] -= 1
    np.testing.assert_allclose(cross_entropy_backward(4.0, saved), probabilities, atol=2e-6)


@pytest.mark.parametrize("kind", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_makes_the_loss_nan(kind, on_emulator):
    logits = np.zeros((3, 40), np.float32)
    logits[1, 17] = kind
    _, saved = cross_entropy_forward(logits, np.zeros(3, np.int32))
    np.testing.assert_array_equal(np.isnan(saved.losses), [False, True, False])


def test_the_mean_of_many_rows(on_emulator):
    rng = np.random.default_rng(8)
    losses = rng.random(5000).astype(np.float32)
    targets = rng.integers(-1, 3, 5000).astype(np.int64)
    count = gpu.count_targets(targets, -1)
    assert count.shape == ()
    assert count == (targets != -1).sum()
    mean = gpu.mean_loss(losses, count)
    assert type(mean) is np.ndarray
    assert mean == np.float32(losses.sum(dtype=np.float64) / int(count))


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize("classes", [61, 64, 130])
def test_linear_with_classes_that_fill_no_cache_line(classes, dtype, on_emulator):
    dtype, rng = checks.DTYPES[dtype], np.random.default_rng(9)
    x = rng.standard_normal((37, 16)).astype(dtype)
    weight = (0.3 * rng.standard_normal((classes, 16))).astype(dtype)
    bias = rng.standard_normal(classes).astype(np.float32)
    targets = some_targets(rng, 37, classes)
    options = {**OPTIONS, "rows_per_chunk": 16}
    wide = [array.astype(FLOAT64) for array in (x, weight)]
    want, exactly = linear_cross_entropy_forward(*wide, targets, bias=bias.astype(FLOAT64), **options)
    want_gradients = linear_cross_entropy_backward(0.5, exactly)
    allowed = 3 * checks.ERROR[dtype]
    for dloss in (0.5, np.array(0.5, np.float32)):
        loss, saved = linear_cross_entropy_forward(x, weight, targets, bias=bias, **options)
        assert type(loss) is np.ndarray
        checks.assert_close("loss", loss, want, allowed)
        checks.assert_close("losses", saved.losses, exactly.losses, allowed)
        given = np.full((classes, 2), 3.0, np.float32)
        dx, dweight, dbias = linear_cross_entropy_backward(dloss, saved, dbias=given[:, 0])
        assert dx is saved.dx
        for got, want_gradient in zip((dx, dweight, dbias - 3), want_gradients, strict=True):
            checks.assert_close("gradient", got, want_gradient, 2 * allowed)
        assert (given[:, 1] == 3).all()
    if dtype == np.float32:
        np.testing.assert_array_equal(saved.best, exactly.best)


def test_linear_without_gradients(on_emulator):
    rng = np.random.default_rng(10)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((20, 8), (33, 8)))
    targets = some_targets(rng, 20, 33)
    want, saved = linear_cross_entropy_forward(x, weight, targets)
    loss, without = linear_cross_entropy_forward(x, weight, targets, gradients=False)
    assert loss == want
    assert without.dx is None
    np.testing.assert_array_equal(without.losses, saved.losses)
    np.testing.assert_array_equal(without.best, saved.best)
