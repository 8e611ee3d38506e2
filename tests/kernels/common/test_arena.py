"""The arena: nothing that lives is handed out again, what is dead is, and a repeated step finds the same addresses."""

import gc
import os
import subprocess
import sys
import textwrap
import threading

import ml_dtypes
import numpy as np
import pytest

from ttr_kernels.common import arrays
from ttr_kernels.common.arena import ALIGNMENT, Arena, current, outside
from ttr_kernels.common.cuda.launch import address


@pytest.fixture
def arena():
    return Arena(capacity=1 << 20, poison=True)


def test_arrays_are_as_asked_for_and_aligned(arena):
    with arena.step():
        made = [arrays.empty(shape, dtype) for shape, dtype in (
            (3, np.int32), ((2, 5), np.float64), ((), np.float32), ((4, 1, 7), ml_dtypes.bfloat16), ((0, 8), np.float32)
        )]  # fmt: skip
        zeros = arrays.zeros((9, 9), np.float32)
    assert [(a.shape, a.dtype.name) for a in made] == [
        ((3,), "int32"), ((2, 5), "float64"), ((), "float32"), ((4, 1, 7), "bfloat16"), ((0, 8), "float32"),
    ]  # fmt: skip
    assert all(address(a) % ALIGNMENT == 0 and a.flags.c_contiguous for a in made if a.size)
    assert not zeros.any()
    assert arena.misses == 0
    assert arena.live == 5 * ALIGNMENT + 256, "9 · 9 · 4 bytes take two times 256"


def test_outside_a_step_and_in_other_threads_arrays_are_their_own(arena):
    seen = []
    with arena.step():
        assert current() is arena
        thread = threading.Thread(target=lambda: seen.append((current(), arrays.empty(4, np.float32).base)))
        thread.start()
        thread.join()
    assert seen == [(None, None)]
    assert arrays.empty(4, np.float32).base is None
    assert arena.live == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[3:],
        lambda x: x.T,
        lambda x: x[2:].reshape(-1)[5:].view(np.uint8)[::2],
        lambda x: np.lib.stride_tricks.as_strided(x, (2,), (4,)),
        lambda x: memoryview(x)[1:],
        lambda x: np.frombuffer(x, np.float32),
        lambda x: arrays.flat_rows(x[:, :2])[0],
        lambda x: np.asarray(x).view(np.recarray),
        lambda x: [x[1:2]],
        lambda x: np.broadcast_to(x, (3, *x.shape)),
    ],
)
def test_a_view_keeps_its_part(arena, view):
    with arena.step():
        x = arrays.empty((10, 10), np.float32)
        kept, begin = view(x), address(x)
        del x
        others = [arrays.empty(60, np.float32) for _ in range(20)]
        assert begin not in {address(other) for other in others}
        del kept, others
        gc.collect()
        assert address(arrays.empty((10, 10), np.float32)) == begin


def test_holes_are_joined_and_the_smallest_that_fits_is_taken(arena):
    with arena.step():
        a, b, c, d, e = (arrays.empty(n * 64, np.float32) for n in (1, 4, 1, 2, 1))
        at = {name: address(array) for name, array in zip("abcde", (a, b, c, d, e), strict=True)}
        del b, d
        assert address(arrays.empty(2 * 64, np.float32)) == at["d"], "the smaller hole, not the first"
        assert address(arrays.empty(3 * 64, np.float32)) == at["b"]
        del c
        joined = arrays.empty(7 * 64, np.float32)
        assert address(joined) == at["b"]
        del a, e, joined
    arena.reset_peak()
    assert arena.live == arena.peak == 0
    with arena.step():
        whole = arrays.empty(arena.capacity // 4, np.float32)
    assert address(whole) == at["a"]
    assert arena.misses == 0


def random_step(rng, sizes):
    """Requests and deaths in an order of their own; checks that no two live arrays share a byte."""
    live, addresses = [], []
    for number, size in enumerate(sizes):
        array = arrays.empty(int(size), np.int64)
        array[...] = number
        live.append((number, array[: len(array)] if number % 3 else array))
        addresses.append(address(array))
        del array
        while len(live) > 5:
            number, array = live.pop(int(rng.integers(len(live))))
            assert (array == number).all()
            del array
    assert all((array == number).all() for number, array in live)
    return addresses


def test_a_repeated_step_finds_the_same_addresses(arena):
    sizes = np.random.default_rng(3).integers(1, 4000, 300)
    runs = []
    for _ in range(3):
        with arena.step():
            runs.append(random_step(np.random.default_rng(5), sizes))
    assert runs[0] == runs[1] == runs[2]
    assert arena.misses == 0


def test_what_does_not_fit_is_allocated_and_fits_the_next_time():
    arena, sizes = Arena(), np.random.default_rng(4).integers(1, 4000, 300)
    with arena.step():
        outliving = arrays.empty(1000, np.float32)
        outliving[...] = 7
        random_step(np.random.default_rng(5), sizes)
    assert arena.misses == 301
    assert arena.capacity == 0
    with arena.step():
        random_step(np.random.default_rng(5), sizes)
    assert arena.misses == 301
    assert arena.extent <= arena.capacity
    with arena.step():
        random_step(np.random.default_rng(5), 20 * sizes)
        assert (outliving == 7).all()
    assert arena.misses > 301, "of a larger batch"
    misses = arena.misses
    with arena.step():
        random_step(np.random.default_rng(5), 20 * sizes)
    assert arena.misses == misses


def test_poison_shows_who_reads_what_is_gone(arena):
    with arena.step():
        x = arrays.zeros(100, np.float32)
        flat = np.frombuffer(arena._block, np.float32, 100, address(x) - address(np.frombuffer(arena._block, np.uint8)))
        assert not flat.any()
        del x
        arrays.empty(1, np.float32)
    assert np.isnan(flat).all()


def test_gpu_arrays_live_as_long_as_their_views(cupy):
    arena = Arena(cupy, 1 << 20)
    like = cupy.zeros(3, np.float32)
    with arena.step():
        assert arrays.empty(4, np.float32).base is None, "an array of NumPy's is not for this arena"
        x = arrays.empty((10, 10), np.float32, like)
        y = arrays.zeros((10, 10), np.float32, like)
        begin, kept = address(x), x[2:].reshape(-1)[5:]
        del x
        z = arrays.empty((10, 10), np.float32, like)
        assert len({begin, address(y), address(z)}) == 3
        assert not y.get().any()
        del kept
        assert address(arrays.empty((10, 10), np.float32, like)) == begin
    assert arena.misses == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_to_its_own():
    # In a process of its own, without threads: a test runner has some, and may hang in a child that is forked from it.
    script = """
        import os
        import numpy as np
        from ttr_kernels.common import arrays
        from ttr_kernels.common.arena import Arena
        with Arena(capacity=1 << 20).step():
            x = arrays.zeros(10, np.int32)
            child = os.fork()
            if not child:
                x[...] = 1
                os._exit(int(x.sum()))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
            assert not x.any()
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True, timeout=60)


def test_on_a_gpu_everything_may_come_from_the_arena_but_what_is_kept(cupy):
    arena = Arena(cupy, capacity=1 << 16)
    x = cupy.arange(8, dtype=np.float32)
    begin, end = arena._block.ptr, arena._block.ptr + arena.capacity

    def is_inside(array):
        return begin <= address(array) < end

    with arena.step():
        assert not is_inside(x + 1)
        with arena.everything():
            temporary, view = x + 1, (x * 2)[3:]
            made = arrays.empty(5, np.float32, x)
            with outside():
                kept = [cupy.zeros(4), arrays.zeros(4, np.float32, x)]
    assert all(map(is_inside, (temporary, view, made)))
    assert not any(map(is_inside, kept))
    assert len({address(temporary), address(view), address(made)}) == 3
    np.testing.assert_array_equal(temporary.get(), np.arange(1, 9))
    del temporary, made
    assert arena.collect() == ALIGNMENT
    del view
    assert arena.collect() == 0


def test_on_a_gpu_what_does_not_fit_is_allocated_and_counted(cupy):
    arena = Arena(cupy, capacity=1)  # a page
    with arena.step(), arena.everything():
        large = cupy.zeros(arena.capacity, np.float32)
        also = arrays.zeros(arena.capacity, np.float32, large)
    assert arena.misses == 2
    assert not large.get().any()
    assert not also.get().any()
    with arena.step():
        assert arena.capacity >= 2 * large.nbytes
