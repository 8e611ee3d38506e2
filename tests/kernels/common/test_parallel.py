"""The pool of threads: what is covered, what is raised, and what must not hang."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from ttr_kernels.common import parallel
from ttr_kernels.common.parallel import get_threads, parallel_for, set_threads, single_threaded_blas


@pytest.fixture(autouse=True)
def threads():
    before = get_threads()
    set_threads(4)
    yield
    set_threads(before)


def ranges_of(count, **options):
    ranges = []
    parallel_for(lambda begin, end: ranges.append((begin, end)), count, **options)
    return sorted(ranges)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("grain", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 100, 1001])
def test_ranges_cover_everything_once(count, grain, even):
    ranges = ranges_of(count, grain=grain, even=even)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == count
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert all(begin < end for begin, end in ranges), "an empty range: more threads than items"
    assert len(ranges) <= max(1, -(-count // grain))


def test_nothing_to_do():
    assert ranges_of(0) == []
    assert ranges_of(-3) == []


def test_arguments_come_before_the_range():
    x = np.zeros(100)

    def fill(array, value, begin, end):
        array[begin:end] += value

    parallel_for(fill, 100, x, 2.5)
    assert (x == 2.5).all()


def test_several_threads_take_part():
    together = threading.Barrier(4, timeout=10)
    parallel_for(lambda begin, end: together.wait(), 4)


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_exception_in_any_range_is_raised(bad):
    def kernel(begin, end):
        if begin <= bad < end:
            raise ValueError(f"range {begin}")

    for _ in range(3):
        with pytest.raises(ValueError, match="range"):
            parallel_for(kernel, 4)
        assert sum(end - begin for begin, end in ranges_of(100)) == 100


def test_after_an_exception_all_threads_have_stopped():
    running = []

    def kernel(begin, end):
        if begin == 0:
            raise ValueError("first")
        running.append(begin)
        time.sleep(0.02)
        running.remove(begin)

    with pytest.raises(ValueError, match="first"):
        parallel_for(kernel, 4)
    assert not running


def test_a_call_inside_a_range_runs_in_its_thread():
    total = np.zeros(16, int)

    def inner(first, begin, end):
        total[first + begin : first + end] += 1

    def outer(begin, end):
        for i in range(begin, end):
            parallel_for(inner, 4, 4 * i)

    parallel_for(outer, 4)
    assert (total == 1).all()


def test_calls_from_several_threads():
    results = np.zeros((6, 1000), int)

    def add(row, begin, end):
        results[row, begin:end] += 1

    def caller(row):
        for _ in range(50):
            parallel_for(add, 1000, row)

    callers = [threading.Thread(target=caller, args=(row,)) for row in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert (results == 50).all()


def test_setting_the_number_of_threads():
    set_threads(3)
    assert get_threads() == 3
    assert len(ranges_of(100)) == 3
    set_threads(1)
    assert ranges_of(100) == [(0, 100)]
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count: got {count}, expected at least 1"):
            set_threads(count)
    assert get_threads() == 1


def test_cores_of_this_process():
    assert 1 <= parallel.available_cores() <= (os.cpu_count() or 1)


def interrupt_main_thread(after):
    ident = threading.main_thread().ident
    threading.Timer(after, lambda: signal.pthread_kill(ident, signal.SIGINT)).start()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
@pytest.mark.parametrize("caller_sleeps", [0, 10], ids=["awaiting others", "in its own range"])
def test_an_interrupt_waits_for_the_other_threads(caller_sleeps):
    together, finished, main = threading.Barrier(4), [], threading.current_thread()

    def kernel(begin, end):
        together.wait(timeout=10)
        if threading.current_thread() is main:
            interrupt_main_thread(after=0.1)
            time.sleep(caller_sleeps)
        else:
            time.sleep(0.4)
            finished.append(begin)

    with pytest.raises(KeyboardInterrupt):
        parallel_for(kernel, 4)
    assert len(finished) == 3
    assert len(ranges_of(100)) == 4


class _Interrupting:
    """A lock with one Ctrl-C right after it was taken, where the interpreter looks for signals again."""

    def __init__(self, lock):
        self.lock, self.awaited = lock, threading.Event()

    def acquire(self):
        first = not self.awaited.is_set()
        self.awaited.set()
        self.lock.acquire()
        if first:
            raise KeyboardInterrupt

    def release(self):
        self.lock.release()


def test_an_interrupt_between_two_steps_of_waiting_does_not_hang():
    set_threads(2)
    ranges_of(2)
    worker, together, main = parallel._workers[0], threading.Barrier(2), threading.current_thread()
    lock = worker._left
    worker._left = interrupting = _Interrupting(lock)

    def kernel(begin, end):
        together.wait(timeout=10)
        if threading.current_thread() is not main:
            assert interrupting.awaited.wait(timeout=10)

    try:
        with pytest.raises(KeyboardInterrupt):
            parallel_for(kernel, 2)
        for _ in range(20):
            parallel_for(lambda begin, end: together.wait(timeout=10), 2)
    finally:
        worker._left = lock


def test_a_forked_child_has_a_pool_of_its_own():
    # In a process of its own: a fork with threads is what is tested, not something to do to a test runner.
    script = """
        import os, warnings
        import numpy as np
        from ttr_kernels.common.parallel import parallel_for, set_threads, _workers
        warnings.simplefilter("ignore")
        set_threads(3)
        x = np.zeros(30)
        def fill(begin, end):
            x[begin:end] += 1
        def in_child(begin, end):
            # Forked by a range, while the pool is busy.
            if begin == 0:
                child = os.fork()
                if child == 0:
                    parallel_for(fill, 30)
                    os._exit(0 if (x == 2).all() and len(_workers) == 2 else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        parallel_for(fill, 30)
        parallel_for(in_child, 3)
        parallel_for(fill, 30)
        assert (x == 2).all()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def blas_threads():
    return [library.get_num_threads() for library in parallel._blas_libraries()]


def test_blas_has_one_thread_inside_and_its_own_afterwards(monkeypatch):
    monkeypatch.setattr(parallel, "_limited", False)
    libraries = parallel._blas_libraries()
    before = blas_threads()
    try:
        for library in libraries:
            library.set_num_threads(2)
        two = blas_threads()
        with single_threaded_blas():
            assert set(blas_threads()) <= {1}
            with single_threaded_blas():
                assert set(blas_threads()) <= {1}
            assert set(blas_threads()) <= {1}
        assert blas_threads() == two
        with pytest.raises(ZeroDivisionError), single_threaded_blas():
            1 / 0  # noqa: B018
        assert blas_threads() == two
        parallel.limit_blas()
        assert set(blas_threads()) <= {1}
        with single_threaded_blas():
            assert set(blas_threads()) <= {1}
    finally:
        for library, count in zip(libraries, before, strict=True):
            library.set_num_threads(count)


def test_blas_is_named():
    assert len(parallel.blas_versions()) == len(parallel._blas_libraries())
    assert all(isinstance(line, str) and line for line in parallel.blas_versions())
