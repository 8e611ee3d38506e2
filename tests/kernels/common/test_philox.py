"""Philox4x32-10: the published answers, and masks that are fair, independent, and the same wherever they are drawn."""

import numpy as np
import pytest

from ttr_kernels.common.arrays import FLOAT64
from ttr_kernels.common.compilation import jit
from ttr_kernels.common.compiled_philox import philox
from ttr_kernels.common.parallel import get_threads, set_threads
from ttr_kernels.common.philox import check_rate, keep_threshold, key_and_offset, philox_words
from ttr_kernels.dropout_add import dropout_add_backward, dropout_add_forward, dropout_mask

# Counter, key, words: from kat_vectors of the authors' Random123 library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@jit
def _compiled_words(counters, keys, words):
    for i in range(counters.shape[0]):
        c, k = counters[i], keys[i]
        words[i, 0], words[i, 1], words[i, 2], words[i, 3] = philox(c[0], c[1], c[2], c[3], k[0], k[1])


def long_number(low, high):
    return low | high << 32


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_published_answers_in_numpy(counter, key, words):
    position, offset, seed = long_number(*counter[:2]), long_number(*counter[2:]), long_number(*key)
    assert philox_words(np.array([position], np.uint64), seed, offset).tolist() == [list(words)]


def test_published_answers_compiled():
    counters, keys, words = (np.array(column, np.uint32) for column in zip(*KNOWN_ANSWERS, strict=True))
    got = np.empty_like(words)
    _compiled_words(counters, keys, got)
    np.testing.assert_array_equal(got, words)


def test_numpy_and_compiled_agree_on_random_counters():
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 2**64, 500, np.uint64)
    seed, offset = 0xFEDCBA9876543210, 0x0123456789ABCDEF
    key = key_and_offset(seed, offset)
    counters = np.empty((500, 4), np.uint32)
    counters[:, :2] = positions.view(np.uint32).reshape(-1, 2)
    counters[:, 2:] = key[2:]
    got = np.empty((500, 4), np.uint32)
    _compiled_words(counters, np.tile(key[:2], (500, 1)), got)
    np.testing.assert_array_equal(got, philox_words(positions, seed, offset))


@pytest.mark.parametrize("number", [np.int32(7), np.int64(7), np.uint64(7), 7 + 2**64])
def test_seed_and_offset_may_be_any_integer(number):
    np.testing.assert_array_equal(key_and_offset(number, number), [7, 0, 7, 0])
    assert key_and_offset(-1, 0).tolist() == [0xFFFFFFFF, 0xFFFFFFFF, 0, 0]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements(rate):
    size = 1_000_000
    kept = dropout_mask((size,), rate=rate, seed=3)
    for words in (kept, *kept.reshape(-1, 4).T):
        deviation = np.sqrt(rate * (1 - rate) / words.size)
        assert abs(words.mean() - (1 - rate)) < 5 * deviation


def correlation(a, b):
    return np.corrcoef(a.astype(FLOAT64), b.astype(FLOAT64))[0, 1]


def test_masks_are_uncorrelated():
    size = 400_000
    mask = dropout_mask((size,), rate=0.3, seed=1, offset=0)
    others = {
        "next offset": dropout_mask((size,), rate=0.3, seed=1, offset=1),
        "offset's high word": dropout_mask((size,), rate=0.3, seed=1, offset=2**32),
        "next seed": dropout_mask((size,), rate=0.3, seed=2, offset=0),
        "seed's high word": dropout_mask((size,), rate=0.3, seed=1 + 2**32, offset=0),
        "seed and offset exchanged": dropout_mask((size,), rate=0.3, seed=0, offset=1),
        "next element": np.roll(mask, 1),
        "next call": np.roll(mask, 4),
    }
    for name, other in others.items():
        assert abs(correlation(mask, other)) < 5 / np.sqrt(size), name


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_kernel_draws_the_mask_of_the_definition(threads):
    # 70 001 elements: many blocks of the kernel, the last one ragged, several ranges of blocks.
    x = np.ones(70_001, np.float32)
    mask = dropout_mask(x.shape, rate=0.25, seed=2**63 + 5, offset=2**35 + 1)
    before = get_threads()
    set_threads(threads)
    try:
        y, saved = dropout_add_forward(x, rate=0.25, seed=2**63 + 5, offset=2**35 + 1)
        dx = dropout_add_backward(x, saved)
    finally:
        set_threads(before)
    np.testing.assert_array_equal(y, mask * np.float32(1 / 0.75))
    np.testing.assert_array_equal(dx, y)


def test_thresholds():
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(1 - 2**-53) == 2**32 - 1
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout: got .*, expected a probability in \[0, 1\)"):
            check_rate("dropout", rate)
