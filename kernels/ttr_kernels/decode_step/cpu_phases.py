"""The phases of a fused step. Every thread runs `step_phases`; in each phase it takes units until none is left.

What every unit of a phase reads, such as the normed rows, each thread computes for itself: that costs less than a phase
of its own. A unit is a few rows of a weight matrix, or a piece of a sequence's keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..attention.cpu_tile import Rows
from ..common.compilation import jit_within
from ..common.dot_products import dot_products
from ..common.ranges import jit_ranges
from ..common.storage import store
from ..common.team import done, take, wait
from ..common.vector_math import sincos_of_phase
from ..decode_attention.cpu_pieces import KEYS, Options, attend_piece, combine_pieces
from ..geglu.cpu import phi_tanh
from . import BLOCK_WEIGHTS, MODEL_WEIGHTS

PHASES_OF_A_BLOCK = 5
# Weights of a unit: some microseconds of reading, many times what taking a unit costs.
_UNIT = 1 << 14
_ONE = np.float32(1.0)
# Positions in FusedStep.model and in a row of FusedStep.blocks.
_TABLE, _ABSOLUTE, _GAP, _PROJECT, _FINAL_NORM, _HEAD = map(
    MODEL_WEIGHTS.index, ("table", "absolute.frequency", "gap.frequency", "project", "final_norm", "head")
)
_ATTENTION_NORM, _QKV, _OUTPUT, _FEED_FORWARD_NORM, _UP, _DOWN = range(len(BLOCK_WEIGHTS))


class Sizes(NamedTuple):
    """Scalars of one call."""

    batch: int
    pieces: int
    embed_dim: int
    hidden_dim: int
    heads: int
    kv_heads: int
    dim: int
    blocks: int
    vocabulary: int
    features: int
    absolute: bool
    gap: bool
    capacity: int
    span: int
    bias: int
    time_scale: float
    time_span: float
    rope_base: float
    eps: np.float32


@jit_ranges
def step_phases(
    sizes: Any, model: Any, blocks: Any, vectors: Any, matrices: Any, keys: Any, values: Any, key_times: Any,
    tokens: Any, times: Any, gaps: Any, positions: Any, rings: Any, rate: Any, tau: Any, x: Any, queries: Any,
    hidden: Any, partial: Any, statistics: Any, control: Any, logits: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """One thread's part of a step; see FusedStep for the arrays. x is the residual stream, (B, C)."""
    batch, width = sizes.batch, sizes.heads * sizes.dim
    rows = np.empty(batch * max(sizes.embed_dim, width, 2 * sizes.features), np.float32)
    tile = np.empty(batch * max(2 * _unit_rows(1), sizes.dim), np.float32)
    cos, sin = np.empty((2, batch * (sizes.dim // 2)), np.float32)
    _rotate(sizes, positions, cos, sin)
    lengths = positions + 1
    query, head_result = np.empty(width, np.float32), np.empty(sizes.dim, np.float32)
    head_logits, ages = np.empty(sizes.heads * KEYS, np.float32), np.empty(KEYS, np.float32)
    _embed(sizes, model, vectors, matrices, tokens, times, gaps, x, rows, tile, control)
    phase = 1
    for block in range(sizes.blocks):
        weights = blocks[block]
        _project(
            sizes, weights, vectors, matrices, keys[block], values[block], key_times[block], times, positions, rings,
            cos, sin, x, queries, rows, tile, control, phase,
        )  # fmt: skip
        _attend(
            sizes, keys[block], values[block], key_times[block], times, lengths, rings, rate[block], tau[block],
            queries, query, head_logits, ages, partial, statistics, control, phase + 1,
        )  # fmt: skip
        _add_attention(sizes, weights, matrices, partial, statistics, head_result, x, rows, tile, control, phase + 2)
        _gate(sizes, weights, vectors, matrices, x, hidden, rows, tile, control, phase + 3)
        _add_feed_forward(sizes, weights, matrices, hidden, x, tile, control, phase + 4)
        phase += PHASES_OF_A_BLOCK
    _predict(sizes, model, vectors, matrices, x, logits, rows, control, phase)


@jit_within
def _unit_rows(inner: int) -> int:
    """Rows of a matrix of `inner` columns in a unit: a multiple of 8, at most 512."""
    return max(8, min(512, _UNIT // inner // 8 * 8))


@jit_within
def _rotate(sizes: Any, positions: Any, cos: Any, sin: Any) -> None:
    """cos and sin (B, D / 2) of position · base^(−2j / D)."""
    half = sizes.dim // 2
    for j in range(half):
        frequency = sizes.rope_base ** (-2.0 * j / sizes.dim)
        for b in range(sizes.batch):
            at = np.uintp(b * half + j)
            sin[at], cos[at] = sincos_of_phase(positions[b] * frequency)


@jit_within
def _norm(x: Any, batch: int, width: int, weights: Any, at: int, eps: Any, out: Any) -> None:
    """out = x / sqrt(mean(x²) + eps) · weight, row by row."""
    for b in range(batch):
        squares = np.float32(0.0)
        for j in range(width):
            squares += x[np.uintp(b * width + j)] * x[np.uintp(b * width + j)]
        r = _ONE / np.sqrt(squares / np.float32(width) + eps)
        for j in range(width):
            out[np.uintp(b * width + j)] = x[np.uintp(b * width + j)] * r * weights[np.uintp(at + j)]


@jit_within
def _features(
    row: int, kind: int, count: int, model: Any, vectors: Any, moments: Any, width: int, first: int, out: Any
) -> None:
    """Time2Vec of one kind for one sequence into out[row, first : first + count]; `kind` says where its frequencies
    begin."""
    frequency, phase = model[kind], model[kind + 1]
    for k in range(count):
        angle = moments * np.float64(vectors[frequency + k]) + np.float64(vectors[phase + k])
        sine, _ = sincos_of_phase(angle)
        out[row * width + first + k] = np.float32(angle) if k == 0 else sine


@jit_within
def _embed(
    sizes: Any, model: Any, vectors: Any, matrices: Any, tokens: Any, times: Any, gaps: Any, x: Any, rows: Any,
    tile: Any, control: Any,
) -> None:  # fmt: skip
    """x = table[token] + W · features of time and gap."""
    batch, width = sizes.batch, sizes.embed_dim
    kinds = int(sizes.absolute) + int(sizes.gap)
    inner = kinds * sizes.features
    step = _unit_rows(max(inner, 1))
    units = (width + step - 1) // step
    ready = False
    while True:
        unit = take(control, 0)
        if unit >= units:
            break
        if not ready:
            for b in range(batch):
                if sizes.absolute:
                    _features(b, _ABSOLUTE, sizes.features, model, vectors, times[b] / sizes.time_span, inner, 0, rows)
                if sizes.gap:
                    moment = np.log1p(gaps[b] / sizes.time_scale)
                    _features(b, _GAP, sizes.features, model, vectors, moment, inner, inner - sizes.features, rows)
            ready = True
        first, count = unit * step, min(step, width - unit * step)
        dot_products(tile, 0, count, matrices, model[_PROJECT] + first * inner, count, inner, rows, 0, inner, batch)
        for b in range(batch):
            at, source = b * width + first, model[_TABLE] + tokens[b] * width + first
            for j in range(count):
                x[np.uintp(at + j)] = vectors[np.uintp(source + j)] + tile[np.uintp(b * count + j)]
        done(control, 0)
    wait(control, 0, units)


@jit_within
def _project(
    sizes: Any, weights: Any, vectors: Any, matrices: Any, keys: Any, values: Any, key_times: Any, times: Any,
    positions: Any, rings: Any, cos: Any, sin: Any, x: Any, queries: Any, rows: Any, tile: Any, control: Any,
    phase: int,
) -> None:  # fmt: skip
    """Queries, keys and values of the normed rows; queries and keys turn, keys, values and times go to their slots."""
    batch, width, dim, heads, kv_heads = sizes.batch, sizes.embed_dim, sizes.dim, sizes.heads, sizes.kv_heads
    every = heads + 2 * kv_heads
    step = max(1, _unit_rows(width) // dim)
    units = (every + step - 1) // step
    half, ready = dim // 2, False
    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        if not ready:
            _norm(x, batch, width, vectors, weights[_ATTENTION_NORM], sizes.eps, rows)
            ready = True
        first, count = unit * step, min(step, every - unit * step)
        dot_products(
            tile, 0, count * dim, matrices, weights[_QKV] + first * dim * width, count * dim, width, rows, 0, width,
            batch,
        )  # fmt: skip
        for b in range(batch):
            slot = rings[b] * sizes.capacity + positions[b] % sizes.capacity
            if unit == 0:
                key_times[slot] = times[b]
            for head in range(first, first + count):
                at = (b * count + head - first) * dim
                if head < heads + kv_heads:
                    for j in range(half):
                        u, v = tile[np.uintp(at + j)], tile[np.uintp(at + half + j)]
                        c, s = cos[np.uintp(b * half + j)], sin[np.uintp(b * half + j)]
                        tile[np.uintp(at + j)] = u * c - v * s
                        tile[np.uintp(at + half + j)] = u * s + v * c
                if head < heads:
                    for j in range(dim):
                        queries[np.uintp((b * heads + head) * dim + j)] = tile[np.uintp(at + j)]
                elif head < heads + kv_heads:
                    for j in range(dim):
                        store(keys, (slot * kv_heads + head - heads) * dim + j, tile[np.uintp(at + j)])
                else:
                    for j in range(dim):
                        store(values, (slot * kv_heads + head - heads - kv_heads) * dim + j, tile[np.uintp(at + j)])
        done(control, phase)
    wait(control, phase, units)


@jit_within
def _attend(
    sizes: Any, keys: Any, values: Any, key_times: Any, times: Any, lengths: Any, rings: Any, rate: Any, tau: Any,
    queries: Any, query: Any, head_logits: Any, ages: Any, partial: Any, statistics: Any, control: Any, phase: int,
) -> None:  # fmt: skip
    """The pieces of decode_attention; query, head_logits and ages are its buffers."""
    dim, stride = sizes.dim, sizes.kv_heads * sizes.dim
    options = Options(
        sizes.heads, sizes.kv_heads, dim, sizes.capacity, sizes.span, sizes.bias, np.float32(1.0 / np.sqrt(dim))
    )
    q, k, v = Rows(queries, sizes.heads * dim), Rows(keys, stride), Rows(values, stride)
    units = sizes.batch * sizes.pieces
    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        attend_piece(
            unit, sizes.pieces, q, k, v, lengths, rings, times, key_times, rate, tau, options, query, head_logits, ages,
            partial, statistics,
        )  # fmt: skip
        done(control, phase)
    wait(control, phase, units)


@jit_within
def _add_attention(
    sizes: Any, weights: Any, matrices: Any, partial: Any, statistics: Any, head_result: Any, x: Any, rows: Any,
    tile: Any, control: Any, phase: int,
) -> None:  # fmt: skip
    """x += W · the combined attention."""
    batch, width, inner = sizes.batch, sizes.embed_dim, sizes.heads * sizes.dim
    step = _unit_rows(inner)
    units = (width + step - 1) // step
    ready = False
    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        if not ready:
            for b in range(batch):
                combine_pieces(
                    b, sizes.pieces, sizes.heads, sizes.dim, partial, statistics, rows, b * inner, head_result
                )  # fmt: skip
            ready = True
        _add_product(matrices, weights[_OUTPUT], unit * step, step, width, inner, rows, batch, x, tile)
        done(control, phase)
    wait(control, phase, units)


@jit_within
def _add_product(
    matrices: Any, at: int, first: int, step: int, width: int, inner: int, rows: Any, batch: int, x: Any, tile: Any
) -> None:
    """x[:, first : first + step] += rows · W[first : first + step]ᵀ for W (width, inner)."""
    count = min(step, width - first)
    dot_products(tile, 0, count, matrices, at + first * inner, count, inner, rows, 0, inner, batch)
    for b in range(batch):
        for j in range(count):
            x[np.uintp(b * width + first + j)] += tile[np.uintp(b * count + j)]


@jit_within
def _gate(
    sizes: Any, weights: Any, vectors: Any, matrices: Any, x: Any, hidden: Any, rows: Any, tile: Any, control: Any,
    phase: int,
) -> None:  # fmt: skip
    """hidden = gelu(gate) · value of the normed rows."""
    batch, width, wide = sizes.batch, sizes.embed_dim, sizes.hidden_dim
    step = _unit_rows(2 * width)
    units = (wide + step - 1) // step
    ready = False
    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        if not ready:
            _norm(x, batch, width, vectors, weights[_FEED_FORWARD_NORM], sizes.eps, rows)
            ready = True
        first, count = unit * step, min(step, wide - unit * step)
        for half in range(2):
            dot_products(
                tile, half * count, 2 * count, matrices, weights[_UP] + (half * wide + first) * width, count, width,
                rows, 0, width, batch,
            )  # fmt: skip
        for b in range(batch):
            gate_at, value_at, target = 2 * b * count, (2 * b + 1) * count, b * wide + first
            for j in range(count):
                gate = tile[np.uintp(gate_at + j)]
                hidden[np.uintp(target + j)] = gate * phi_tanh(gate)[0] * tile[np.uintp(value_at + j)]
        done(control, phase)
    wait(control, phase, units)


@jit_within
def _add_feed_forward(
    sizes: Any, weights: Any, matrices: Any, hidden: Any, x: Any, tile: Any, control: Any, phase: int
) -> None:
    """x += W · hidden."""
    width, inner = sizes.embed_dim, sizes.hidden_dim
    step = _unit_rows(inner)
    units = (width + step - 1) // step
    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        _add_product(matrices, weights[_DOWN], unit * step, step, width, inner, hidden, sizes.batch, x, tile)
        done(control, phase)
    wait(control, phase, units)


@jit_within
def _predict(
    sizes: Any, model: Any, vectors: Any, matrices: Any, x: Any, logits: Any, rows: Any, control: Any, phase: int
) -> None:
    """Logits of the normed rows; no unit at all where none are wanted."""
    batch, width, vocabulary = sizes.batch, sizes.embed_dim, sizes.vocabulary
    step = _unit_rows(width)
    units = (vocabulary + step - 1) // step
    ready = False
    while True:
        unit = take(control, phase)
        if unit >= units:
            break
        if not ready:
            _norm(x, batch, width, vectors, model[_FINAL_NORM], sizes.eps, rows)
            ready = True
        first, count = unit * step, min(step, vocabulary - unit * step)
        dot_products(
            logits, first, vocabulary, matrices, model[_HEAD] + first * width, count, width, rows, 0, width, batch
        )
        done(control, phase)
    wait(control, phase, units)
