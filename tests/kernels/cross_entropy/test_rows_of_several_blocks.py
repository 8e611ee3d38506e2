"""The CPU's softmax goes through a row in blocks; the tables' rows have one."""

from __future__ import annotations

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32
from ttr_kernels.cross_entropy import Smoothing, cpu, cross_entropy_backward, cross_entropy_forward

WIDTH = 600
OPTIONS = Smoothing(0.1, 0.01, -1)


def _rows(dtype):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, WIDTH))
    for row, places in enumerate([(0,), (255, 256), (300, 599), (599,), (511, 512, 513)]):
        logits[row, list(places)] = 6.0
    logits[2, 5] = logits[5, 400:] = -np.inf
    return logits.astype(dtype), np.array([0, 599, 7, -1, 300, 12], np.int32)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_best_is_the_first_of_the_largest(dtype):
    logits, targets = _rows(dtype)
    losses, best = np.empty(6, np.float32), np.empty(6, np.int32)
    cpu.losses_and_gradient(logits.copy(), targets, OPTIONS, 5, losses, best, False)
    assert best.tolist() == logits.astype(np.float32).argmax(axis=1).tolist()
    assert best[:5].tolist() == [0, 255, 300, 599, 511]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_is_the_same_with_the_losses_in_place_and_not(dtype, smoothing):
    logits, targets = _rows(dtype)
    if smoothing:
        logits[np.isneginf(logits)] = -3.0
    options = {"label_smoothing": smoothing, "z_loss": 0.01}
    _, saved = cross_entropy_forward(logits, targets, **options)
    apart = cross_entropy_backward(1.0, saved)
    # A part of a wider array, as the head of a GPU's padded classes has it.
    wide = np.zeros((6, WIDTH + 8), dtype)
    together = wide[:, :WIDTH]
    together[...] = logits
    losses, best = np.empty(6, np.float32), np.empty(6, np.int32)
    cpu.losses_and_gradient(together, targets, Smoothing(smoothing, 0.01, -1), saved.count, losses, best, True)
    in_place = cross_entropy_backward(1.0, saved, dlogits=logits)
    np.testing.assert_array_equal(apart.astype(np.float32), in_place.astype(np.float32))
    tolerance = 1e-9 if dtype == FLOAT32 else 1e-6 if dtype == FLOAT16 else 1e-4
    np.testing.assert_allclose(together.astype(np.float32), apart.astype(np.float32), rtol=0.01, atol=tolerance)
    np.testing.assert_array_equal(losses, saved.losses)
    assert not wide[:, WIDTH:].any()


def test_losses_agree_with_float64():
    logits, targets = _rows(FLOAT32)
    exact, _ = cross_entropy_forward(logits.astype(np.float64), targets, z_loss=0.01)
    loss, _ = cross_entropy_forward(logits, targets, z_loss=0.01)
    assert abs(loss - exact) < 1e-5
