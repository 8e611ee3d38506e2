"""Scaled dot-product attention that decays with age, exact and in O(T) memory.

    logit_ij = scale · q_i·k_j − rate_h · φ((t_i − t_j) / tau_h)        φ(u) = u  or  log(1 + u)
    out_i    = Σ_j softmax_j(logit_ij) · v_j                            over the keys j visible to query i

Without the time bias this is Vaswani et al. 2017, eq. 1. With it, attention decays as exp(−rate·Δt/τ) ("linear", the
kernel of a Hawkes process) or as (1 + Δt/τ)^−rate ("log", Omori's power law). Blocks of keys stream past blocks of
queries under an online softmax (Dao et al. 2022, *FlashAttention*, alg. 1; Milakov & Gimelshein 2018), and the backward
recomputes the weights from the saved normalizers, so the T×S matrix never exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..common.arrays import (
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    Array,
    array_module,
    check,
    check_out,
    check_parameter_gradient,
    check_same_dtype,
    contiguous,
    empty,
    implementation,
    on_gpu,
    takes_cuda_arrays,
    view_of_cuda_array,
)
from ..common.philox import check_first_row, check_offset_at, check_rate, key_and_offset


@dataclass(frozen=True)
class TimeBias:
    """How attention decays with the time gap Δt between query and key, per head: −rate · φ(Δt / tau).

    Attributes:
        rate: (H,) float32 (float64 for the reference), used as it is: positive values decay.
        tau: (H,) like rate, positive: the time scale, in the unit of the times. No Δt / tau may overflow float32.
        kind: "linear" for φ(u) = u, "log" for φ(u) = log(1 + u).
    """

    rate: Array
    tau: Array
    kind: str = "log"


class TimeBiasGrad(NamedTuple):
    """Gradients of a TimeBias."""

    rate: Array  # (H,)
    tau: Array  # (H,)


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees, and how sequences lie in the arrays (rows of packed or batched sequences end to end)."""

    query_offsets: Array  # (N + 1,) int64: rows of sequence n are query_offsets[n]:query_offsets[n + 1]
    key_offsets: Array  # (N + 1,) int64
    causal: bool
    window: int  # 0: none


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights: its mask is a function of (seed, offset, query row, head, key in its sequence);
    query rows count from `first_row`."""

    rate: float
    seed: int
    offset: int
    first_row: int = 0
    offset_at: Array | None = None  # on a GPU, a number there that is added to offset

    def key(self, heads: int) -> Array:
        """What kernels draw with, uint32: (key low, key high, offset low, offset high, counter of the first row)."""
        return key_and_offset(self.seed, self.offset, self.first_row * heads)


@dataclass(frozen=True)
class AttentionSaved:
    """What the forward keeps for the backward: its inputs, its result, and one number per query and head."""

    q: Array
    k: Array
    v: Array
    out: Array
    log_normalizer: Array  # (query rows, H): log Σ_j exp(logit_ij); −inf where no key is visible
    scale: float
    visibility: Visibility
    times: Array | None  # (query rows,) float64
    key_times: Array | None  # (key rows,) float64
    time_bias: TimeBias | None
    dropout: Dropout


@takes_cuda_arrays
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Array | None = None,
    times: Array | None = None,
    key_times: Array | None = None,
    time_bias: TimeBias | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    first_row: int = 0,
    offset_at: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, AttentionSaved]:
    """Attention of the module's formula, over batched or packed sequences.

    Args:
        q: (B, T, H, D), or packed (total, H, D) with `cu_seqlens`. float32, bfloat16, float16 (float64: reference).
        k, v: (B, S, H_kv, D), or packed (total, H_kv, D). H must be a multiple of H_kv; query head h reads key/value
            head h // (H / H_kv) (Ainslie et al. 2023). Slices of a fused QKV array need no copy.
        scale: default 1/sqrt(D).
        causal: key j is visible to query i iff j <= i + (S - T).
        window: additionally j > i + (S - T) - window (Beltagy et al. 2020, sliding window).
        cu_seqlens: (N + 1,) int32, starts of the packed sequences and the total; from 0, not decreasing. A NumPy array
            on a GPU too, since the launch follows from it; one that lies there is copied, which waits for the GPU.
        times: (B, T) or (total,) float64, any unit; gaps are formed in float64.
        key_times: (B, S) or (total,) float64; default: times.
        time_bias: rate, tau, kind. Needs times and causal=True (φ is defined for Δt >= 0). Times must not decrease
            along a sequence; that is checked where data is read, not here. That tau is positive is checked on a CPU
            only: on a GPU, to look would be to wait.
        dropout: probability of dropping an attention weight; the mask follows from (seed, offset).
        first_row: number of the first query row in the batch that the mask is drawn for: sequences of a batch that are
            computed apart have the mask of the batch.
        offset_at: on a GPU, an array of one uint64 there that is added to offset, so that a captured CUDA graph can be
            replayed with other masks.
        out: like q, receives the result.

    Returns:
        (out, saved). A query that sees no key gets zeros.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what was expected.
    """
    if cu_seqlens is None:
        sizes = check(
            q=(q, "B T H D"), k=(k, "B S H_kv D"), v=(v, "B S H_kv D"),
            times=(times, "B T", [FLOAT64]), key_times=(key_times, "B S", [FLOAT64]),
        )  # fmt: skip
        offsets = np.arange(sizes["B"] + 1, dtype=np.int64)
        query_offsets, key_offsets = offsets * sizes["T"], offsets * sizes["S"]
    else:
        sizes = check(
            q=(q, "total H D"), k=(k, "total H_kv D"), v=(v, "total H_kv D"),
            times=(times, "total", [FLOAT64]), key_times=(key_times, "total", [FLOAT64]),
        )  # fmt: skip
        query_offsets = key_offsets = checked_offsets(cu_seqlens, sizes["total"])
    dtype = check_same_dtype(q=q, k=k, v=v)
    if sizes["H"] % max(sizes["H_kv"], 1) or not sizes["H_kv"]:
        raise ValueError(f"k: got {sizes['H_kv']} heads, expected a divisor of the {sizes['H']} heads of q")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected at least 1")
    check_rate("dropout", dropout)
    check_first_row(first_row)
    check_offset_at(offset_at, q)
    if time_bias is not None:
        time_bias = checked_time_bias(time_bias, sizes["H"], q)
        if times is None:
            raise ValueError("times: got None, expected float64 timestamps, since a time_bias is given")
        if not causal:
            raise ValueError("causal: got False, expected True with a time_bias, which is defined for gaps >= 0")
        if key_times is None and cu_seqlens is None and sizes["S"] != sizes["T"]:
            raise ValueError(f"key_times: got None, expected (B, S): S={sizes['S']} differs from T={sizes['T']}")
    out = check_out("out", out, q.shape, dtype, q)
    visibility = Visibility(query_offsets, key_offsets, causal, window or 0)
    t = None if time_bias is None or times is None else contiguous(times).reshape(-1)
    s = t if key_times is None or t is None else contiguous(key_times).reshape(-1)
    scale = 1.0 / math.sqrt(sizes["D"]) if scale is None else float(scale)
    mask = Dropout(dropout, seed, offset, first_row, offset_at)
    log_normalizer = implementation(q, __package__).forward(q, k, v, scale, visibility, t, s, time_bias, mask, out)
    return out, AttentionSaved(q, k, v, out, log_normalizer, scale, visibility, t, s, time_bias, mask)


@takes_cuda_arrays
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Array | None = None,
    times: Array | None = None,
    key_times: Array | None = None,
    time_bias: TimeBias | None = None,
    out: Array | None = None,
) -> Array:
    """`attention_forward` for inference: no dropout, nothing saved."""
    return attention_forward(
        q, k, v, scale=scale, causal=causal, window=window, cu_seqlens=cu_seqlens, times=times, key_times=key_times,
        time_bias=time_bias, out=out,
    )[0]  # fmt: skip


@takes_cuda_arrays
def attention_backward(
    dout: Array,
    saved: AttentionSaved,
    *,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    drate: Array | None = None,
    dtau: Array | None = None,
) -> tuple[Array, Array, Array, TimeBiasGrad | None]:
    """Exact gradients of `attention_forward`. With weights P, dP = keep/(1-dropout) · dout·vᵀ and D_i = dout_i·out_i:

        dS = P · (dP − D)     dq = scale · dS k     dk = scale · dSᵀ q     dv = (P · keep/(1-dropout))ᵀ dout
        drate = −Σ dS · φ(u)     dtau = Σ dS · rate · φ'(u) · u / tau     u = Δt / tau

    Args:
        dout: like out.
        saved: from the forward.
        dq, dk, dv: like q, k, v; *written*. They may be slices of one fused array, but must not be q, k or v.
        drate, dtau: (H,) float32; *accumulated* into; zeros if not given.

    Returns:
        (dq, dk, dv, TimeBiasGrad), the last None without a time bias.
    """
    dq, dk, dv = checked_gradients(dout, saved.q, saved.k, saved.v, dq, dk, dv)
    gradient = None
    if saved.time_bias is not None:
        heads = saved.time_bias.rate.shape
        gradient = TimeBiasGrad(
            check_parameter_gradient("drate", drate, heads, dout.dtype, dout),
            check_parameter_gradient("dtau", dtau, heads, dout.dtype, dout),
        )
    implementation(dout, __package__).backward(dout, saved, dq, dk, dv, gradient)
    return dq, dk, dv, gradient


def checked_gradients(
    dout: Array, q: Array, k: Array, v: Array, dq: Array | None, dk: Array | None, dv: Array | None
) -> tuple[Array, Array, Array]:
    """dq, dk, dv to write to, made if not given, for a `dout` like the output, which is like q."""
    check(dout=(dout, "... D"))
    check_same_dtype(q=q, dout=dout)
    if dout.shape != q.shape:
        raise ValueError(f"dout: got shape {dout.shape}, expected {q.shape} like out")
    return (
        check_out("dq", dq, q.shape, q.dtype, dout),
        check_out("dk", dk, k.shape, k.dtype, dout),
        check_out("dv", dv, v.shape, v.dtype, dout),
    )


def checked_offsets(cu_seqlens: Array, total: int) -> Array:
    """`cu_seqlens` as int64 on the host; for operations that take packed sequences as attention does."""
    check(cu_seqlens=(cu_seqlens, "N+1", [INT32]))
    if not isinstance(cu_seqlens, np.ndarray):
        cu_seqlens = array_module(cu_seqlens).asnumpy(cu_seqlens)
    if cu_seqlens.size == 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != total:
        ends = "nothing" if cu_seqlens.size == 0 else f"{cu_seqlens[0]} .. {cu_seqlens[-1]}"
        raise ValueError(f"cu_seqlens: got {ends}, expected to run from 0 to the total of {total}")
    offsets = contiguous(cu_seqlens, INT64)
    if np.less(offsets[1:], offsets[:-1], out=empty(len(offsets) - 1, bool)).any():
        raise ValueError(f"cu_seqlens: got a decrease at index {int(np.argmin(np.diff(offsets))) + 1}")
    return offsets


def checked_time_bias(given: TimeBias, heads: int, q: Array) -> TimeBias:
    """The bias with its arrays viewed as `q`'s kind; for operations whose weights decay as attention's do."""
    bias = TimeBias(view_of_cuda_array(given.rate), view_of_cuda_array(given.tau), given.kind)
    if bias.kind not in ("linear", "log"):
        raise ValueError(f"time_bias.kind: got {bias.kind!r}, expected 'linear' or 'log'")
    wanted = FLOAT64 if q.dtype == FLOAT64 else FLOAT32
    for name, array in (("time_bias.rate", bias.rate), ("time_bias.tau", bias.tau)):
        check(q=(q, "..."), **{name: (array, "H", [wanted])})
        if array.shape != (heads,):
            raise ValueError(f"{name}: got shape {array.shape}, expected ({heads},), one per query head")
    if not on_gpu(q) and not (bias.tau > 0).all():
        raise ValueError(f"time_bias.tau: got {float(bias.tau.min())}, expected positive time scales")
    return bias
