"""Every kind of fault, in a kernel that has it and in the same kernel without: found, named with its line, and not
imagined, whatever the order in which threads run."""

from __future__ import annotations

import re
from pathlib import Path

import emulator
import numpy as np
import pytest

from ttr_kernels.common.cuda import launch

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SOURCE = Path(__file__).parent / "kernels" / "faults.cu"
# What the checked mode says of each kernel when it is broken.
KINDS = {
    "read_past_end": "out of bounds",
    "write_before_begin": "out of bounds",
    "write_past_dynamic_shared": "out of bounds",
    "write_past_static_shared": "out of bounds",
    "too_much_static_shared": "out of bounds",
    "copy_past_end": "out of bounds",
    "read_unwritten": "uninitialised",
    "wait_too_little": "pending copy",
    "never_wait": "copy not awaited",
    "no_barrier_after_write": "race",
    "no_barrier_after_copy": "race",
    "no_barrier_before_reuse": "race",
    "no_barrier_before_prefetch": "race",
    "no_syncwarp": "race",
    "shuffle_for_barrier": "race",
    "blocks_share_an_element": "race",
    "block_reads_what_another_writes": "race",
    "plain_store_beside_atomics": "race",
    "add_floats_atomically": "float atomic",
    "half_at_barrier": "deadlock",
    "exit_before_barrier": "deadlock",
    "two_barriers": "divergent barrier",
    "lane_missing_at_shuffle": "divergent warp",
    "lane_missing_at_mma": "divergent warp",
    "lane_missing_at_ldmatrix": "divergent warp",
    "lanes_disagree": "divergent warp",
    "mask_without_itself": "divergent warp",
    "source_outside_mask": "divergent warp",
    "misaligned_vector": "misaligned",
    "misaligned_copy": "misaligned",
    "misaligned_row": "misaligned",
    "past_local_array": "out of bounds",
    "null_pointer": "wild access",
    "far_out_of_bounds": "wild access",
    "divide_by_zero": "crash",
    "endless_loop": "time limit",
    "deep_stack": "crash",
    "failed_assertion": "assertion",
}
# What needs no watching of each access: found in the plain mode too. A crash is then all that is known of some.
PLAIN = {
    **{name: kind for name, kind in KINDS.items() if kind in ("deadlock", "divergent warp", "divergent barrier")},
    **{name: kind for name, kind in KINDS.items() if kind in ("crash", "time limit", "assertion", "copy not awaited")},
    "write_before_begin": "out of bounds",
    "write_past_dynamic_shared": "out of bounds",
    "write_past_static_shared": "out of bounds",
    "too_much_static_shared": "out of bounds",
    "copy_past_end": "out of bounds",
    "misaligned_copy": "misaligned",
    "misaligned_row": "misaligned",
    "null_pointer": "crash",
    "far_out_of_bounds": "crash",
}
# By the order of threads, what is read too early is not yet written, or already written by a copy that has ended.
OR_ELSE = {"race": ("race", "uninitialised", "pending copy"), "pending copy": ("pending copy", "race")}
TWO_BLOCKS = ("blocks_share_an_element", "block_reads_what_another_writes")
# Wrong results that give a missing barrier away without any watching: by the order of threads, and of copies, alone.
WRONG_BY_ORDER = ("no_barrier_after_write", "no_barrier_before_reuse", "no_barrier_before_prefetch", "no_syncwarp")
SEEDS = range(12)


def run(name, broken, mode, seed):
    x = np.arange(64, dtype=np.float32)
    # At a multiple of 256, where an array may lie by chance: the emulator's copy does then, too.
    memory = np.zeros(128, np.float32)
    skip = -memory.ctypes.data % 256 // 4
    out = memory[skip : skip + 64]
    with launch.use_executor(emulator.EmulatorExecutor(mode, seed, time_limit=0.3 if broken else 60)):
        grid = (2,) if name in TWO_BLOCKS else (1,)
        launch.Kernel(SOURCE, name, {}).launch(x, grid, (64,), (x, out, broken), 256)
    return out


def test_all_kernels_are_tried():
    assert set(re.findall(r"TTR_KERNEL (\w+)\(", SOURCE.read_text())) == set(KINDS)


@pytest.mark.parametrize("mode", ["plain", "check"])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_imagined(name, mode):
    for seed in SEEDS:
        run(name, 0, mode, seed)


@pytest.mark.parametrize("name", KINDS)
def test_fault_is_found(name):
    for seed in SEEDS if KINDS[name] != "time limit" else (0,):
        with pytest.raises(emulator.EmulatorFault, match=name) as raised:
            run(name, 1, "check", seed)
        fault = raised.value.faults[0]
        assert fault.kind in OR_ELSE.get(KINDS[name], (KINDS[name],)), str(raised.value)
        assert "faults.cu:" in fault.where, str(raised.value)


@pytest.mark.parametrize("name", PLAIN)
def test_fault_is_found_without_watching(name):
    with pytest.raises(emulator.EmulatorFault, match=name) as raised:
        run(name, 1, "plain", 1)
    assert raised.value.faults[0].kind == PLAIN[name], str(raised.value)


@pytest.mark.parametrize("name", WRONG_BY_ORDER)
def test_missing_barrier_gives_wrong_results(name):
    expected = run(name, 0, "plain", 0)
    wrong = [not np.array_equal(run(name, 1, "plain", seed), expected) for seed in range(1, 21)]
    assert sum(wrong) >= 15


def test_message_names_kernel_place_and_thread():
    with pytest.raises(emulator.EmulatorFault) as raised:
        run("read_past_end", 1, "check", 0)
    line = next(i for i, text in enumerate(SOURCE.read_text().splitlines(), 1) if "x[threadIdx.x + (broken" in text)
    assert str(raised.value) == (
        "read_past_end, grid (1,), block (64,)\n"
        f"  out of bounds: read of 4 bytes at byte 256 of argument 0 (256 bytes) [faults.cu:{line}, "
        "thread 63 of block (0, 0, 0)]"
    )


def test_every_fault_is_listed_once():
    with pytest.raises(emulator.EmulatorFault) as raised:
        run("no_barrier_before_reuse", 1, "check", 3)
    places = [(fault.kind, fault.where) for fault in raised.value.faults]
    assert len(places) == len(set(places)) <= 2


def test_next_launch_is_not_affected():
    for name in KINDS:
        if KINDS[name] == "time limit":
            continue
        with pytest.raises(emulator.EmulatorFault):
            run(name, 1, "check", 1)
    run("no_barrier_before_prefetch", 0, "check", 1)
