"""Attention in float64, one sequence and head at a time, with the whole T×S matrix: the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array
from ..common.philox import keep_threshold, philox_words

if TYPE_CHECKING:
    from . import AttentionSaved, Dropout, TimeBias, TimeBiasGrad, Visibility


def forward(
    q: Array, k: Array, v: Array, scale: float, visibility: Visibility, times: Array | None, key_times: Array | None,
    time_bias: TimeBias | None, dropout: Dropout, out: Array,
) -> Array:  # fmt: skip
    rows_q, rows_k, rows_v = (a.reshape(-1, *a.shape[-2:]) for a in (q, k, v))
    result = np.zeros(rows_q.shape)
    log_normalizer = np.full(rows_q.shape[:2], -np.inf)
    group = q.shape[-2] // k.shape[-2]
    for queries, keys in _sequences(visibility):
        visible = _visible(queries, keys, visibility)
        for head in range(q.shape[-2]):
            logits = scale * rows_q[queries, head] @ rows_k[keys, head // group].T
            if time_bias is not None and times is not None and key_times is not None:
                logits -= time_bias.rate[head] * _phi(time_bias, head, times[queries], key_times[keys], visible)[0]
            weights, normalizer = _softmax(logits, visible)
            keep = _keep(queries, keys, head, q.shape[-2], dropout)
            result[queries, head] = (weights * keep) @ rows_v[keys, head // group]
            log_normalizer[queries, head] = normalizer
    out[...] = result.reshape(out.shape)
    return log_normalizer


def backward(
    dout: Array, saved: AttentionSaved, dq: Array, dk: Array, dv: Array, gradient: TimeBiasGrad | None
) -> None:
    q, k, v, do, o = (a.reshape(-1, *a.shape[-2:]) for a in (saved.q, saved.k, saved.v, dout, saved.out))
    gq, gk, gv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    bias = saved.time_bias
    group = q.shape[1] // k.shape[1]
    for queries, keys in _sequences(saved.visibility):
        visible = _visible(queries, keys, saved.visibility)
        for head in range(q.shape[1]):
            kv = head // group
            logits = saved.scale * q[queries, head] @ k[keys, kv].T
            if bias is not None and saved.times is not None and saved.key_times is not None:
                phi, slope = _phi(bias, head, saved.times[queries], saved.key_times[keys], visible)
                logits -= bias.rate[head] * phi
            weights, _ = _softmax(logits, visible)
            keep = _keep(queries, keys, head, q.shape[1], saved.dropout)
            dp = keep * (do[queries, head] @ v[keys, kv].T)
            ds = weights * (dp - np.sum(do[queries, head] * o[queries, head], axis=-1, keepdims=True))
            gq[queries, head] = saved.scale * ds @ k[keys, kv]
            gk[keys, kv] += saved.scale * ds.T @ q[queries, head]
            gv[keys, kv] += (weights * keep).T @ do[queries, head]
            if bias is not None and gradient is not None:
                gradient.rate[head] -= np.sum(ds * phi)
                gradient.tau[head] += np.sum(ds * slope) * bias.rate[head] / bias.tau[head]
    dq[...], dk[...], dv[...] = gq.reshape(dq.shape), gk.reshape(dk.shape), gv.reshape(dv.shape)


def _sequences(visibility: Visibility) -> list[tuple[slice, slice]]:
    q, k = visibility.query_offsets, visibility.key_offsets
    return [(slice(q[n], q[n + 1]), slice(k[n], k[n + 1])) for n in range(len(q) - 1)]


def _visible(queries: slice, keys: slice, visibility: Visibility) -> Array:
    length, key_length = queries.stop - queries.start, keys.stop - keys.start
    i = np.arange(length)[:, None] + key_length - length
    j = np.arange(key_length)[None, :]
    visible: Array = np.ones((length, key_length), bool)
    if visibility.causal:
        visible &= j <= i
    if visibility.window:
        visible &= j > i - visibility.window
    return visible


def _phi(bias: TimeBias, head: int, times: Array, key_times: Array, visible: Array) -> tuple[Array, Array]:
    """φ(u) and u · φ'(u), zero where nothing is visible (there Δt may be negative)."""
    u = np.where(visible, (times[:, None] - key_times[None, :]) / bias.tau[head], 0.0)
    return (u, u) if bias.kind == "linear" else (np.log1p(u), u / (1 + u))


def _softmax(logits: Array, visible: Array) -> tuple[Array, Array]:
    logits = np.where(visible, logits, -np.inf)
    largest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    normalizer = np.where(some, largest + np.log(np.where(some, total, 1.0)), -np.inf)
    return weights / np.where(some, total, 1.0), normalizer[:, 0]


def _keep(queries: slice, keys: slice, head: int, heads: int, dropout: Dropout) -> Array:
    """keep / (1 - rate) as a matrix: the oracle of the mask that every backend draws.

    The 16 keys of a block share four Philox calls, so that the lanes of a tensor-core fragment find their words in one:
    key j uses word 2·(bit 3 of j) + (bit 0 of j) of call 4·(j // 16) + (j // 2) % 4 of its query row and head.
    """
    if dropout.rate == 0.0:
        return np.ones((1, 1))
    rows = np.arange(dropout.first_row + queries.start, dropout.first_row + queries.stop, dtype=np.uint64)[:, None]
    j = np.arange(keys.stop - keys.start, dtype=np.uint64)[None, :]
    call = 4 * (j // 16) + (j // 2) % 4
    words = philox_words(((rows * heads + head) << np.uint64(32)) + call, dropout.seed, dropout.offset)
    word = np.take_along_axis(
        words, (2 * ((j // 8) % 2) + j % 2).astype(np.int64)[..., None] + 0 * rows[..., None].astype(np.int64), axis=-1
    )
    keep: Array = (word[..., 0] >= keep_threshold(dropout.rate)) / (1.0 - dropout.rate)
    return keep
