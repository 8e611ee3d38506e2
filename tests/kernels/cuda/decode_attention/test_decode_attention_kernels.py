"""The kernels of decoding attention on the emulator, beyond the table of cases: groups of many heads, rows that begin
anywhere, results that do not depend on the rest of the batch, years between events."""

import emulator
import numpy as np
import pytest

from ttr_kernels.attention import TimeBias
from ttr_kernels.common.arrays import BFLOAT16, FLOAT64
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.decode_attention import decode_attention

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def made(lengths, capacity, heads, kv_heads, dim, dtype=np.float32):
    rng = np.random.default_rng(3)
    q = rng.standard_normal((len(lengths), heads, dim)).astype(dtype)
    k, v = rng.standard_normal((2, len(lengths), capacity, kv_heads, dim)).astype(dtype)
    return {"q": q, "k": k, "v": v, "lengths": np.array(lengths, np.int64)}


def exact(q, k, v, **options):
    return decode_attention(q.astype(FLOAT64), k.astype(FLOAT64), v.astype(FLOAT64), **options)


# The last block of nine heads has one fewer than the others.
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 1, 64), (24, 2, 128), (3, 1, 256)])
def test_groups_of_more_heads_than_a_block_takes(heads, kv_heads, dim, on_emulator):
    inputs = made([40, 200], 150, heads, kv_heads, dim, BFLOAT16)
    inputs |= {"key_times": np.cumsum(np.ones((2, 150)), axis=1), "times": np.array([160.0, 170.0])}
    single, double = (TimeBias(np.ones(heads, t), np.full(heads, 9.0, t), "log") for t in (np.float32, FLOAT64))
    got, expected = decode_attention(**inputs, time_bias=single), exact(**inputs, time_bias=double)
    np.testing.assert_allclose(got.astype(FLOAT64), expected, atol=1e-2)


def test_slices_of_fused_arrays_that_are_not_aligned(on_emulator):
    inputs = made([40, 7], 50, 4, 2, 12)
    rng = np.random.default_rng(5)
    fused = rng.standard_normal((2, 50, 2 * 2 * 12 + 1)).astype(np.float32)
    inputs["k"], inputs["v"] = (fused[..., at : at + 24].reshape(2, 50, 2, 12) for at in (1, 25))
    np.testing.assert_allclose(decode_attention(**inputs), exact(**inputs), atol=5e-6)


def test_more_pieces_than_the_combining_threads_with_logits_far_from_zero():
    """Each piece is relative to its own largest logit; of 256 threads the first sees two pieces."""
    inputs = made([33_100, 2000], 33_100, 1, 1, 4)
    inputs["q"][...] = [1, 0, 0, 0]
    # Of the first sequence only the first piece has any weight.
    inputs["k"][0, :, 0, 0] = np.where(np.arange(33_100) < 128, 400, 0)
    inputs["k"][1, :, 0, 0] = -400
    with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
        got = decode_attention(**inputs, scale=1.0)
    np.testing.assert_allclose(got, exact(**inputs, scale=1.0), atol=2e-6)


def test_a_sequence_gets_the_same_bits_in_any_batch(on_emulator):
    inputs = made([300, 9, 777], 300, 2, 1, 32)
    together = decode_attention(**inputs)
    alone = decode_attention(**{**inputs, "q": inputs["q"][:1], "lengths": np.array([300])}, rings=np.array([0]))
    np.testing.assert_array_equal(alone[0], together[0])


@pytest.mark.parametrize("heavy", [slice(128), slice(30_900, None)], ids=["first", "last"])
def test_a_piece_of_the_first_or_last_combining_warp_has_all_the_weight(heavy):
    """exp2 of its logits less those of the other pieces would be infinite."""
    inputs = made([31_000], 31_000, 1, 1, 4)
    inputs["q"][...] = [1, 0, 0, 0]
    inputs["k"][..., 0] = 0
    inputs["k"][0, heavy, 0, 0] = 400
    with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
        got = decode_attention(**inputs, scale=1.0)
    np.testing.assert_allclose(got, exact(**inputs, scale=1.0), atol=2e-6)


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_years_after_the_last_event(kind, on_emulator):
    inputs = made([150], 140, 2, 2, 16)
    key_times = np.full((1, 140), 1.7e9)
    key_times[0, np.arange(10, 150) % 140] += np.cumsum(np.random.default_rng(0).exponential(5.0, 140))
    times = np.array([key_times.max() + 1e9])
    results = []
    for dtype, attend in ((np.float32, decode_attention), (FLOAT64, exact)):
        bias = TimeBias(np.array([0.3, 1.0], dtype), np.array([20.0, 4.0], dtype), kind)
        results.append(attend(**inputs, times=times, key_times=key_times, time_bias=bias))
    np.testing.assert_allclose(*results, atol=1e-5)


def test_ages_far_below_tau_keep_their_relative_accuracy():
    """1 + u would lose them: u is 1e-5 at most, and what it is multiplied by as large as its inverse."""
    inputs = made([150], 150, 2, 2, 16)
    key_times = 1.7e9 + np.cumsum(np.random.default_rng(0).uniform(0, 2, (1, 150)), axis=1)
    results = []
    for dtype, attend in ((np.float32, decode_attention), (FLOAT64, exact)):
        bias = TimeBias(np.full(2, 1e5, dtype), np.full(2, 2e7, dtype), "log")
        with use_executor(emulator.EmulatorExecutor()), emulator.poisoned_empty():
            results.append(attend(**inputs, times=key_times[:, -1], key_times=key_times, time_bias=bias))
    np.testing.assert_allclose(*results, atol=2e-6)


def test_head_dims_without_a_kernel_are_refused(on_emulator):
    with pytest.raises(ValueError, match="q: got head dim 264, expected at most 256 on a GPU"):
        decode_attention(**made([1], 1, 1, 1, 264))
