"""Operations of ttr_kernels as they are written in NumPy, on the same cases: a peer of `benchmarks kernels`.

Each returns its result and its backward, a function of the result's gradient. Whole-array expressions in float32, sums
along the last axis, in place where a temporary would otherwise be made for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Result = tuple[Any, Callable[[Any], Any]]
Array = np.ndarray[Any, Any]


def attention(
    q: Array, k: Array, v: Array, times: Array, key_times: Array, rate: Array, tau: Array, kind: str
) -> Result:
    assert kind == "log"
    qh, kh, vh = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    scale = np.float32(q.shape[-1] ** -0.5)
    age = np.maximum(times[:, :, None] - key_times[:, None], 0.0).astype(np.float32)[:, None]
    u = age / tau[:, None, None]
    log = np.log1p(u)
    p = qh @ kh.swapaxes(-1, -2)
    p *= scale
    p -= rate[:, None, None] * log
    p[..., ~np.tri(p.shape[-2], dtype=bool)] = -np.inf
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    y = p @ vh

    def backward(dy: Array) -> Any:
        dyh = np.ascontiguousarray(dy.swapaxes(1, 2))
        ds = dyh @ vh.swapaxes(-1, -2)
        ds -= (dyh * y).sum(axis=-1, keepdims=True)
        ds *= p
        drate = -(ds * log).sum(axis=(0, 2, 3))
        dtau = (ds * (u / (1 + u))).sum(axis=(0, 2, 3)) * rate / tau
        gradients = scale * (ds @ kh), scale * (ds.swapaxes(-1, -2) @ qh), p.swapaxes(-1, -2) @ dyh
        return *(gradient.swapaxes(1, 2) for gradient in gradients), drate, dtau

    return y.swapaxes(1, 2), backward


def cross_entropy(logits: Array, targets: Array) -> Result:
    rows = np.arange(len(targets))
    p = logits - logits.max(axis=-1, keepdims=True)
    chosen = p[rows, targets]
    np.exp(p, out=p)
    total = p.sum(axis=-1)

    def backward(dy: Any) -> Array:
        gradient: Array = p / total[:, None]
        gradient[rows, targets] -= 1
        gradient *= np.float32(dy / len(targets))
        return gradient

    return (np.log(total) - chosen).mean(), backward


def linear_cross_entropy(x: Array, weight: Array, targets: Array) -> Result:
    loss, gradient = cross_entropy(x @ weight.T, targets)

    def backward(dy: Any) -> Any:
        dlogits = gradient(dy)
        return dlogits @ weight, dlogits.T @ x

    return loss, backward


def geglu(x: Array, approximate: str) -> Result:
    gate, value = np.split(x, 2, axis=-1)
    if approximate == "none":
        half = 0.5 * (1 + _erf(gate * np.float32(math.sqrt(0.5))))
    else:
        t = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate * gate * gate))
        half = 0.5 * (1 + t)

    def backward(dy: Array) -> Array:
        if approximate == "none":
            slope = half + gate * np.exp(-0.5 * gate * gate) * np.float32(1 / math.sqrt(2 * math.pi))
        else:
            inner = np.float32(math.sqrt(2 / math.pi)) * (1 + np.float32(3 * 0.044715) * gate * gate)
            slope = half + 0.5 * gate * (1 - t * t) * inner
        return np.concatenate((dy * value * slope, dy * gate * half), axis=-1)

    return gate * half * value, backward


def _erf(x: Array) -> Array:
    # NumPy has none. Abramowitz & Stegun 1964, 7.1.26: to 1.5e-7.
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    a = [np.float32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)]
    y = ((((a[0] * t + a[1]) * t + a[2]) * t + a[3]) * t + a[4]) * t
    signed: Array = np.copysign(1 - y * np.exp(-x * x), x)
    return signed


def rms_norm(x: Array, weight: Array, eps: float, residual: Array | None = None) -> Result:
    total = x if residual is None else x + residual
    inverse = 1 / np.sqrt(np.square(total).mean(axis=-1, keepdims=True) + np.float32(eps))
    normal = total * inverse

    def backward(dy: Array) -> Any:
        scaled = dy * weight
        dx = (scaled - normal * (scaled * normal).mean(axis=-1, keepdims=True)) * inverse
        return dx, (dy * normal).sum(axis=tuple(range(x.ndim - 1)))

    return normal * weight, backward


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Result:
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(eps))
    normal = centred * inverse

    def backward(dy: Array) -> Any:
        scaled = dy * weight
        along = normal * (scaled * normal).mean(axis=-1, keepdims=True)
        dx = (scaled - scaled.mean(axis=-1, keepdims=True) - along) * inverse
        lead = tuple(range(x.ndim - 1))
        return dx, (dy * normal).sum(axis=lead), dy.sum(axis=lead)

    return normal * weight + bias, backward


def rope(x: Array, table: Any, interleaved: bool) -> Result:
    cos, sin = table.cos[:, None], table.sin[:, None]

    def rotated(given: Array, sign: int) -> Array:
        y = np.empty_like(given)
        halves = (slice(0, None, 2), slice(1, None, 2)) if interleaved else np.split(np.arange(given.shape[-1]), 2)
        first, second = (slice(h[0], h[-1] + 1) if isinstance(h, np.ndarray) else h for h in halves)
        a, b = given[..., first], given[..., second]
        y[..., first], y[..., second] = a * cos - sign * b * sin, sign * a * sin + b * cos
        return y

    return rotated(x, 1), lambda dy: rotated(dy, -1)


def time2vec(times: Array, frequency: Array, phase: Array) -> Result:
    angle = times[..., None] * frequency.astype(np.float64) + phase
    angle[..., 1:] -= 2 * np.pi * np.rint(angle[..., 1:] / (2 * np.pi))
    y = angle.astype(np.float32)
    cosine = np.cos(y[..., 1:])
    np.sin(y[..., 1:], out=y[..., 1:])

    def backward(dy: Array) -> Any:
        slope = dy.copy()
        slope[..., 1:] *= cosine
        return times @ slope, slope.sum(axis=0)

    return y, backward


def embedding(indices: Array, table: Array) -> Result:
    def backward(dy: Array) -> Array:
        gradient = np.zeros_like(table)
        np.add.at(gradient, indices, dy)
        return gradient

    return table[indices], backward


def matmul(x: Array, weight: Array) -> Result:
    return x @ weight.T, lambda dy: (dy @ weight, dy.T @ x)


def adamw(
    parameter: Array, gradient: Array, first: Array, second: Array, *, learning_rate: float, weight_decay: float,
    step: int,
) -> None:  # fmt: skip
    first *= np.float32(0.9)
    first += np.float32(0.1) * gradient
    second *= np.float32(0.999)
    second += np.float32(0.001) * np.square(gradient)
    update = np.sqrt(second / np.float32(1 - 0.999**step))
    update += np.float32(1e-8)
    np.divide(first, update, out=update)
    parameter *= np.float32(1 - learning_rate * weight_decay)
    update *= np.float32(learning_rate / (1 - 0.9**step))
    parameter -= update


OPERATIONS: dict[str, Callable[..., Result]] = {
    function.__name__: function
    for function in (
        attention, cross_entropy, linear_cross_entropy, geglu, rms_norm, layer_norm, rope, time2vec, embedding, matmul
    )
}  # fmt: skip
