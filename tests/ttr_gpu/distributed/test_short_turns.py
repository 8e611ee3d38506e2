"""A thread may ask for short turns, and keeps its priority."""

import os
import platform
import re
import threading

import pytest

from ttr_gpu.distributed.short_turns import ask_for_short_turns

HEEDED = [int(number) for number in re.findall(r"\d+", platform.release())[:2]] >= [6, 12]


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="Linux on x86-64")
def test_short_turns_are_asked_for_by_one_thread_alone():
    found = {}

    def work():
        found["taken"] = ask_for_short_turns()
        found["turn"] = turn_of(threading.get_native_id())
        found["nice"] = os.getpriority(os.PRIO_PROCESS, 0)

    before = turn_of(threading.get_native_id())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["nice"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert turn_of(threading.get_native_id()) == before
    if not found["taken"]:
        pytest.skip("sched_setattr is not allowed here")
    if found["turn"] is not None and HEEDED:  # the kernel says what it made of it
        assert found["turn"] == pytest.approx(0.1)


def turn_of(thread):
    """Milliseconds of a thread's turns, where the kernel shows them."""
    try:
        with open(f"/proc/self/task/{thread}/sched") as file:
            lines = dict(line.split(":", 1) for line in file if line.startswith("se.slice"))
    except OSError:
        return None
    return next((float(value) / 1e6 for value in lines.values()), None)
