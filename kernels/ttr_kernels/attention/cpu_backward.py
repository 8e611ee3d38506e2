"""The backward kernel on CPU cores: for each block of keys, all queries that see it pass by; weights are recomputed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.compilation import jit, jit_exact
from ..common.storage import load
from ..common.tile_multiply import PAD, multiply
from ..common.vector_math import exp_of_nonpositive, log1p_of_nonnegative
from .cpu_tile import LINEAR, NO_BIAS, draw_factors, fetch, mask_row, scaled_ages, store_row, transpose, visible_keys

BACKWARD_QUERIES = 64
BACKWARD_KEYS = 64
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def backward_floats(width: int) -> int:
    """Floats of scratch that `backward_units` needs."""
    return (6 * BACKWARD_KEYS + 3 * BACKWARD_QUERIES) * width + 2 * BACKWARD_QUERIES * BACKWARD_KEYS


@jit
def row_dots(dout: Any, out: Any, heads: int, dim: int, dots: Any, begin: int, end: int) -> None:
    """dots[row, head] = dout · out: the sum over keys of P · dP."""
    a, a_stride, b, b_stride = dout.flat, dout.stride, out.flat, out.stride
    for row in range(begin, end):
        for head in range(heads):
            dots[row, head] = _dot(a, row * a_stride + head * dim, b, row * b_stride + head * dim, dim)


@jit_exact
def _dot(a: Any, a_at: int, b: Any, b_at: int, dim: int) -> Any:
    # Summed in the order of `multiply`: where one key has all the weight, dP − D is 0 to the bit.
    total = _ZERO
    for d in range(dim):
        total += load(a, a_at + d) * load(b, b_at + d)
    return total


@jit
def backward_units(
    units: Any, splits: int, q: Any, k: Any, v: Any, dout: Any, log_normalizer: Any, dots: Any,
    query_offsets: Any, key_offsets: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, key: Any, partial_dq: Any, dk: Any, dv: Any, bias_sums: Any, scratch: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Gradients of units [begin, end): each a sequence, a key/value head and every `splits`-th block of its keys."""
    dim, group = options.dim, options.heads // options.kv_heads
    width = (dim + PAD - 1) // PAD * PAD
    halves = np.empty((2, BACKWARD_KEYS // 4), np.uint64)
    factors = np.ones(BACKWARD_KEYS, np.float32)
    tile_times = np.zeros(BACKWARD_KEYS, np.float64)
    ages = np.empty(BACKWARD_KEYS, np.float32)
    tile_floats = BACKWARD_QUERIES * BACKWARD_KEYS
    block_floats = BACKWARD_KEYS * width
    weights_at = 0
    grads_at = weights_at + tile_floats
    keys_at = grads_at + tile_floats
    keys_transposed_at = keys_at + block_floats
    values_at = keys_transposed_at + block_floats
    values_transposed_at = values_at + block_floats
    dk_at = values_transposed_at + block_floats
    dv_at = dk_at + block_floats
    queries_at = dv_at + block_floats
    dout_at = queries_at + BACKWARD_QUERIES * width
    dq_at = dout_at + BACKWARD_QUERIES * width
    rows_of_dq = partial_dq.shape[1]
    flat_dq = partial_dq.reshape(-1)

    for unit in range(begin, end):
        sequence, kv_head, split = units[unit, 0], units[unit, 1], units[unit, 2]
        query_row, key_row = query_offsets[sequence], key_offsets[sequence]
        length, key_length = query_offsets[sequence + 1] - query_row, key_offsets[sequence + 1] - key_row
        shift = key_length - length
        for tile_key in range(split * BACKWARD_KEYS, key_length, splits * BACKWARD_KEYS):
            keys = min(BACKWARD_KEYS, key_length - tile_key)
            keys_padded = (keys + PAD - 1) // PAD * PAD
            fetch(scratch, keys_at, width, k.flat, k.stride, key_row + tile_key, keys, kv_head, dim, _ONE)
            fetch(scratch, values_at, width, v.flat, v.stride, key_row + tile_key, keys, kv_head, dim, _ONE)
            transpose(scratch, keys_transposed_at, scratch, keys_at, keys_padded, width, BACKWARD_KEYS)
            transpose(scratch, values_transposed_at, scratch, values_at, keys_padded, width, BACKWARD_KEYS)
            for i in range(2 * block_floats):
                scratch[np.uintp(dk_at + i)] = _ZERO
            if options.bias != NO_BIAS:
                for j in range(keys):
                    tile_times[j] = key_times[key_row + tile_key + j]
            # Queries that see any of these keys.
            first = max(0, tile_key - shift) if options.causal else 0
            last = min(length, tile_key + keys - shift + options.window - 1) if options.window > 0 else length
            for i0 in range(first, last, BACKWARD_QUERIES):
                queries = min(BACKWARD_QUERIES, last - i0)
                queries_padded = (queries + 7) // 8 * 8
                for g in range(group):
                    head = kv_head * group + g
                    row = query_row + i0
                    fetch(scratch, queries_at, width, q.flat, q.stride, row, queries, head, dim, options.scale)
                    fetch(scratch, dout_at, width, dout.flat, dout.stride, row, queries, head, dim, _ONE)
                    multiply(
                        scratch, weights_at, BACKWARD_KEYS, scratch, queries_at, width, 1,
                        scratch, keys_transposed_at, BACKWARD_KEYS, queries_padded, keys_padded, width, False,
                    )  # fmt: skip
                    multiply(
                        scratch, grads_at, BACKWARD_KEYS, scratch, dout_at, width, 1,
                        scratch, values_transposed_at, BACKWARD_KEYS, queries_padded, keys_padded, width, False,
                    )  # fmt: skip
                    for i in range(queries):
                        query = i0 + i
                        row_low, row_high = visible_keys(query, key_length, shift, options.causal, options.window)
                        row_low, row_high = max(row_low - tile_key, 0), min(row_high - tile_key, keys)
                        weight_row, grad_row = weights_at + i * BACKWARD_KEYS, grads_at + i * BACKWARD_KEYS
                        columns = 0 if row_low >= row_high else (row_high + PAD - 1) // PAD * PAD
                        if columns > 0:
                            mask_row(scratch, weight_row, columns, row_low, row_high)
                            if options.dropping:
                                draw_factors(
                                    factors, halves, query_row + query, head, options.heads, tile_key, columns, key,
                                    options.threshold, options.scale_bits,
                                )  # fmt: skip
                            if options.bias == NO_BIAS:
                                _gradient_row(
                                    scratch, weight_row, grad_row, columns,
                                    log_normalizer[query_row + query, head], dots[query_row + query, head], factors,
                                )  # fmt: skip
                            else:
                                scaled_ages(ages, times[query_row + query], tile_times, 0, columns, tau[head])
                                for_rate, for_tau = _gradient_row_with_bias(
                                    scratch, weight_row, grad_row, columns,
                                    log_normalizer[query_row + query, head], dots[query_row + query, head], factors,
                                    options.bias, ages, rate[head],
                                )  # fmt: skip
                                bias_sums[unit, g, 0] -= for_rate
                                bias_sums[unit, g, 1] += for_tau * rate[head] / tau[head]
                        for j in range(columns, keys_padded):
                            scratch[np.uintp(weight_row + j)] = _ZERO
                            scratch[np.uintp(grad_row + j)] = _ZERO
                    # Padded queries have zero rows of q and dout, so what their tiles hold does not matter below.
                    multiply(
                        scratch, dv_at, width, scratch, weights_at, 1, BACKWARD_KEYS, scratch, dout_at, width,
                        keys_padded, width, queries, True,
                    )  # fmt: skip
                    multiply(
                        scratch, dk_at, width, scratch, grads_at, 1, BACKWARD_KEYS, scratch, queries_at, width,
                        keys_padded, width, queries, True,
                    )  # fmt: skip
                    multiply(
                        scratch, dq_at, width, scratch, grads_at, BACKWARD_KEYS, 1, scratch, keys_at, width,
                        queries_padded, width, keys_padded, False,
                    )  # fmt: skip
                    for i in range(queries):
                        target = ((split * rows_of_dq + query_row + i0 + i) * options.heads + head) * width
                        _add_row(flat_dq, target, scratch, dq_at + i * width, width)
            for j in range(keys):
                row = key_row + tile_key + j
                store_row(dk.flat, row * dk.stride + kv_head * dim, scratch, dk_at + j * width, dim, _ONE)
                store_row(dv.flat, row * dv.stride + kv_head * dim, scratch, dv_at + j * width, dim, _ONE)


@jit
def _gradient_row(
    s: Any, weight_row: int, grad_row: int, columns: int, normalizer: Any, dot: Any, factors: Any
) -> None:
    """Logits become dropped-out weights, and the gradients of those become the gradients of the logits."""
    for j in range(columns):
        weight = exp_of_nonpositive(s[np.uintp(weight_row + j)] - normalizer)
        kept = factors[j]
        s[np.uintp(weight_row + j)] = weight * kept
        s[np.uintp(grad_row + j)] = weight * (s[np.uintp(grad_row + j)] * kept - dot)


@jit
def _gradient_row_with_bias(
    s: Any, weight_row: int, grad_row: int, columns: int, normalizer: Any, dot: Any, factors: Any,
    kind: int, ages: Any, rate: Any,
) -> Any:  # fmt: skip
    """`_gradient_row` under a time bias of the scaled ages u; also (Σ dS · φ(u), Σ dS · u · φ'(u))."""
    for_rate = _ZERO
    for_tau = _ZERO
    if kind == LINEAR:
        for j in range(columns):
            u = ages[np.uintp(j)]
            weight = exp_of_nonpositive(s[np.uintp(weight_row + j)] - rate * u - normalizer)
            kept = factors[np.uintp(j)]
            gradient = weight * (s[np.uintp(grad_row + j)] * kept - dot)
            s[np.uintp(weight_row + j)] = weight * kept
            s[np.uintp(grad_row + j)] = gradient
            for_rate += gradient * u
        for_tau = for_rate
    else:
        for j in range(columns):
            u = ages[np.uintp(j)]
            phi = log1p_of_nonnegative(u)
            weight = exp_of_nonpositive(s[np.uintp(weight_row + j)] - rate * phi - normalizer)
            kept = factors[np.uintp(j)]
            gradient = weight * (s[np.uintp(grad_row + j)] * kept - dot)
            s[np.uintp(weight_row + j)] = weight * kept
            s[np.uintp(grad_row + j)] = gradient
            for_rate += gradient * phi
            for_tau += gradient * (u / (_ONE + u))
    return for_rate, for_tau


@jit
def _add_row(target: Any, target_at: int, s: Any, at: int, width: int) -> None:
    for d in range(width):
        target[np.uintp(target_at + d)] += s[np.uintp(at + d)]


@jit
def add_query_gradients(partial_dq: Any, dq: Any, dim: int, scale: Any, begin: int, end: int) -> None:
    """dq = scale · Σ over splits of partial_dq (splits, rows, heads, width), in order; the first takes the sum."""
    splits, rows, heads, width = partial_dq.shape
    flat, target, stride = partial_dq.reshape(-1), dq.flat, dq.stride
    for row in range(begin, end):
        for split in range(1, splits):
            _add_row(flat, row * heads * width, flat, (split * rows + row) * heads * width, heads * width)
        for head in range(heads):
            store_row(target, row * stride + head * dim, flat, (row * heads + head) * width, dim, scale)
