"""How arguments reach a kernel and results come back: copies, views of one memory, types; and what is refused."""

from __future__ import annotations

from pathlib import Path

import emulator
import host_compiler
import ml_dtypes
import numpy as np
import pytest

from ttr_kernels.common.cuda.launch import Kernel, use_executor

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SOURCE = Path(__file__).parent / "kernels" / "arguments.cu"


def launch(name, *arguments, grid=(1,), block=(32,), mode="check", **defines):
    with use_executor(emulator.EmulatorExecutor(mode)):
        array = next(each for each in arguments if isinstance(each, np.ndarray))
        Kernel(SOURCE, name, defines).launch(array, grid, block, arguments)


@pytest.mark.parametrize("mode", ["plain", "check"])
def test_an_array_passed_twice_is_one_memory(mode):
    x = np.arange(8, dtype=np.float32)
    launch("add_one", x, x, 8, mode=mode)
    np.testing.assert_array_equal(x, np.arange(1, 9))


def test_overlapping_views_are_one_memory():
    base = np.arange(12, dtype=np.float32)
    launch("difference_of_addresses", base[2:8], base[5:12], out := np.zeros(1, np.int64))
    assert out[0] == 3
    launch("add_one", base[0:8], base[4:12], 8, block=(1,))
    np.testing.assert_array_equal(base, [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5])


def test_views_of_a_matrix_keep_the_gaps_between_them():
    base = np.zeros((4, 10), np.float32)
    left, right = base[:, :3], base[:, 5:9]
    right[...] = 7
    launch("copy_rows", right, left, 10, 4, 3)
    np.testing.assert_array_equal(left, 7)
    np.testing.assert_array_equal(base[:, 3:5], 0)


def test_arrays_that_only_touch_are_apart():
    base = np.zeros(16, np.float32)
    with pytest.raises(emulator.EmulatorFault, match="out of bounds"):
        launch("add_one", base[:8], base[8:], 9)


def test_an_array_that_may_only_be_read():
    x = np.arange(8, dtype=np.float32)
    x.flags.writeable = False
    launch("add_one", x, out := np.zeros(8, np.float32), 8)
    assert out[7] == 8
    with pytest.raises(emulator.EmulatorFault, match="argument 1, which may only be read"):
        launch("add_one", out, x, 8)
    assert x[7] == 7


def test_alignment_is_that_of_the_array():
    base = np.zeros(65, np.float32)
    for start in (0, 1):
        view = base[start : start + 64]
        launch("address_modulo", view, 256, out := np.zeros(1, np.int64))
        assert out[0] == view.ctypes.data % 256


def test_empty_arrays():
    launch("add_one", np.zeros(0, np.float32), np.zeros((0, 3), np.float32), 0)
    with pytest.raises(emulator.EmulatorFault, match="out of bounds"):
        launch("add_one", np.zeros(0, np.float32), np.zeros(0, np.float32), 1)


def test_each_type_arrives():
    out = np.zeros(8, np.float64)
    launch(
        "types",
        np.array([1.5], ml_dtypes.bfloat16), np.array([2.5], np.float16), np.array([3], np.uint8),
        2**40 + 1, 0.1, np.uint32(2**32 - 1), np.float64(0.1), 0, out,
    )  # fmt: skip
    expected = [1.5, 2.5, 3, 2**40 + 1, float(np.float32(0.1)), 2**32 - 1, 0.1, 1]
    np.testing.assert_array_equal(out, expected)


def test_16_bit_floats_may_travel_as_integers():
    # As arrays.flat_rows hands them on.
    out = np.zeros(8, np.float64)
    launch(
        "types",
        np.array([1.5], ml_dtypes.bfloat16).view(np.uint16), np.array([2.5], np.float16).view(np.int16),
        np.array([True]), 0, 0.0, np.uint32(0), np.float64(0), 0, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out[:3], [1.5, 2.5, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(4, np.float32), np.zeros(4, np.float32)), "got 2 arguments, expected 3"),
        ((np.zeros(4), np.zeros(4, np.float32), 4), "argument 0: got array of float64, .* pointer to float32"),
        ((np.zeros(4, np.float32), np.zeros(4, np.float32), 4.0), "argument 2: got float32, .* int64"),
        ((np.zeros(4, np.float32), np.zeros(4, np.float32), np.int32(4)), "argument 2: got int32, .* int64"),
        ((np.zeros(4, np.float32), 4096, 4), "argument 1: got int64, .* pointer to float32"),
    ],
)
def test_wrong_types_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        launch("add_one", *arguments)


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 65536), (32,)), ((1,), (1025,)), ((1,), (32, 33)), ((1,), (1, 1, 65))]
)
def test_grids_that_no_gpu_takes_are_refused(grid, block):
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"grid or block|too large"):
        launch("add_one", x, x, 0, grid=grid, block=block)


def test_kernels_that_exist_under_one_macro_only():
    x = np.zeros(1, np.float32)
    launch("only_with_macro", x, TTR_EXTRA=5)
    assert x[0] == 5
    launch("address_modulo", x, 256, np.zeros(1, np.int64))
    with pytest.raises(host_compiler.CompileError, match="only_with_macro"):
        launch("only_with_macro", x)


def test_a_bare_shared_array_is_refused():
    with pytest.raises(host_compiler.CompileError, match="use TTR_SHARED or TTR_DYN_SMEM"):
        launch("add_one", x := np.zeros(1, np.float32), x, 0, TTR_BARE_SHARED=1)


def test_new_arrays_are_poisoned():
    with emulator.poisoned_empty():
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            assert np.isnan(np.empty((3, 2), dtype)).all()
            assert np.isnan(np.empty_like(np.zeros(3, dtype))).all()
        assert np.isnan(np.empty((), np.float32))
        assert np.isnan(np.empty((3, 2), order="F")).all()
        assert np.isnan(np.empty((2, 0, 3))).all()
    with pytest.raises(ValueError, match="mode"):
        emulator.EmulatorExecutor("fast")


def test_orders_of_threads_differ_by_seed_and_repeat():
    def order(seed):
        with use_executor(emulator.EmulatorExecutor("plain", seed)):
            kernel = Kernel(SOURCE, "order", {})
            kernel.launch(out := np.zeros(128, np.int32), (2,), (64,), (np.zeros(1, np.int32), out))
        return out.tolist()

    assert order(0) == list(range(128))
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(6)}) == 6


def test_without_the_hand_written_switch(monkeypatch):
    """The portable context switch, which other processors use."""
    monkeypatch.setattr(host_compiler, "RUNTIME_FLAGS", [*host_compiler.RUNTIME_FLAGS, "-DTTR_UCONTEXT"])
    emulator.forget()
    try:
        test_orders_of_threads_differ_by_seed_and_repeat()
        with pytest.raises(emulator.EmulatorFault, match="out of bounds"):
            launch("add_one", np.zeros(4, np.float32), np.zeros(4, np.float32), 5)
    finally:
        emulator.forget()
