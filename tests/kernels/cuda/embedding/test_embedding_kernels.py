"""The embedding kernels on the emulator, beyond the table of cases: the sort, runs that chunks cut, frequent indices,
indices outside the table."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.embedding import embedding_backward, embedding_forward
from ttr_kernels.embedding.gpu import _sorted

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))


@pytest.fixture(params=["plain", "check"])
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(request.param, 3)), emulator.poisoned_empty():
        yield


def gradient(indices, dy, vocabulary, dtable=None):
    table = np.zeros((vocabulary, dy.shape[-1]), dy.dtype)
    return embedding_backward(dy, embedding_forward(indices, table)[1], dtable=dtable)


def exact_gradient(indices, dy, vocabulary):
    total = np.zeros((vocabulary, dy.shape[-1]))
    np.add.at(total, indices, dy.astype(np.float64))
    return total


@pytest.mark.parametrize(
    ("size", "vocabulary", "dtype"),
    [(1, 1, np.int32), (1500, 200, np.int64), (2500, 50257, np.int32), (1100, 1 << 20, np.int64)],
)
def test_the_sort_is_stable(size, vocabulary, dtype, on_emulator):
    rng = np.random.default_rng(1)
    indices = rng.integers(0, vocabulary, size).astype(dtype)
    indices[size // 2 :] = rng.choice(indices, size - size // 2)
    indices[:: max(size // 7, 2)] = vocabulary - 1
    keys, places = _sorted(indices, vocabulary)
    np.testing.assert_array_equal(places, np.argsort(indices, kind="stable"))
    np.testing.assert_array_equal(keys, np.sort(indices))


@pytest.mark.parametrize(
    "runs",
    [
        [32, 32, 32],  # chunks are whole runs
        [31, 1, 33, 31, 32],  # runs end at, before and after a chunk's end
        [64, 96, 1, 15],  # runs of several whole chunks
        [5, 3, 100, 1, 1, 1, 30],
        [1] * 70,
        [300],
        [20, 76],  # a run ends with the last chunk, which is whole
        [16, 600, 16],  # more parts than a block has warps
    ],
)
@pytest.mark.parametrize("width", [8, 5])
def test_runs_cut_by_chunks(runs, width, on_emulator):
    rng = np.random.default_rng(2)
    indices = np.repeat(np.arange(len(runs)) * 3, runs).astype(np.int32)
    indices = rng.permutation(indices)
    vocabulary = 3 * len(runs)
    dy = rng.standard_normal((len(indices), width)).astype(np.float32)
    start = rng.standard_normal((vocabulary, width)).astype(np.float32)
    dtable = gradient(indices, dy, vocabulary, start.copy())
    checks.assert_close("dtable", dtable, start + exact_gradient(indices, dy, vocabulary), 2e-6)
    untouched = np.setdiff1d(np.arange(vocabulary), indices)
    np.testing.assert_array_equal(dtable[untouched], start[untouched])


def test_a_frequent_index_is_shared_by_many_and_gives_the_same_bits():
    rng = np.random.default_rng(3)
    indices = np.where(rng.random(6000) < 0.8, 1, rng.integers(0, 3, 6000)).astype(np.int32)
    dy = rng.standard_normal((6000, 16)).astype(BFLOAT16)
    results = []
    for seed, multiprocessors in ((0, 2), (5, 2), (9, 132)):
        executor = emulator.EmulatorExecutor("plain", seed)
        executor.multiprocessors = multiprocessors
        with use_executor(executor), emulator.poisoned_empty():
            results.append(gradient(indices, dy, 3))
    checks.assert_close("dtable", results[0], exact_gradient(indices, dy, 3), 2e-6)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_indices_outside_the_table(dtype, on_emulator):
    rng = np.random.default_rng(4)
    wrong = [-1, 7, np.iinfo(dtype).min, np.iinfo(dtype).max]
    indices = np.concatenate([rng.integers(0, 7, 60), wrong, rng.integers(0, 7, 40), wrong * 10]).astype(dtype)
    table = rng.standard_normal((7, 12)).astype(np.float32)
    dy = rng.standard_normal((len(indices), 12)).astype(np.float32)
    inside = (indices >= 0) & (indices < 7)
    y, saved = embedding_forward(indices, table)
    np.testing.assert_array_equal(y[inside], table[indices[inside]])
    assert np.isnan(y[~inside]).all()
    dy[~inside] = np.nan
    dtable = embedding_backward(dy, saved)
    checks.assert_close("dtable", dtable, exact_gradient(indices[inside], dy[inside], 7), 2e-6)


@pytest.mark.parametrize("width", [24, 40, 1100])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_rows_with_gaps_and_a_float32_table(dtype, width, on_emulator):
    rng = np.random.default_rng(5)
    indices = rng.integers(0, 9, (3, 2, 13))[:, 1].astype(np.int32)
    table = rng.standard_normal((9, width + 8)).astype(np.float32)[:, :width]
    out = np.full((3, 13, width + 8), 7, dtype)
    y, saved = embedding_forward(indices, table, dtype=dtype, out=out[..., :width])
    np.testing.assert_array_equal(y, table[indices].astype(dtype))
    assert (out[..., width:] == 7).all()
    dy = rng.standard_normal((3, 13, width + 8)).astype(dtype)[..., 8:]
    dtable = np.full((9, width + 4), 2, np.float32)
    embedding_backward(dy, saved, dtable=dtable[:, :width])
    checks.assert_close("dtable", dtable[:, :width], 2 + exact_gradient(indices, dy, 9), 2e-6)
    assert (dtable[:, width:] == 2).all()
