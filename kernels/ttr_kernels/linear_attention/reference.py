"""Linear attention in float64, one sequence and head at a time, with the whole T×T matrix: the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from ..attention import TimeBias
    from . import LinearAttentionSaved, LinearAttentionState


def forward(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, out: Array,
) -> Array:  # fmt: skip
    q, k, v = (a.reshape(-1, *a.shape[-2:]) for a in (q, k, v))
    result, normalizer = np.zeros(q.shape), np.zeros(q.shape[:2])
    for rows in _sequences(offsets):
        for head in range(q.shape[1]):
            kv = head * k.shape[1] // q.shape[1]
            decay, _ = _decay(rows, head, times, time_bias)
            weights = decay * (_phi(q[rows, head], features, scale) @ _phi(k[rows, kv], features, scale).T)
            normalizer[rows, head] = weights.sum(axis=1)
            result[rows, head] = weights @ v[rows, kv] / normalizer[rows, head, None]
    out[...] = result.reshape(out.shape)
    return normalizer


def backward(dout: Array, saved: LinearAttentionSaved, dq: Array, dk: Array, dv: Array, rates: Array | None) -> None:
    q, k, v, do, o = (a.reshape(-1, *a.shape[-2:]) for a in (saved.q, saved.k, saved.v, dout, saved.out))
    gq, gk, gv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for rows in _sequences(saved.offsets):
        for head in range(q.shape[1]):
            kv = head * k.shape[1] // q.shape[1]
            decay, gaps = _decay(rows, head, saved.times, saved.time_bias)
            phi_q, phi_k = (_phi(x, saved.features, saved.scale) for x in (q[rows, head], k[rows, kv]))
            weights = decay * (phi_q @ phi_k.T)
            over = weights.sum(axis=1, keepdims=True)
            dweights = (do[rows, head] @ v[rows, kv].T - (do[rows, head] * o[rows, head]).sum(-1, keepdims=True)) / over
            gv[rows, kv] += (weights / over).T @ do[rows, head]
            gq[rows, head] += _dphi((dweights * decay) @ phi_k, phi_q, q[rows, head], saved.features, saved.scale)
            gk[rows, kv] += _dphi((dweights * decay).T @ phi_q, phi_k, k[rows, kv], saved.features, saved.scale)
            if rates is not None:
                rates[head] -= (gaps * weights * dweights).sum()
    dq[...], dk[...], dv[...] = gq.reshape(dq.shape), gk.reshape(dk.shape), gv.reshape(dv.shape)


def extend(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, state: LinearAttentionState, rings: Array, out: Array,
) -> None:  # fmt: skip
    """The recurrence of the module's text, position by position."""
    result = np.zeros(q.shape)
    for rows, ring in zip(_sequences(offsets), rings, strict=True):
        for row in range(rows.start, rows.stop):
            for head in range(q.shape[1]):
                kv = head * k.shape[1] // q.shape[1]
                if time_bias is not None and times is not None and np.isfinite(state.shift[ring, head]):
                    rate = time_bias.rate[head] / time_bias.tau[head]
                    state.sums[ring, head] *= np.exp(-rate * (times[row] - state.times[ring]))
                state.shift[ring, head] = 0.0
                phi_q, phi_k = (_phi(x, features, scale) for x in (q[row, head], k[row, kv]))
                state.sums[ring, head] += np.outer(phi_k, np.append(v[row, kv], 1.0))
                sums = phi_q @ state.sums[ring, head]
                result[row, head] = sums[:-1] / sums[-1]
            if times is not None:
                state.times[ring] = times[row]
    out[...] = result


def _sequences(offsets: Array) -> list[slice]:
    return [slice(offsets[n], offsets[n + 1]) for n in range(len(offsets) - 1)]


def _phi(x: Array, features: Array, scale: float) -> Array:
    scaled = np.sqrt(scale) * x
    phi: Array = np.exp(scaled @ features.T - (scaled**2).sum(axis=-1, keepdims=True) / 2)
    return phi


def _dphi(dphi: Array, phi: Array, x: Array, features: Array, scale: float) -> Array:
    dexponent = dphi * phi
    gradient: Array = np.sqrt(scale) * (dexponent @ features - np.sqrt(scale) * x * dexponent.sum(-1, keepdims=True))
    return gradient


def _decay(rows: slice, head: int, times: Array | None, bias: TimeBias | None) -> tuple[Array, Array]:
    """exp(−rate · gap / tau) and the gap, both 0 above the diagonal."""
    causal = np.tril(np.ones((rows.stop - rows.start,) * 2))
    if bias is None or times is None:
        return causal, causal
    gaps = causal * (times[rows, None] - times[None, rows])
    return causal * np.exp(-bias.rate[head] / bias.tau[head] * gaps), gaps
