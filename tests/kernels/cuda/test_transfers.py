"""What a kernel that is bound by memory moves: 16 bytes at a time where arrays are aligned, and each of them once.

Results say nothing of this: a kernel that moves elements one by one computes the same."""

import emulator
import numpy as np
import pytest

from ttr_kernels.adamw import adamw, global_norm
from ttr_kernels.attention import attention_backward, attention_forward
from ttr_kernels.attention.gpu import forward_tiles, keys_tiles, queries_tiles
from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.cross_entropy import cross_entropy_forward, gpu
from ttr_kernels.dropout_add import dropout_add_forward
from ttr_kernels.embedding import embedding_backward, embedding_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))


def aligned(*shape, dtype=np.float32):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    store = np.empty(size + 64, np.uint8)
    start = -store.ctypes.data % 64
    array = store[start : start + size].view(dtype).reshape(shape)
    array[...] = np.random.default_rng(0).uniform(0.5, 1.5, shape)
    return array


def accesses(call):
    """Of global memory, by their bytes; how often each occurs."""
    executor = emulator.EmulatorExecutor("check")
    with use_executor(executor):
        call()
    return {size: count for size, count in executor.accesses.items() if count}


def test_adamw_reads_four_arrays_and_writes_three():
    arrays = aligned(4, 2048)
    moved = accesses(lambda: adamw(*arrays, learning_rate=0.1, step=1))
    assert moved == {16: 7 * 2048 // 4}


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_a_norm_reads_an_array_once(dtype):
    x = aligned(20480, dtype=dtype)
    moved = accesses(lambda: global_norm([x]))
    # Partial sums are written and read, and the norm is written.
    assert moved == {16: x.nbytes // 16, 8: 2 * 3 + 1}


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_dropout_reads_two_arrays_and_writes_one(dtype):
    x, residual, out = (aligned(4, 1024, dtype=dtype) for _ in range(3))
    moved = accesses(lambda: dropout_add_forward(x, residual, rate=0.3, out=out))
    assert moved == {16: 3 * x.nbytes // 16}


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_cross_entropy_reads_logits_once_and_writes_their_gradient(dtype):
    logits, targets = aligned(2, 4096, dtype=dtype), np.array([3, 4000], np.int32)
    _, saved = cross_entropy_forward(logits.astype(np.float64), targets)
    count, losses, best = np.array(2, np.int32), np.empty(2, np.float32), np.empty(2, np.int32)
    moved = accesses(
        lambda: gpu.losses_and_gradient(logits, targets, saved.smoothing, count, losses, best, gradient=True)
    )
    assert moved[16] == 2 * logits.nbytes // 16


def test_a_16_bit_gradient_of_an_embedding_is_read_once():
    dy, indices = aligned(64, 32, dtype=BFLOAT16), np.arange(64, dtype=np.int32) % 5
    _, saved = embedding_forward(indices, np.zeros((5, 32), np.float32), dtype=BFLOAT16)
    moved = accesses(lambda: embedding_backward(dy, saved))
    assert moved[8] == dy.nbytes // 8


def test_attention_reads_no_key_and_no_query_that_a_tile_does_not_see():
    """Its own rows a tile reads and writes once. Those that pass by come in twos: keys and values, queries and dout."""
    length, window, dim = 256, 70, 32
    q, k, v, dout = (aligned(1, length, 1, dim) for _ in range(4))

    def rows_of_keys(tiles):
        firsts = np.arange(0, length, tiles.queries)
        begins = np.maximum(0, firsts - window + 1) // tiles.keys * tiles.keys
        return int((firsts + tiles.queries - begins).sum())

    def rows_of_queries(tiles):
        firsts = np.arange(0, length, tiles.keys)
        return int((np.minimum(length, firsts + tiles.keys - 1 + window) - firsts).sum())

    def rows_moved(call):
        return accesses(call)[16] * 4 // dim

    results = []
    assert rows_moved(lambda: results.extend(attention_forward(q, k, v, window=window))) == (
        2 * length + 2 * rows_of_keys(forward_tiles(dim, 4))
    )
    # dout and out for their product; then q, dout and dq; then k, v, dk and dv.
    assert rows_moved(lambda: attention_backward(dout, results[1])) == (
        9 * length + 2 * rows_of_keys(queries_tiles(dim, 4)) + 2 * rows_of_queries(keys_tiles(dim, 4))
    )
