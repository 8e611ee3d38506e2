"""AdamW and the gradient norm on the emulator: against the float64 reference, wherever arrays begin and end."""

import cupy_stand_in
import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.adamw import adamw, adamw_schedule, clip_scale, global_norm
from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32
from ttr_kernels.common.cuda.launch import use_executor

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

NAMES = "parameter", "gradient", "first_moment", "second_moment"


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def placed(array, shift):
    """The same array, begun `shift` elements behind a multiple of 16 bytes, between elements of NaN."""
    store = np.full(array.size + 32, np.nan, array.dtype)
    start = (-store.ctypes.data % 16) // array.itemsize + shift
    view = store[start : start + array.size]
    view[...] = array
    return view


def state(size):
    rng = np.random.default_rng(size)
    parameter, gradient, first = rng.standard_normal((3, size)).astype(np.float32)
    return [parameter, gradient, 0.1 * first, (0.01 * rng.standard_normal(size) ** 2).astype(np.float32)]


def assert_updated(got, before, **options):
    exact = [array.astype(np.float64) for array in before]
    adamw(*exact, **options)
    for name, have, want in zip(NAMES, got, exact, strict=True):
        checks.assert_close(name, have, want, checks.ERROR[FLOAT32])


OPTIONS = {"learning_rate": 3e-3, "step": 3, "weight_decay": 0.1, "gradient_scale": 0.37}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 1023, 1024, 1029])
@pytest.mark.parametrize("shifts", [(0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3), (0, 0, 1, 0), (2, 1, 0, 3)])
def test_agrees_with_reference_wherever_arrays_begin(shifts, size, on_emulator):
    before = state(size)
    arrays = [placed(array, shift) for array, shift in zip(before, shifts, strict=True)]
    adamw(*arrays, **OPTIONS)
    assert_updated(arrays, before, **OPTIONS)
    np.testing.assert_array_equal(arrays[1], before[1])


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-3, "step": 1},
        {"learning_rate": 1e-3, "step": 1, "weight_decay": 0.5},
        {"learning_rate": 0.0, "step": 2, "weight_decay": 0.5},
        {"learning_rate": 1e-2, "step": 100_000, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
        {"learning_rate": 1, "step": 7, "beta1": 0, "beta2": 0, "weight_decay": 0},
    ],
)
def test_options(options, on_emulator):
    before = state(300)
    arrays = [array.copy() for array in before]
    adamw(*arrays, **options)
    assert_updated(arrays, before, **options)


def test_any_shape_and_none(on_emulator):
    before = state(24)
    arrays = [array.reshape(2, 3, 4).copy() for array in before]
    adamw(*arrays, **OPTIONS)
    assert_updated([array.reshape(-1) for array in arrays], before, **OPTIONS)
    adamw(*np.zeros((4, 0), np.float32), **OPTIONS)


def test_several_steps_follow_the_reference(on_emulator):
    arrays = [*state(50)[:2], *np.zeros((2, 50), np.float32)]
    exact = [array.astype(np.float64) for array in arrays]
    for step in range(1, 9):
        for each in (arrays, exact):
            adamw(*each, learning_rate=0.05, step=step, weight_decay=0.01)
    checks.assert_close("parameter", arrays[0], exact[0], 2 * checks.ERROR[FLOAT32])


def test_a_schedule_takes_the_place_of_learning_rate_and_step(on_emulator):
    before = state(77)
    direct, replayed = ([array.copy() for array in before] for _ in range(2))
    adamw(*direct, learning_rate=2e-3, step=12, beta2=0.99, weight_decay=0.1)
    schedule = adamw_schedule(2e-3, 12, beta2=0.99)
    adamw(*replayed, learning_rate=1.0, step=1, beta2=0.99, weight_decay=0.1, schedule=schedule)
    for a, b in zip(direct, replayed, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_scale_on_the_device(dtype, shape, on_emulator):
    before = state(77)
    direct, by_array = ([array.copy() for array in before] for _ in range(2))
    adamw(*direct, **OPTIONS | {"gradient_scale": 0.375})
    adamw(*by_array, **OPTIONS | {"gradient_scale": np.full(shape, 0.375, dtype)})
    for a, b in zip(direct, by_array, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_scale_that_is_nan_changes_nothing(on_emulator):
    """On the device, where nobody looks whether gradients were finite; and from the host."""
    before = state(77)
    before[1][3] = np.inf
    for scale in (np.array(np.nan), np.nan):
        arrays = [array.copy() for array in before]
        adamw(*arrays, **OPTIONS | {"gradient_scale": scale})
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_clipped_by_the_norm(on_emulator):
    before = state(1000)
    arrays = [array.copy() for array in before]
    norm = global_norm([arrays[1]])
    assert isinstance(norm, np.ndarray)
    assert norm.shape == ()
    scale = np.asarray(clip_scale(norm, 1.0))
    np.testing.assert_allclose(scale, 1 / np.linalg.norm(before[1].astype(np.float64)), rtol=1e-12)
    assert clip_scale(norm, 1e6) == 1.0
    adamw(*arrays, **OPTIONS | {"gradient_scale": scale})
    assert_updated(arrays, before, **OPTIONS | {"gradient_scale": float(scale)})


def test_a_gradient_that_is_not_finite_reaches_its_own_element_alone(on_emulator):
    arrays = state(64)
    arrays[1][[5, 40]] = np.nan, np.inf
    adamw(*arrays, learning_rate=1e-3, step=1)
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(arrays[0])), [5, 40])


def test_what_the_device_cannot_take_is_named(on_emulator):
    arrays = state(8)
    with pytest.raises(ValueError, match=r"gradient_scale: got shape \(2,\), expected one number"):
        adamw(*arrays, **OPTIONS | {"gradient_scale": np.ones(2)})
    with pytest.raises(TypeError, match="schedule: got dtype float64"):
        adamw(*arrays, **OPTIONS, schedule=np.ones(3))
    with pytest.raises(ValueError, match=r"schedule: got shape \(2,\)"):
        adamw(*arrays, **OPTIONS, schedule=np.ones(2, np.float32))
    with pytest.raises(TypeError, match=r"arrays\[1\]: got dtype float64"):
        global_norm([arrays[0], np.ones(3)])


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize("size", [1, 3, 8, 2047, 2048, 8193, 20_001])
def test_norm_wherever_the_array_begins(size, dtype, on_emulator):
    x = np.random.default_rng(size).standard_normal(size).astype(checks.DTYPES[dtype])
    want = np.linalg.norm(x.astype(np.float64))
    for shift in (0, 1, 3):
        first = global_norm([placed(x, shift)])
        np.testing.assert_allclose(first, want, rtol=1e-14)
        assert global_norm([placed(x, shift)]) == first


def test_norm_of_many_arrays(on_emulator):
    rng = np.random.default_rng(1)
    arrays = [
        rng.standard_normal((30, 40)).astype(np.float32),
        rng.standard_normal(5).astype(BFLOAT16),
        np.zeros((0, 3), np.float32),
        rng.standard_normal((20, 10)).astype(FLOAT16)[:, ::2],
        np.array(3.0, np.float32),
    ]
    want = np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays))
    np.testing.assert_allclose(global_norm(arrays), want, rtol=1e-14)
    assert global_norm([np.zeros(0, np.float32)]) == 0


def test_norm_shows_what_is_not_finite(on_emulator):
    x = np.ones(9000, np.float32)
    for at in (0, 4321, 8999):
        for value in (np.nan, np.inf, -np.inf):
            y = x.copy()
            y[at] = value
            norm = global_norm([x, y])
            assert np.isnan(norm) if np.isnan(value) else norm == np.inf
            assert not np.isfinite(norm)


def test_norm_of_numbers_whose_squares_float32_does_not_hold(on_emulator):
    assert np.isclose(global_norm([np.full(100, 1e30, np.float32)]), 1e31, rtol=1e-6)
    assert np.isclose(global_norm([np.full(100, 1e-30, np.float32)]), 1e-29, rtol=1e-6)


def test_nobody_waits_for_a_clipped_step_and_its_schedule_lies_on_the_device():
    before = state(100)
    with cupy_stand_in.installed(emulator.EmulatorExecutor("plain")) as cupy:
        arrays = [cupy.asarray(array) for array in before]
        schedule = cupy.asarray(adamw_schedule(1e-3, 4))
        waits = cupy_stand_in.waits
        scale = clip_scale(global_norm([arrays[1]]), 1.0)
        adamw(*arrays, learning_rate=0.0, step=1, gradient_scale=scale, schedule=schedule)
        assert cupy_stand_in.waits == waits
        options = {"learning_rate": 1e-3, "step": 4, "gradient_scale": float(scale)}
        assert_updated([cupy.asnumpy(array) for array in arrays], before, **options)
        with pytest.raises(TypeError, match=r"schedule: got numpy.ndarray, expected cupy.ndarray like parameter"):
            adamw(*arrays, **options, schedule=adamw_schedule(1e-3, 4))
