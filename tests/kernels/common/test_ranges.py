"""Ranges that compiled code hands out: what is covered, by whom, and what must not hang."""

import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from ttr_kernels.common import parallel
from ttr_kernels.common.parallel import get_threads, parallel_for, set_threads
from ttr_kernels.common.ranges import jit_ranges, jit_ranges_with_slot, new_board


@jit_ranges
def _count(visits, ends, begin, end):
    for i in range(begin, end):
        visits[i] += 1
        ends[i] = end


@jit_ranges_with_slot
def _note_slot(slots, inside, work, slot, begin, end):
    # A slot of two threads at a time would be seen twice inside.
    inside[slot] += 1
    total = 0.0
    for i in range(begin, end):
        slots[i] = slot if inside[slot] == 1 else -1
        for k in range(work):
            total += np.sqrt(k + total)
    inside[slot] -= 1 if total >= 0.0 else 0


@jit_ranges
def _mixed(pair, scale, exact, nothing, out, begin, end):
    for i in range(begin, end):
        out[i] = (pair[0][i] + pair[1]) * (scale if exact else np.float32(0.0)) + len(nothing)


@jit_ranges
def _too_large(size, sums, begin, end):
    for i in range(begin, end):
        sums[i] = np.ones(size)[0]


@pytest.fixture(params=[1, 2, 5], autouse=True)
def threads(request):
    before = get_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("grain", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 3, 5, 100, 1001])
def test_ranges_cover_everything_once(count, grain, even, threads):
    for _ in range(20):
        visits, ends = np.zeros((2, count + 1), np.int64)
        parallel_for(_count, count, visits, ends, grain=grain, even=even)
        assert visits.tolist() == [1] * count + [0]
        ranges = len(set(ends[:count]))
        most = max(1, -(-count // grain))
        assert ranges == (1 if threads == 1 else min(threads, most) if even else most)


def test_small_ranges_that_threads_race_for_are_taken_once():
    visits, ends = np.zeros((2, 100_000), np.int64)
    for number in range(1, 31):
        parallel_for(_count, len(visits), visits, ends, even=False)
        assert (visits == number).all()


def test_nothing_to_do():
    visits, ends = np.zeros((2, 1), np.int64)
    for count in (0, -3):
        parallel_for(_count, count, visits, ends)
    assert visits[0] == 0


def test_arguments_of_any_kind_arrive():
    x, out = np.arange(50.0), np.zeros(50)
    parallel_for(_mixed, 50, (x, 2), np.float32(3.0), True, np.empty(0, np.int64), out)
    np.testing.assert_array_equal(out, 3 * (x + 2))


def test_threads_at_the_same_time_have_slots_of_their_own(threads):
    for _ in range(50):
        slots, inside = np.full(64, -2), np.zeros(threads, np.int64)
        parallel_for(_note_slot, 64, slots, inside, 300, even=False)
        assert set(slots) <= set(range(threads))
        assert not inside.any()


def test_other_threads_take_part(threads):
    slots, inside = np.full(64, -2), np.zeros(threads, np.int64)
    for _ in range(200):
        parallel_for(_note_slot, 64, slots, inside, 20_000, even=False)
        if len(set(slots)) > 1 or threads == 1:
            return
    raise AssertionError("the calling thread did all of it")


def test_threads_beyond_the_set_number_keep_out():
    set_threads(5)
    visits, ends = np.zeros((2, 100), np.int64)
    parallel_for(_count, 100, visits, ends)
    set_threads(2)
    for _ in range(200):
        # Slot 2 and above would write beyond `inside`, and fail the comparison.
        slots, inside = np.full(64, -2), np.zeros(2, np.int64)
        parallel_for(_note_slot, 64, slots, inside, 200, even=False)
        assert set(slots) <= {0, 1}


def test_threads_that_slept_are_woken(threads):
    for _ in range(3):
        for worker in parallel._workers:
            for _ in range(1000):
                if worker.asleep:
                    break
                threading.Event().wait(0.01)
            assert worker.asleep
        slots, inside = np.full(64, -2), np.zeros(threads, np.int64)
        parallel_for(_note_slot, 64, slots, inside, 100_000, even=False)
        assert set(slots) <= set(range(threads))
        assert threads == 1 or len(set(slots)) > 1


def test_compiled_and_python_ranges_in_turns():
    visits, ends = np.zeros((2, 97), np.int64)
    x = np.zeros(97)

    def add(begin, end):
        x[begin:end] += 1

    for _ in range(200):
        parallel_for(_count, 97, visits, ends)
        parallel_for(add, 97, even=False)
    assert set(visits) == {200}
    assert set(x) == {200}


def test_a_call_inside_a_python_range_runs_in_its_thread():
    visits, ends = np.zeros((2, 4, 16), np.int64)

    def outer(begin, end):
        for i in range(begin, end):
            parallel_for(_count, 16, visits[i], ends[i])

    parallel_for(outer, 4)
    assert (visits == 1).all()


def test_calls_from_several_threads():
    visits, ends = np.zeros((2, 6, 1000), np.int64)

    def caller(row):
        for _ in range(100):
            parallel_for(_count, 1000, visits[row], ends[row])

    callers = [threading.Thread(target=caller, args=(row,)) for row in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert (visits == 100).all()


def test_memory_that_runs_out_is_an_error_and_nothing_hangs():
    sums, (visits, ends) = np.zeros(8), np.zeros((2, 8), np.int64)
    for _ in range(3):
        with pytest.raises(MemoryError, match="_too_large"):
            parallel_for(_too_large, 8, 1 << 60, sums)
        parallel_for(_count, 8, visits, ends)
    assert set(visits) == {3}


def test_numbers_of_announcements_wrap_around(threads):
    # Of 32 bits: some days of training.
    board = new_board()
    board[0] = ((1 << 31) - 3) << 32
    visits, ends = np.zeros((2, 40), np.int64)
    for _ in range(6):
        assert _count(board, threads, 40, 4, visits, ends) == 0
    assert set(visits) == {6}
    assert board[0] >> 32 == -(1 << 31) + 3


@pytest.mark.parametrize("wait", [0.0, 0.0005, 0.002])
def test_a_program_may_end_right_after(wait, threads):
    script = f"""
        import time
        import numpy as np
        from ttr_kernels.common.conversion import set_to_zero
        from ttr_kernels.common.parallel import set_threads
        set_threads({threads})
        x = np.ones(1 << 20, np.float32)
        set_to_zero(x)
        time.sleep({wait})
        assert not x.any()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
