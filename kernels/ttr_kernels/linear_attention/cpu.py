"""Linear attention on CPU cores: chunks of positions, products of small matrices inside a chunk and with the past.

A unit of work is a sequence and a key/value head. It reads its rows as float32 and goes through them in chunks: inside
one, weights are a small square; what came before is a matrix (M, D + 1) that decays as a whole. Every exponent is that
of something not larger than zero, since features of keys are kept relative to the largest exponent so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, FLOAT64, Array, empty, zeros
from ..common.parallel import parallel_for, single_threaded_blas
from ..common.scratch import thread_scratch

if TYPE_CHECKING:
    from ..attention import TimeBias
    from . import LinearAttentionSaved, LinearAttentionState

CHUNK = 64
_TRIANGLE = np.tri(CHUNK, dtype=np.float32)
_MINUS_INFINITY = -math.inf
# Below this a normalizer has underflowed: its weights are rounding, and its inverse might overflow.
_SMALLEST = np.float32(1e-30)


def forward(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, out: Array,
) -> Array:  # fmt: skip
    result = empty((int(offsets[-1]), *q.shape[-2:]), FLOAT32)
    normalizer = empty(result.shape[:2], FLOAT32)

    def run(rows: slice, sequence: int, kv_head: int) -> None:
        keys = _Keys.of(k, v, rows, kv_head, features, scale, times)
        for head in _group(q, k, kv_head):
            queries, past = _rows("queries", q, rows, head, scale), _Past.none(keys)
            _forward_head(queries, keys, _rate(time_bias, head), past, result[rows, head], normalizer[rows, head])

    _each_unit(offsets, k.shape[-2], run)
    out[...] = result.reshape(out.shape)
    return normalizer


def extend(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, state: LinearAttentionState, rings: Array, out: Array,
) -> None:  # fmt: skip
    if (np.diff(offsets) == 1).all():
        _step(q, k, v, features, scale, times, time_bias, state, rings, out)
        return
    result, normalizer = empty(q.shape, FLOAT32), empty(q.shape[:2], FLOAT32)

    def run(rows: slice, sequence: int, kv_head: int) -> None:
        ring = rings[sequence]
        keys = _Keys.of(k, v, rows, kv_head, features, scale, times)
        for head in _group(q, k, kv_head):
            queries = _rows("queries", q, rows, head, scale)
            past = _Past(state.sums[ring, head], float(state.shift[ring, head]), float(state.times[ring]))
            _forward_head(queries, keys, _rate(time_bias, head), past, result[rows, head], normalizer[rows, head])
            state.sums[ring, head], state.shift[ring, head] = past.sums, past.shift

    _each_unit(offsets, k.shape[-2], run)
    out[...] = result
    some = np.diff(offsets) > 0
    if times is not None:
        state.times[rings[some]] = times[offsets[1:][some] - 1]


def backward(dout: Array, saved: LinearAttentionSaved, dq: Array, dk: Array, dv: Array, rates: Array | None) -> None:
    q, k, v, scale, bias = saved.q, saved.k, saved.v, saved.scale, saved.time_bias
    total, heads, kv_heads = int(saved.offsets[-1]), q.shape[-2], k.shape[-2]
    shape = (total, heads, q.shape[-1]), (total, kv_heads, q.shape[-1])
    gq, gk, gv = empty(shape[0], FLOAT32), empty(shape[1], FLOAT32), empty(shape[1], FLOAT32)
    # Of each sequence: summed in a fixed order.
    rate_parts = zeros((len(saved.offsets) - 1, heads), FLOAT64)

    def run(rows: slice, sequence: int, kv_head: int) -> None:
        keys = _Keys.of(k, v, rows, kv_head, saved.features, scale, saved.times)
        gk[rows, kv_head], gv[rows, kv_head] = 0, 0
        for head in _group(q, k, kv_head):
            queries = _rows("queries", q, rows, head, scale)
            given, result = _rows("given", dout, rows, head), _rows("result", saved.out, rows, head)
            u = _buffer("u", len(given), given.shape[1] + 1)
            u[:, :-1] = given
            _times("products", given, result).sum(axis=1, out=u[:, -1])
            np.negative(u[:, -1], out=u[:, -1])
            u *= _inverse(saved.normalizer[rows, head])
            dqueries, dkeys, dvalues, rate_parts[sequence, head] = _backward_head(
                queries, keys, _rate(bias, head), u, rates is not None
            )
            np.multiply(dqueries, np.float32(math.sqrt(scale)), out=gq[rows, head])
            dkeys *= np.float32(math.sqrt(scale))
            gk[rows, kv_head] += dkeys
            gv[rows, kv_head] += dvalues

    _each_unit(saved.offsets, kv_heads, run)
    dq[...], dk[...], dv[...] = gq.reshape(dq.shape), gk.reshape(dk.shape), gv.reshape(dv.shape)
    if rates is not None:
        rates += rate_parts.sum(axis=0)


@dataclass(frozen=True)
class _Keys:
    """Rows of one sequence and key/value head, float32."""

    scaled: Array  # (T, D): k̂
    exponents: Array  # (T, M): ω·k̂ − |k̂|²/2
    values: Array  # (T, D + 1): [v, 1]
    features: Array  # (M, D)
    times: Array | None  # (T,) float64

    @staticmethod
    def of(k: Array, v: Array, rows: slice, head: int, features: Array, scale: float, times: Array | None) -> _Keys:
        scaled = _rows("keys", k, rows, head, scale)
        exponents = _product("exponents", scaled, features.T)
        halves = _times("products", scaled, scaled).sum(axis=1, keepdims=True, out=_buffer("rows", len(scaled), 1))
        halves /= 2
        exponents -= halves
        values = _buffer("values", len(scaled), v.shape[-1] + 1)
        values[:, :-1] = _flat(v)[rows, head]
        values[:, -1] = 1
        return _Keys(scaled, exponents, values, features, None if times is None else times[rows])


@dataclass
class _Past:
    """What came before a chunk."""

    sums: Array  # (M, D + 1), relative to exp(shift)
    shift: float
    time: float

    @staticmethod
    def none(keys: _Keys) -> _Past:
        return _Past(_zeros("past", len(keys.features), keys.values.shape[1]), _MINUS_INFINITY, 0.0)


@dataclass(frozen=True)
class _Chunk:
    """Features of a chunk's keys, and how weights decay inside it and since the past."""

    phi_k: Array  # (C, M), relative to exp(shift)
    shift: float
    rescale: float  # of what was relative to the shift before
    ages: Array  # (C,) time since the past
    gaps: Array | None  # (C, C) t_i − t_j, 0 above the diagonal
    decay: Array  # (C, C), 0 above the diagonal
    since: Array  # (C, 1) decay from the past to each position
    until: Array  # (C, 1) decay from each position to the last
    span: float  # time from the past to the last
    through: float  # decay over it

    @staticmethod
    def of(keys: _Keys, rate: float, begin: int, end: int, shift: float, time: float) -> _Chunk:
        exponents = keys.exponents[begin:end]
        new = max(shift, float(exponents.max()))
        rescale = math.exp(shift - new)
        phi_k = np.subtract(exponents, np.float32(new), out=_buffer("phi_k", *exponents.shape))
        np.exp(phi_k, out=phi_k)
        count = end - begin
        causal = _TRIANGLE[:count, :count]
        if keys.times is None:
            ones = _TRIANGLE[-count:, :1]
            nothing = _zeros("ages", count)
            return _Chunk(phi_k, new, rescale, nothing, None, causal, ones, ones, 0.0, 1.0)
        times = keys.times[begin:end]
        # Without a past there is nothing to decay, and no time that it began.
        before = time if shift > _MINUS_INFINITY else float(times[0])
        gaps = _since("gaps", times[:, None], times, count, count)
        gaps *= causal
        ages = _since("ages", times, before, count)
        left = _since("left", times[-1], times, count)
        factor, span = np.float32(-rate), float(times[-1] - before)
        decay = _exponential("decay", factor, gaps)
        decay *= causal
        since, until = _exponential("since", factor, ages)[:, None], _exponential("until", factor, left)[:, None]
        return _Chunk(phi_k, new, rescale, ages, gaps, decay, since, until, span, math.exp(-rate * span))


def _forward_head(queries: Array, keys: _Keys, rate: float, past: _Past, out: Array, normalizer: Array) -> None:
    """Rows of one head; `past` becomes what the positions after them see."""
    for begin in range(0, len(queries), CHUNK):
        end = min(begin + CHUNK, len(queries))
        chunk = _Chunk.of(keys, rate, begin, end, past.shift, past.time)
        phi_q, values = _phi_of_queries(queries[begin:end], keys.features), keys.values[begin:end]
        before = _times("before", past.sums, np.float32(chunk.rescale))
        weights = _product("weights", phi_q, chunk.phi_k.T)
        weights *= chunk.decay
        sums = _product("sums", weights, values)
        sums += _product("more", _times("decayed", phi_q, chunk.since), before)
        over = sums[:, -1]
        np.multiply(sums[:, :-1], _inverse(over), out=out[begin:end])
        normalizer[begin:end] = over
        past.sums = _product("past", _times("decayed", chunk.phi_k, chunk.until).T, values)
        before *= np.float32(chunk.through)
        past.sums += before
        past.shift = chunk.shift
        past.time = float(keys.times[end - 1]) if keys.times is not None else 0.0


def _backward_head(
    queries: Array, keys: _Keys, rate: float, u: Array, with_rate: bool
) -> tuple[Array, Array, Array, float]:
    """Gradients of q̂, k̂, v, and of the rate of decay: forwards with the past, then backwards with the future."""
    dqueries, dkeys, dvalues = (_buffer(name, *queries.shape) for name in ("dqueries", "dkeys", "dvalues"))
    past, drate = _Past.none(keys), 0.0
    # Σ (time since) · decay · φ(k) [v, 1]ᵀ: the derivative of the past by the rate.
    aged = _zeros("aged", *past.sums.shape)
    chunks = []
    for begin in range(0, len(queries), CHUNK):
        end = min(begin + CHUNK, len(queries))
        chunk = _Chunk.of(keys, rate, begin, end, past.shift, past.time)
        chunks.append((begin, end, past.shift, past.time))
        phi_q, values, own = _phi_of_queries(queries[begin:end], keys.features), keys.values[begin:end], u[begin:end]
        before = _times("before", past.sums, np.float32(chunk.rescale))
        aged *= np.float32(chunk.rescale)
        inside = _product("inside", own, values.T)
        inside *= chunk.decay
        seen = _product("seen", own, before.T)
        seen *= chunk.since
        dphi = _product("dphi", inside, chunk.phi_k)
        dphi += seen
        dphi *= phi_q
        _through_features(dphi, queries[begin:end], keys.features, dqueries[begin:end])
        if with_rate and chunk.gaps is not None:
            inside *= _product("weights", phi_q, chunk.phi_k.T)
            inside *= chunk.gaps
            drate -= float(inside.sum(dtype=np.float64))
            of_past = _product("of past", own, aged.T)
            of_past *= chunk.since
            seen *= chunk.ages[:, None]
            seen += of_past
            seen *= phi_q
            drate -= float(seen.sum(dtype=np.float64))
            assert keys.times is not None
            left = _since("left", keys.times[end - 1], keys.times[begin:end], end - begin)[:, None]
            aged += _times("more", before, np.float32(chunk.span))
            aged *= np.float32(chunk.through)
            left *= chunk.until
            aged += _product("more", _times("decayed", chunk.phi_k, left).T, values)
        past.sums = _product("past", _times("decayed", chunk.phi_k, chunk.until).T, values)
        before *= np.float32(chunk.through)
        past.sums += before
        past.shift = chunk.shift
        past.time = float(keys.times[end - 1]) if keys.times is not None else 0.0
    future = _zeros("future", *past.sums.shape)
    for begin, end, shift, time in reversed(chunks):
        chunk = _Chunk.of(keys, rate, begin, end, shift, time)
        phi_q, values, own = _phi_of_queries(queries[begin:end], keys.features), keys.values[begin:end], u[begin:end]
        inside = _product("inside", own, values.T)
        inside *= chunk.decay
        dphi = _product("dphi", values, future.T)
        dphi *= chunk.until
        dphi += _product("of past", inside.T, phi_q)
        dphi *= chunk.phi_k
        _through_features(dphi, keys.scaled[begin:end], keys.features, dkeys[begin:end])
        weights = _product("weights", phi_q, chunk.phi_k.T)
        weights *= chunk.decay
        sums = _product("sums", weights.T, own)
        sums += _product("more", _times("decayed", chunk.phi_k, chunk.until), future)
        dvalues[begin:end] = sums[:, :-1]
        # As the chunk before sees it.
        future *= np.float32(chunk.through)
        future += _product("more", _times("decayed", phi_q, chunk.since).T, own)
        future *= np.float32(chunk.rescale)
    return dqueries, dkeys, dvalues, drate


def _step(
    q: Array, k: Array, v: Array, features: Array, scale: float, times: Array | None, time_bias: TimeBias | None,
    state: LinearAttentionState, rings: Array, out: Array,
) -> None:  # fmt: skip
    """One position of each sequence, all heads at once: the recurrence as it stands."""
    group = q.shape[1] // k.shape[1]
    root = np.float32(math.sqrt(scale))
    queries, keys = q.astype(FLOAT32) * root, k.astype(FLOAT32) * root
    with single_threaded_blas():
        exponents = np.repeat(keys @ features.T - (keys**2).sum(-1, keepdims=True) / 2, group, axis=1)
        phi_q = _phi_of_queries(queries, features)
        before = state.shift[rings]
        shift = np.maximum(before, exponents.max(axis=-1))
        factor = np.exp(before - shift)
        if time_bias is not None and times is not None:
            # Where there is no past, there is no time that it began.
            gaps = np.where(np.isfinite(before), (times - state.times[rings])[:, None], 0.0)
            factor = factor * np.exp(-gaps * (time_bias.rate / time_bias.tau)).astype(np.float32)
        phi_k = np.exp(exponents - shift[..., None])
        values = np.repeat(np.concatenate([v.astype(FLOAT32), np.ones((*v.shape[:2], 1), np.float32)], -1), group, 1)
        sums = state.sums[rings]
        sums *= factor[..., None, None]
        sums += phi_k[..., None] * values[:, :, None, :]
        result = (phi_q[:, :, None, :] @ sums)[:, :, 0]
    over = result[..., -1:]
    out[...] = result[..., :-1] * np.divide(1, over, out=np.zeros_like(over), where=over > _SMALLEST)
    state.sums[rings], state.shift[rings] = sums, shift
    if times is not None:
        state.times[rings] = times


def _phi_of_queries(queries: Array, features: Array) -> Array:
    """φ(q) up to a factor of each row, which the normalizer takes out again (|q̂|²/2 too)."""
    lead = queries.shape[:-1]
    phi: Array = np.matmul(queries, features.T, out=_buffer("phi_q", *lead, len(features)))
    phi -= phi.max(axis=-1, keepdims=True, out=_buffer("rows", *lead, 1))
    np.exp(phi, out=phi)
    return phi


def _through_features(dexponents: Array, scaled: Array, features: Array, gradient: Array) -> None:
    """Gradient of x̂ from that of its exponents ω·x̂ − |x̂|²/2."""
    np.matmul(dexponents, features, out=gradient)
    sums = dexponents.sum(axis=1, keepdims=True, out=_buffer("rows", len(dexponents), 1))
    gradient -= _times("products", scaled, sums)


def _buffer(name: str, *shape: int) -> Array:
    """float32 of this thread's, with undefined content; the one before of the same name is gone."""
    size = math.prod(shape)
    return thread_scratch(size, f"linear {name}")[:size].reshape(shape)


def _zeros(name: str, *shape: int) -> Array:
    made = _buffer(name, *shape)
    made.fill(0)
    return made


def _product(name: str, a: Array, b: Array) -> Array:
    """a b, in the buffer of that name, as are the results below."""
    made: Array = np.matmul(a, b, out=_buffer(name, a.shape[0], b.shape[1]))
    return made


def _times(name: str, a: Array, b: Any) -> Array:
    """a · b, like a."""
    made: Array = np.multiply(a, b, out=_buffer(name, *a.shape))
    return made


def _exponential(name: str, factor: Any, a: Array) -> Array:
    """exp(factor · a), like a."""
    made = _times(name, a, factor)
    np.exp(made, out=made)
    return made


def _since(name: str, time: Any, before: Any, *shape: int) -> Array:
    """time − before, formed in float64."""
    made: Array = np.subtract(time, before, out=_buffer(name, *shape), dtype=np.float64, casting="same_kind")
    return made


def _inverse(normalizer: Array) -> Array:
    """(rows, 1): 1 / normalizer, 0 where it has underflowed."""
    inverse, usable = _buffer("inverse", len(normalizer)), _buffer("rows", len(normalizer))
    np.divide(1, np.maximum(normalizer, _SMALLEST, out=inverse), out=inverse)
    inverse *= np.greater(normalizer, _SMALLEST, out=usable)
    return inverse[:, None]


def _each_unit(offsets: Array, kv_heads: int, run: Callable[[slice, int, int], None]) -> None:
    """`run(rows, sequence, key/value head)` for all of them, on all threads; the longest sequences first."""
    lengths = np.diff(offsets)
    units = [(n, head) for n in np.argsort(-lengths, kind="stable").tolist() if lengths[n] for head in range(kv_heads)]

    def work(begin: int, end: int) -> None:
        for sequence, head in units[begin:end]:
            run(slice(int(offsets[sequence]), int(offsets[sequence + 1])), sequence, head)

    with single_threaded_blas():
        parallel_for(work, len(units), even=False)


def _group(q: Array, k: Array, kv_head: int) -> range:
    group = q.shape[-2] // k.shape[-2]
    return range(kv_head * group, (kv_head + 1) * group)


def _flat(array: Array) -> Array:
    """(total, heads, D)."""
    return array if array.ndim == 3 else array.reshape(-1, *array.shape[-2:])


def _rows(name: str, array: Array, rows: slice, head: int, scale: float = 1.0) -> Array:
    """(T, D) float32 of one sequence and head, a copy, times the root of `scale`."""
    source = _flat(array)[rows, head]
    copy = _buffer(name, *source.shape)
    copy[...] = source
    if scale != 1.0:
        copy *= np.float32(math.sqrt(scale))
    return copy


def _rate(bias: TimeBias | None, head: int) -> float:
    return 0.0 if bias is None else float(bias.rate[head]) / float(bias.tau[head])
