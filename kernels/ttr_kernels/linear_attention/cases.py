"""Shapes that linear attention is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention import TimeBias
from ..common.arrays import Array
from ..common.cases import Case, Operation
from . import LinearAttentionSaved, linear_attention_backward, linear_attention_forward
from .features import orthogonal_features


def _forward(
    q: Array, k: Array, v: Array, features: Array, rate: Array | None = None, tau: Array | None = None, **options: Any
) -> tuple[Array, LinearAttentionSaved]:
    bias = None if rate is None or tau is None else TimeBias(rate, tau, "linear")
    return linear_attention_forward(q, k, v, features, time_bias=bias, **options)


def _backward(dout: Array, saved: LinearAttentionSaved, **gradients: Any) -> tuple[Array | None, ...]:
    dq, dk, dv, bias = linear_attention_backward(dout, saved, **gradients)
    return dq, dk, dv, None if bias is None else bias.rate, None if bias is None else bias.tau


def _inputs(
    batch: int, length: int, heads: int, dim: int, features: int, *, kv_heads: int | None = None, decays: bool = False,
    packed: list[int] | None = None, **options: Any,
) -> Any:  # fmt: skip
    kv = heads if kv_heads is None else kv_heads

    def make(rng: np.random.Generator) -> dict[str, Any]:
        lead = (batch, length) if packed is None else (sum(packed),)
        inputs: dict[str, Any] = {
            "q": rng.standard_normal((*lead, heads, dim)),
            "k": rng.standard_normal((*lead, kv, dim)),
            "v": rng.standard_normal((*lead, kv, dim)),
            "features": orthogonal_features(features, dim, 3, np.float64),
            **options,
        }
        if packed is not None:
            inputs["cu_seqlens"] = np.concatenate([[0], np.cumsum(packed)]).astype(np.int32)
        if decays:
            # Gaps over many orders of magnitude, at UNIX times: only float64 differences survive.
            inputs["times"] = 1.7e9 + np.cumsum(np.exp(rng.uniform(-3, 7, lead)), axis=-1)
            inputs |= {"rate": rng.uniform(0.1, 1.0, heads), "tau": np.exp(rng.uniform(2, 8, heads))}
        return inputs

    return make


OPERATION = Operation(
    "linear_attention",
    _forward,
    _backward,
    activations=("q", "k", "v"),
    parameters=("features", "rate", "tau"),
    gradients=("q", "k", "v", "rate", "tau"),
    cases=[
        Case("one position", _inputs(1, 1, 1, 8, 16)),
        Case("one chunk", _inputs(2, 40, 2, 16, 32)),
        Case("several chunks", _inputs(1, 200, 2, 16, 48)),
        Case("fewer features than dimensions", _inputs(1, 70, 2, 16, 5)),
        Case("grouped heads", _inputs(2, 66, 6, 16, 24, kv_heads=2)),
        Case("packed", _inputs(1, 0, 2, 16, 32, packed=[1, 70, 0, 3, 129])),
        Case("packed, nothing", _inputs(1, 0, 2, 16, 32, packed=[])),
        Case("decay", _inputs(2, 75, 3, 16, 32, decays=True)),
        Case("decay, several chunks", _inputs(1, 200, 2, 16, 32, decays=True)),
        Case("scale", _inputs(1, 70, 2, 16, 32, scale=0.1)),
        Case("everything", _inputs(1, 0, 4, 24, 40, kv_heads=2, decays=True, packed=[140, 7, 65])),
        # Features of q and k, and the sums written and read: 8 M D for a position and head.
        Case("8x256, 128 features", _inputs(8, 256, 8, 32, 128, decays=True), timed=True, flops=8 * 128 * 2048 * 256),
        Case("1x2048, 128 features", _inputs(1, 2048, 8, 32, 128, decays=True), timed=True, flops=8 * 128 * 2048 * 256),
    ],
    # The features' exponents are sums of products like logits, whose error grows with their magnitude.
    tolerance=4.0,
)
