"""Decoding attention in float64, one sequence and head at a time: the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from ..attention import TimeBias


def decode(
    q: Array, k: Array, v: Array, lengths: Array, rings: Array, scale: float, span: int, times: Array | None,
    key_times: Array | None, time_bias: TimeBias | None, out: Array,
) -> None:  # fmt: skip
    capacity, group = k.shape[1], q.shape[1] // k.shape[2]
    result = np.zeros(q.shape)
    for b, (length, ring) in enumerate(zip(lengths, rings, strict=True)):
        slots = np.arange(max(0, length - span), length) % capacity
        if not len(slots):
            continue
        for head in range(q.shape[1]):
            logits = scale * k[ring, slots, head // group] @ q[b, head]
            if time_bias is not None and times is not None and key_times is not None:
                u = (times[b] - key_times[ring, slots]) / time_bias.tau[head]
                logits -= time_bias.rate[head] * (u if time_bias.kind == "linear" else np.log1p(u))
            weights = np.exp(logits - logits.max())
            result[b, head] = weights / weights.sum() @ v[ring, slots, head // group]
    out[...] = result
