"""The attention kernels on the emulator, beyond the table of cases that test_emulated.py runs: every tile width,
pipelines of several tiles under many orders of threads, exact gaps, unusual scales, and faults put in to be found."""

import dataclasses
from pathlib import Path

import emulator
import numpy as np
import operation_checks as checks
import pytest

import ttr_kernels.attention
import ttr_kernels.attention.gpu as gpu
from ttr_kernels.attention import TimeBias, attention_backward, attention_forward
from ttr_kernels.attention.cases import OPERATION, _inputs
from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32
from ttr_kernels.common.cases import Case
from ttr_kernels.common.cuda.launch import Kernel, use_executor

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))
FOLDER = Path(ttr_kernels.attention.__path__[0])


def check(case, dtype, mode="plain", seed=1):
    with use_executor(emulator.EmulatorExecutor(mode, seed)), emulator.poisoned_empty():
        checks.check_against_reference(OPERATION, case, dtype)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(BFLOAT16, 64), (BFLOAT16, 96), (BFLOAT16, 128), (BFLOAT16, 160), (FLOAT32, 64), (FLOAT32, 96), (FLOAT32, 128),
     (FLOAT32, 192), (FLOAT32, 256), (FLOAT16, 20), (FLOAT32, 11)],
)  # fmt: skip
def test_tile_widths_and_padded_head_dims(dtype, dim):
    # (The gradient of rate cancels almost to nothing for these 75 rows; in 16 bits what is left of it is rounding.)
    check(Case("width", _inputs(1, 75, 1, dim, kind=None if dtype == FLOAT16 else "log", window=70)), dtype)


def test_strided_rows_without_alignment_are_copied():
    case = Case("", _inputs(1, 70, 2, 16, kind="log", dropout=0.2))
    with use_executor(emulator.EmulatorExecutor("plain", 1)), emulator.poisoned_empty():
        checks.check_layout(OPERATION, case)
        checks.check_preallocated(OPERATION, case)


# At least three tiles of keys in the forward and of queries in the backward: what a lost barrier needs to show.
SEVERAL_TILES = Case("", _inputs(1, 0, 2, 24, kv_heads=1, kind="log", packed=[230, 3], dropout=0.1))

# The only tile that the window leaves is the last, whose end no row fills.
LAST_TILE = Case("", _inputs(1, 5, 2, 24, kv_heads=1, key_length=150, kind="log", window=7))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_no_row_behind_the_last_is_read(dtype):
    check(LAST_TILE, dtype, "check")


def test_a_window_over_fewer_keys_than_queries():
    check(Case("", _inputs(1, 80, 2, 16, key_length=9, window=7)), FLOAT32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_no_fault_over_several_tiles(dtype, seed):
    check(SEVERAL_TILES, dtype, "check", seed)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale):
    check(Case("", _inputs(1, 40, 2, 16, scale=scale)), FLOAT32)


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_gaps_stay_exact_between_distant_bursts(kind):
    """Milliseconds apart within a burst, years between bursts, at UNIX times."""
    rng = np.random.default_rng(3)
    # The first burst has queries of a second tile, and more follow it.
    gaps = np.where(np.isin(np.arange(200), [90, 150]), 3e7, rng.integers(1, 2000, 200) / 1024)
    times = 1.6e9 + np.cumsum(gaps)[None, :]
    q, k, v, dout = (rng.standard_normal((1, 200, 1, 16)) for _ in range(4))
    rate, tau = np.array([0.7]), np.array([0.05])
    exact = attention_forward(q, k, v, times=times, time_bias=TimeBias(rate, tau, kind))
    wanted = attention_backward(dout, exact[1])
    bias = TimeBias(rate.astype(np.float32), tau.astype(np.float32), kind)
    with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
        single = [array.astype(np.float32) for array in (q, k, v, dout)]
        out, saved = attention_forward(*single[:3], times=times, time_bias=bias)
        got = attention_backward(single[3], saved)
    checks.assert_close("out", out, exact[0], 4e-6)
    for name, x, y in zip(("dq", "dk", "dv"), got, wanted, strict=False):
        checks.assert_close(name, x, y, 8e-6)
    checks.assert_close("drate", got[3].rate, wanted[3].rate, 8e-6)
    checks.assert_close("dtau", got[3].tau, wanted[3].tau, 8e-6)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_logits_of_hundreds(dtype):
    """Relative to anything but a row's largest logit so far, weights overflow or vanish."""
    rng = np.random.default_rng(6)
    # Multiples of 16, exact in every type. The first sequence's first tile has the largest, the second's last.
    levels = np.concatenate([np.arange(299, 149, -1), np.arange(150)]) // 5 * rng.integers(-1, 2, 300)
    q, k = np.zeros((2, 300, 1, 16))
    q[:, 0, 0], k[:, 0, 0] = 1, 16 * levels
    v, dout = (rng.standard_normal((2, 300, 1, 16)).astype(dtype)).astype(np.float64)
    results = []
    for of in (np.float64, dtype):
        given = [array.astype(of) for array in (q, k, v)]
        with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
            out, saved = attention_forward(*given, scale=1.0, cu_seqlens=np.array([0, 150, 300], np.int32))
            dv = attention_backward(dout.astype(of), saved)[2]
        results.append((out, dv))
    for name, exact, got in zip(("out", "dv"), *results, strict=True):
        checks.assert_close(name, got, exact, 2e-4 if dtype == FLOAT32 else 2e-2)


def test_ages_far_below_tau_keep_their_relative_accuracy():
    """1 + u would lose them: u is 1e-5 at most, and what it is multiplied by as large as its inverse."""
    rng = np.random.default_rng(7)
    q, k, v, dout = rng.standard_normal((4, 1, 130, 1, 16))
    times = 1.7e9 + np.cumsum(rng.uniform(0, 2, (1, 130)), axis=1)
    results = []
    for of in (np.float64, np.float32):
        bias = TimeBias(np.array([1e5], of), np.array([2e7], of), "log")
        with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
            out, saved = attention_forward(*(x.astype(of) for x in (q, k, v)), times=times, time_bias=bias)
            results.append([out, *attention_backward(dout.astype(of), saved)[:3]])
    for exact, got in zip(*results, strict=True):
        checks.assert_close("result", got, exact, 8e-6)


def test_a_linear_bias_far_from_all_keys_keeps_the_logits():
    rng = np.random.default_rng(4)
    key_times = 1e9 + np.cumsum(rng.uniform(0, 1, (1, 130)), axis=1)
    times = np.full((1, 3), 1e9 + 1e8)
    q, k, v = rng.standard_normal((1, 3, 1, 16)), *rng.standard_normal((2, 1, 130, 1, 16))
    options = {"times": times, "key_times": key_times}
    exact, _ = attention_forward(q, k, v, time_bias=TimeBias(np.ones(1), np.ones(1), "linear"), **options)
    one = np.ones(1, np.float32)
    with use_executor(emulator.EmulatorExecutor()):
        out, _ = attention_forward(
            *(array.astype(np.float32) for array in (q, k, v)), time_bias=TimeBias(one, one, "linear"), **options
        )
    checks.assert_close("out", out, exact, 8e-6)


def test_head_dims_beyond_the_widest_tile_are_refused():
    x = np.zeros((1, 4, 1, 264), np.float32)
    with (
        use_executor(emulator.EmulatorExecutor()),
        pytest.raises(ValueError, match="head dim 264, expected at most 256"),
    ):
        attention_forward(x, x, x)


def test_work_lists_hold_every_tile_once_the_longest_first():
    offsets = np.array([0, 1, 71, 71, 300], np.int64)
    for by_keys in (False, True):
        work = gpu._kept_work_list(offsets.tobytes(), offsets.tobytes(), True, 0, 64, by_keys, np, None)
        lengths = {int(row): int(length) for row, length in zip(offsets, np.diff(offsets), strict=False) if length}
        wanted = {(row, first) for row, length in lengths.items() for first in range(0, length, 64)}
        assert sorted(map(tuple, work[:, [0, 4]].tolist())) == sorted(wanted)
        assert (work[:, 0] == work[:, 2]).all()
    last = gpu._kept_work_list(offsets.tobytes(), offsets.tobytes(), True, 0, 64, False, np, None)[0]
    assert last.tolist() == [71, 229, 71, 229, 192]


FAULTS = [
    ("forward", "    __syncthreads();\n", ""),
    ("forward", "cp_async_wait<0>()", "cp_async_wait<1>()"),
    ("forward", "column >= to", "column > to"),
    ("forward", "unsigned(key / 4 + 2 * n + t)", "unsigned(key / 4 + n + t)"),
    ("backward_queries", "    __syncthreads();\n", ""),
    ("backward_queries", "cp_async_wait<0>()", "cp_async_wait<1>()"),
    ("backward_queries", "column < from || column >= to", "column < from"),
    ("backward_keys", "    __syncthreads();\n", ""),
    ("backward_keys", "cp_async_wait<0>()", "cp_async_wait<1>()"),
    ("backward_keys", "const bool odd = g & 1;", "const bool odd = t & 1;"),
    ("backward_keys", "head += last;", ""),
]


@pytest.mark.parametrize(("file", "good", "bad"), FAULTS)
def test_faults_are_found(file, good, bad, tmp_path, monkeypatch):
    for source in (*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")):
        (tmp_path / source.name).write_text(source.read_text())
    text = (FOLDER / f"{file}.cu").read_text()
    assert text.count(good) == 1
    (tmp_path / f"{file}.cu").write_text(text.replace(good, bad))
    right = gpu._kernel

    def wrong(name, *variant):
        kernel, tiles = right(name, *variant)
        if name != file:
            return kernel, tiles
        broken = Kernel(tmp_path / f"{file}.cu", kernel.name, kernel.defines)
        broken.shared_bytes = kernel.shared_bytes
        return broken, tiles

    monkeypatch.setattr(gpu, "_kernel", wrong)
    with pytest.raises((AssertionError, emulator.EmulatorFault)):
        check(SEVERAL_TILES, BFLOAT16, "check")


def test_bits_do_not_depend_on_the_order_of_threads():
    inputs, _ = checks.rounded_inputs(OPERATION, dataclasses.replace(SEVERAL_TILES), BFLOAT16)
    results = []
    for seed in (0, 5):
        with use_executor(emulator.EmulatorExecutor("plain", seed)), emulator.poisoned_empty():
            out, saved = OPERATION.forward(**inputs)
            results.append((out, *OPERATION.backward(np.ones_like(out), saved)))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)
