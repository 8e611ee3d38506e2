"""Attention of one new position per sequence over a ring buffer of its keys and values: what decoding asks for.

    logit_j = scale · q·k_j − rate_h · φ((t − t_j) / tau_h)             φ(u) = u  or  log(1 + u)
    out     = Σ_j softmax_j(logit_j) · v_j                              over the newest positions j of the sequence

Position p of a sequence is in slot p mod capacity of its ring, so that writing moves nothing. The result is that of the
last query of `attention_forward` over the same positions. The keys are cut into pieces that are computed on their own,
also by different cores, and combined through their log-sum-exp (Dao et al. 2023, *Flash-Decoding for long-context
inference*; the identity is that of Milakov & Gimelshein 2018).
"""

from __future__ import annotations

import math

import numpy as np

from ..attention import TimeBias, checked_time_bias
from ..common.arrays import (
    FLOAT64,
    INT64,
    Array,
    array_module,
    check,
    check_out,
    check_same_dtype,
    implementation,
    takes_cuda_arrays,
)


@takes_cuda_arrays
def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    rings: Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    times: Array | None = None,
    key_times: Array | None = None,
    time_bias: TimeBias | None = None,
    out: Array | None = None,
) -> Array:
    """Attention of one query per sequence over the newest min(lengths, capacity, window) positions of its ring.

    Args:
        q: (B, H, D). float32, bfloat16, float16 (float64: reference). Slices of a fused QKV array need no copy.
        k, v: (R, capacity, H_kv, D) ring buffers. H must be a multiple of H_kv; query head h reads key/value head
            h // (H / H_kv). Copied if their rows (the first two dimensions) are not evenly spaced. Slots that hold no
            position yet are not read.
        lengths: (B,) int64, positions that each sequence has had so far, the newest of them (the query's own, when its
            key has been written) in slot (lengths − 1) mod capacity. A NumPy array on a GPU too.
        rings: (B,) int64, the ring of each query; a NumPy array on a GPU too. Default: query b reads ring b, R = B.
        scale: default 1/sqrt(D).
        window: see only the newest so many positions. A query sees itself, so this is the `window` of
            `attention_forward`.
        times: (B,) float64, of the queries, in any unit; gaps are formed in float64.
        key_times: (R, capacity) float64, of the keys.
        time_bias: rate, tau, kind. Needs times and key_times. No key may be newer than its query.
        out: like q, receives the result.

    Returns:
        out. A query whose sequence is empty gets zeros.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what was expected.
    """
    sizes = check(
        q=(q, "B H D"), k=(k, "R capacity H_kv D"), v=(v, "R capacity H_kv D"),
        times=(times, "B", [FLOAT64]), key_times=(key_times, "R capacity", [FLOAT64]),
    )  # fmt: skip
    dtype = check_same_dtype(q=q, k=k, v=v)
    if not sizes["H_kv"] or sizes["H"] % sizes["H_kv"]:
        raise ValueError(f"k: got {sizes['H_kv']} heads, expected a divisor of the {sizes['H']} heads of q")
    if not sizes["capacity"]:
        raise ValueError("k: got a capacity of 0, expected at least 1")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected at least 1")
    check(lengths=(lengths, "B", [INT64]), rings=(rings, "B", [INT64]))
    _check_indices(lengths, rings, sizes)
    if time_bias is not None:
        time_bias = checked_time_bias(time_bias, sizes["H"], q)
        if times is None or key_times is None:
            name = "times" if times is None else "key_times"
            raise ValueError(f"{name}: got None, expected float64 timestamps, since a time_bias is given")
        times, key_times = (array_module(q).ascontiguousarray(each) for each in (times, key_times))
    rings = np.arange(sizes["B"]) if rings is None else rings
    span = min(sizes["capacity"], window or sizes["capacity"])
    scale = 1.0 / math.sqrt(sizes["D"]) if scale is None else float(scale)
    out = check_out("out", out, q.shape, dtype, q)
    implementation(q, __package__).decode(q, k, v, lengths, rings, scale, span, times, key_times, time_bias, out)
    return out


def _check_indices(lengths: Array, rings: Array | None, sizes: dict[str, int]) -> None:
    if lengths.shape != (sizes["B"],):
        raise ValueError(f"lengths: got shape {lengths.shape}, expected ({sizes['B']},), one per query")
    if sizes["B"] and lengths.min() < 0:
        raise ValueError(f"lengths: got {int(lengths.min())}, expected at least 0")
    if rings is None:
        if sizes["R"] != sizes["B"]:
            raise ValueError(f"rings: got None, expected the ring of each of {sizes['B']} queries among {sizes['R']}")
    elif rings.shape != (sizes["B"],):
        raise ValueError(f"rings: got shape {rings.shape}, expected ({sizes['B']},), one per query")
    elif sizes["B"] and not 0 <= rings.min() <= rings.max() < sizes["R"]:
        raise ValueError(f"rings: got {int(rings.min())} .. {int(rings.max())}, expected 0 .. {sizes['R'] - 1}")
