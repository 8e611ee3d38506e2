"""What a captured step reads from the device instead of its arguments: the number that is added to dropout's offset,
and lists of a fixed length that follow from where sequences begin."""

import emulator
import numpy as np
import pytest

from ttr_kernels.attention import TimeBias, attention_backward, attention_forward
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.common.packing import PackedInputs
from ttr_kernels.dropout_add import dropout_add_backward, dropout_add_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))
ADDED = 2**41 + 7


def copy(pairs):
    for target, source in pairs:
        np.copyto(target, source)


@pytest.mark.parametrize("first_row", [0, 3])
def test_a_number_on_the_device_is_added_to_the_offset_of_dropout(first_row):
    x = np.random.default_rng(1).standard_normal((7, 33)).astype(np.float32)
    mask = {"rate": 0.4, "seed": 5, "first_row": first_row}
    results = []
    for offset, added in ((2**33 + 3, None), (2**33 + 3 - ADDED % 2**33, np.array([ADDED % 2**33], np.uint64))):
        with use_executor(emulator.EmulatorExecutor("check")), emulator.poisoned_empty():
            y, saved = dropout_add_forward(x, offset=offset, offset_at=added, **mask)
            results.append((y, dropout_add_backward(x, saved)))
    np.testing.assert_array_equal(*results)
    with use_executor(emulator.EmulatorExecutor()):
        other, _ = dropout_add_forward(x, offset=2**33 + 3, offset_at=np.array([ADDED], np.uint64), **mask)
    assert (other != results[0][0]).any()


def attended(cu_seqlens, offset=9, offset_at=None, mode="plain", inputs=None):
    """Output and gradients of attention with everything: a log bias, dropout, grouped heads, two tiles."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((cu_seqlens[-1], heads, 16)).astype(np.float32) for heads in (2, 1, 1))
    bias = TimeBias(np.array([0.5, 0.2], np.float32), np.array([2.0, 9.0], np.float32))
    times = np.cumsum(np.exp(rng.uniform(-3, 3, cu_seqlens[-1])))
    with use_executor(emulator.EmulatorExecutor(mode, 1)), emulator.poisoned_empty():
        if inputs is None:
            return _attended(q, k, v, cu_seqlens, times, bias, offset, offset_at)
        with inputs.used(cu_seqlens):
            return _attended(q, k, v, cu_seqlens, times, bias, offset, offset_at)


def _attended(q, k, v, cu_seqlens, times, bias, offset, offset_at):
    out, saved = attention_forward(
        q, k, v, cu_seqlens=cu_seqlens, times=times, time_bias=bias, dropout=0.3, seed=5, offset=offset,
        offset_at=offset_at,
    )  # fmt: skip
    dq, dk, dv, gradient = attention_backward(np.cos(out), saved)
    return [out, dq, dk, dv, *gradient]


def test_a_number_on_the_device_is_added_to_the_offset_of_attentions_dropout():
    cu_seqlens = np.array([0, 70, 75], np.int32)
    expected = attended(cu_seqlens, offset=ADDED + 2)
    for mine, its in zip(attended(cu_seqlens, 2, np.array([ADDED], np.uint64), "check"), expected, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert (attended(cu_seqlens)[0] != expected[0]).any()


def test_an_offset_on_the_device_is_one_number_and_for_gpus():
    x = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="offset_at: got an array, expected None on the CPU"):
        dropout_add_forward(x, rate=0.5, offset_at=np.zeros(1, np.uint64))
    with use_executor(emulator.EmulatorExecutor()):
        with pytest.raises(TypeError, match="offset_at: got dtype int64, expected uint64"):
            dropout_add_forward(x, rate=0.5, offset_at=np.zeros(1, np.int64))
        with pytest.raises(ValueError, match=r"offset_at: got shape \(2,\), expected one number"):
            dropout_add_forward(x, rate=0.5, offset_at=np.zeros(2, np.uint64))


def test_lists_of_a_fixed_length_give_the_same_bits_for_any_sequences():
    inputs = PackedInputs(np, 8, copy)
    for lengths in ([70, 5], [1, 0, 3, 64, 7], [75], [10] * 7 + [5]):
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        inputs.write(cu_seqlens)
        for mine, its in zip(attended(cu_seqlens, mode="check", inputs=inputs), attended(cu_seqlens), strict=True):
            np.testing.assert_array_equal(mine, its)
    lists = [each.array for name, each in inputs._inputs.items() if name[0] == "tiles"]
    assert {len(work) for work in lists} == {75 // 64 + 8}


def test_more_sequences_than_there_is_room_for_are_refused():
    inputs = PackedInputs(np, 2, copy)
    attended(np.array([0, 70, 75], np.int32), inputs=inputs)
    with pytest.raises(ValueError, match=r"cu_seqlens: .* takes 5 places, expected at most 3"):
        inputs.write(np.array([0, 10, 20, 30, 40, 75], np.int32))
