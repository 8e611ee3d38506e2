"""Causal attention in linear time through positive orthogonal random features (Choromanski et al. 2021, *Performers*).

    φ_r(x) = exp(ω_r·x̂ − |x̂|²/2)                     x̂ = √scale · x, so that E φ(q)·φ(k) / M = exp(scale · q·k)
    out_i  = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij          w_ij = exp(−rate_h (t_i − t_j) / tau_h) · φ(q_i)·φ(k_j)

An approximation of `attention` with a linear time bias: unbiased in numerator and denominator, and the better the more
features (docs/linear_attention.md has figures). The exponential decay with age is exact: it factorises over time, so
that the past is one matrix (M, D + 1) per head, which decays as a whole:

    S_i = exp(−rate (t_i − t_{i−1}) / tau) S_{i−1} + φ(k_i) [v_i, 1]ᵀ          [out_i · z_i, z_i] = φ(q_i)ᵀ S_i

A power law (TimeBias "log") and a window do not factorise so; both are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ..attention import TimeBias, TimeBiasGrad, checked_gradients, checked_offsets, checked_time_bias
from ..common.arrays import (
    FLOAT32,
    FLOAT64,
    INT64,
    Array,
    DType,
    array_module,
    check,
    check_out,
    check_parameter_gradient,
    check_same_dtype,
    contiguous,
    implementation,
    takes_cuda_arrays,
)
from .features import orthogonal_features

__all__ = [
    "LinearAttentionSaved",
    "LinearAttentionState",
    "linear_attention_backward",
    "linear_attention_extend",
    "linear_attention_forward",
    "orthogonal_features",
]


@dataclass(frozen=True)
class LinearAttentionSaved:
    """What the forward keeps for the backward: its inputs, its result, and one number per query and head."""

    q: Array
    k: Array
    v: Array
    features: Array
    out: Array
    normalizer: Array  # (rows, H): z_i, up to a factor that the backward finds again
    scale: float
    offsets: Array  # (N + 1,) int64: rows of sequence n are offsets[n]:offsets[n + 1]
    times: Array | None  # (rows,) float64
    time_bias: TimeBias | None


@dataclass(frozen=True)
class LinearAttentionState:
    """The past of R sequences: what decoding goes on from. Its size does not depend on their lengths.

    Attributes:
        sums: (R, H, M, D + 1) float32 (float64 for the reference): S, relative to exp(shift).
        shift: (R, H) like sums: largest exponent of the keys so far; −inf at the start of a sequence.
        times: (R,) float64, of the last position.
    """

    sums: Array
    shift: Array
    times: Array

    @staticmethod
    def empty(
        sequences: int, heads: int, features: int, dim: int, dtype: DType = FLOAT32, xp: ModuleType = np
    ) -> LinearAttentionState:
        """Sequences without a past; `xp` is NumPy or CuPy."""
        return LinearAttentionState(
            xp.zeros((sequences, heads, features, dim + 1), dtype), xp.full((sequences, heads), -np.inf, dtype),
            xp.zeros(sequences),
        )  # fmt: skip

    def clear(self, rings: Array) -> None:
        """Forget the past of these sequences."""
        rings = array_module(self.sums).asarray(rings)
        self.sums[rings] = 0
        self.shift[rings] = -np.inf


@takes_cuda_arrays
def linear_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    features: Array,
    *,
    scale: float | None = None,
    cu_seqlens: Array | None = None,
    times: Array | None = None,
    time_bias: TimeBias | None = None,
    out: Array | None = None,
) -> tuple[Array, LinearAttentionSaved]:
    """Attention of the module's formula, over batched or packed sequences, always causal.

    Args:
        q: (B, T, H, D), or packed (total, H, D) with `cu_seqlens`. float32, bfloat16, float16 (float64: reference).
        k, v: (B, T, H_kv, D), or packed (total, H_kv, D); query head h reads key/value head h // (H / H_kv).
        features: (M, D) float32 (float64 for the reference), ω; see `orthogonal_features`.
        scale: default 1/sqrt(D).
        cu_seqlens: (N + 1,) int32, starts of the packed sequences and the total.
        times: (B, T) or (total,) float64, not decreasing along a sequence (checked where data is read, not here).
        time_bias: rate, tau, kind "linear"; needs times.
        out: like q, receives the result.

    Returns:
        (out, saved). A query for which all weights underflow gets zeros, and gives zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what was expected.
    """
    offsets, scale, t = _checked(q, k, v, features, scale, cu_seqlens, times, time_bias)
    out = check_out("out", out, q.shape, q.dtype, q)
    normalizer = implementation(q, __package__).forward(q, k, v, features, scale, offsets, t, time_bias, out)
    return out, LinearAttentionSaved(q, k, v, features, out, normalizer, scale, offsets, t, time_bias)


@takes_cuda_arrays
def linear_attention_backward(
    dout: Array,
    saved: LinearAttentionSaved,
    *,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    drate: Array | None = None,
    dtau: Array | None = None,
) -> tuple[Array, Array, Array, TimeBiasGrad | None]:
    """Gradients of `linear_attention_forward`, exact for what it computes; the features have none.

    With u_i = [dout_i, −dout_i·out_i] / z_i, V_j = [v_j, 1], d_ij the decay and G_ij = u_i·V_j:

        dφ(q_i) = Σ_{j≤i} d_ij G_ij φ(k_j)     dφ(k_j) = Σ_{i≥j} d_ij G_ij φ(q_i)     dV_j = Σ_{i≥j} w_ij u_i
        dx̂ = ωᵀ(dφ · φ) − x̂ Σ_r dφ_r φ_r       dλ_h = −Σ_{j≤i} (t_i − t_j) w_ij G_ij,  λ = rate / tau

    Args:
        dout: like out.
        saved: from the forward.
        dq, dk, dv: like q, k, v; *written*. They may be slices of one fused array, but must not be q, k or v.
        drate, dtau: (H,) float32; *accumulated* into; zeros if not given.

    Returns:
        (dq, dk, dv, TimeBiasGrad), the last None without a time bias.
    """
    dq, dk, dv = checked_gradients(dout, saved.q, saved.k, saved.v, dq, dk, dv)
    bias = saved.time_bias
    rates: Array | None = None
    if bias is not None:
        rates = array_module(dout).zeros(bias.rate.shape, FLOAT64)
    implementation(dout, __package__).backward(dout, saved, dq, dk, dv, rates)
    if bias is None or rates is None:
        return dq, dk, dv, None
    gradient = TimeBiasGrad(
        check_parameter_gradient("drate", drate, bias.rate.shape, dout.dtype, dout),
        check_parameter_gradient("dtau", dtau, bias.rate.shape, dout.dtype, dout),
    )
    gradient.rate[...] += (rates / bias.tau).astype(gradient.rate.dtype)
    gradient.tau[...] -= (rates * bias.rate / bias.tau.astype(np.float64) ** 2).astype(gradient.tau.dtype)
    return dq, dk, dv, gradient


@takes_cuda_arrays
def linear_attention_extend(
    q: Array,
    k: Array,
    v: Array,
    features: Array,
    state: LinearAttentionState,
    *,
    rings: Array | None = None,
    scale: float | None = None,
    cu_seqlens: Array,
    times: Array | None = None,
    time_bias: TimeBias | None = None,
    out: Array | None = None,
) -> Array:
    """Packed new positions of sequences that go on from `state`, which takes them in: for decoding.

    Args:
        rings: (N,) int64, different from each other: which sequence of the state each goes on; a NumPy array on a GPU
            too. Default: all in order.
        q, k, v, features, scale, cu_seqlens, times, time_bias, out: as in `linear_attention_forward`, packed.

    Returns:
        out, what the forward over the whole sequences would give for the new positions. Time and memory depend on
        their number alone.
    """
    offsets, scale, t = _checked(q, k, v, features, scale, cu_seqlens, times, time_bias)
    sequences = len(offsets) - 1
    rings = np.arange(sequences) if rings is None else rings
    check(rings=(rings, "N", [INT64]))
    if rings.shape != (sequences,) or (sequences and not 0 <= rings.min() <= rings.max() < len(state.sums)):
        raise ValueError(f"rings: got {rings}, expected {sequences} of 0 .. {len(state.sums) - 1}")
    expected = (len(state.sums), q.shape[-2], len(features), q.shape[-1] + 1)
    if state.sums.shape != expected:
        raise ValueError(f"state.sums: got shape {state.sums.shape}, expected {expected}")
    out = check_out("out", out, q.shape, q.dtype, q)
    implementation(q, __package__).extend(q, k, v, features, scale, offsets, t, time_bias, state, rings, out)
    return out


def _checked(
    q: Array, k: Array, v: Array, features: Array, scale: float | None, cu_seqlens: Array | None, times: Array | None,
    time_bias: TimeBias | None,
) -> tuple[Array, float, Array | None]:  # fmt: skip
    lead = "total" if cu_seqlens is not None else "B T"
    sizes = check(
        q=(q, f"{lead} H D"), k=(k, f"{lead} H_kv D"), v=(v, f"{lead} H_kv D"),
        features=(features, "M D", [FLOAT32, FLOAT64]), times=(times, lead, [FLOAT64]),
    )  # fmt: skip
    dtype = check_same_dtype(q=q, k=k, v=v)
    if (features.dtype == FLOAT64) != (dtype == FLOAT64):
        wanted = FLOAT64 if dtype == FLOAT64 else FLOAT32
        raise TypeError(f"features: got dtype {features.dtype}, expected {wanted} with q of {dtype}")
    if not sizes["H_kv"] or sizes["H"] % sizes["H_kv"]:
        raise ValueError(f"k: got {sizes['H_kv']} heads, expected a divisor of the {sizes['H']} heads of q")
    if not sizes["M"]:
        raise ValueError("features: got none, expected at least one")
    if cu_seqlens is None:
        offsets = np.arange(sizes["B"] + 1, dtype=np.int64) * sizes["T"]
    else:
        offsets = checked_offsets(cu_seqlens, sizes["total"])
    if time_bias is not None:
        time_bias = checked_time_bias(time_bias, sizes["H"], q)
        if time_bias.kind != "linear":
            raise ValueError(
                f"time_bias.kind: got {time_bias.kind!r}, expected 'linear': only an exponential decay factorises"
            )
        if times is None:
            raise ValueError("times: got None, expected float64 timestamps, since a time_bias is given")
    t = None if time_bias is None or times is None else contiguous(times).reshape(-1)
    return offsets, 1.0 / math.sqrt(sizes["D"]) if scale is None else float(scale), t
