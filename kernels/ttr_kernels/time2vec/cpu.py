"""Time2Vec on CPU cores: phases in float64, their sine and cosine in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT64, Array, contiguous, contiguous_rows, kernel_view, result_rows, zeros
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.reductions import ROWS_PER_PARTIAL
from ..common.storage import load, store
from ..common.vector_math import sincos_of_phase

if TYPE_CHECKING:
    from . import Time2VecSaved


def forward(times: Array, frequency: Array, phase: Array, out: Array) -> None:
    y, rows, stride = result_rows("out", out)
    parallel_for(_forward, rows, contiguous(times), kernel_view(frequency), kernel_view(phase), y, stride, grain=128)


def backward(dy: Array, saved: Time2VecSaved, dfrequency: Array, dphase: Array) -> None:
    g, rows, stride = contiguous_rows(dy)
    width = len(saved.frequency)
    # Times may be large and their products cancel: the sums are float64.
    partials = zeros((-(-rows // ROWS_PER_PARTIAL), 2, width), FLOAT64)
    parallel_for(
        _backward, len(partials), g, stride, rows, contiguous(saved.times), kernel_view(saved.frequency),
        kernel_view(saved.phase), partials,
    )  # fmt: skip
    sums = partials.sum(axis=0)
    dfrequency += sums[0].astype(np.float32)
    dphase += sums[1].astype(np.float32)


@jit_ranges
def _forward(times: Any, frequency: Any, phase: Any, y: Any, stride: int, begin: int, end: int) -> None:
    width = frequency.shape[0]
    for row in range(begin, end):
        t = times[row]
        for k in range(width):
            sine, _ = sincos_of_phase(t * np.float64(frequency[k]) + np.float64(phase[k]))
            store(y, row * stride + k, sine)
        if width > 0:
            store(y, row * stride, np.float32(t * np.float64(frequency[0]) + np.float64(phase[0])))


@jit_ranges
def _backward(
    dy: Any, stride: int, rows: int, times: Any, frequency: Any, phase: Any, partials: Any, begin: int, end: int
) -> None:
    width = frequency.shape[0]
    for part in range(begin, end):
        dfrequency, dphase = partials[part, 0], partials[part, 1]
        for row in range(part * ROWS_PER_PARTIAL, min((part + 1) * ROWS_PER_PARTIAL, rows)):
            t = times[row]
            for k in range(width):
                _, cosine = sincos_of_phase(t * np.float64(frequency[k]) + np.float64(phase[k]))
                slope = np.float32(1.0) if k == 0 else cosine
                d = np.float64(load(dy, row * stride + k) * slope)
                dfrequency[k] += d * t
                dphase[k] += d
