"""Shapes that attention is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.cases import Case, Operation
from ..common.philox import philox_words
from . import AttentionSaved, TimeBias, attention_backward, attention_forward


def _forward(
    q: Array, k: Array, v: Array, rate: Array | None = None, tau: Array | None = None, kind: str = "log", **options: Any
) -> tuple[Array, AttentionSaved]:
    bias = None if rate is None or tau is None else TimeBias(rate, tau, kind)
    return attention_forward(q, k, v, time_bias=bias, **options)


def _backward(dout: Array, saved: AttentionSaved, **gradients: Any) -> tuple[Array | None, ...]:
    dq, dk, dv, bias = attention_backward(dout, saved, **gradients)
    return dq, dk, dv, None if bias is None else bias.rate, None if bias is None else bias.tau


def _inputs(
    batch: int, length: int, heads: int, dim: int, *, kv_heads: int | None = None, key_length: int | None = None,
    kind: str | None = None, packed: list[int] | None = None, **options: Any,
) -> Any:  # fmt: skip
    keys = length if key_length is None else key_length
    kv = heads if kv_heads is None else kv_heads

    def make(rng: np.random.Generator) -> dict[str, Any]:
        lead = (batch, length) if packed is None else (sum(packed),)
        lead_keys = (batch, keys) if packed is None else lead
        inputs: dict[str, Any] = {
            "q": rng.standard_normal((*lead, heads, dim)),
            "k": rng.standard_normal((*lead_keys, kv, dim)),
            "v": rng.standard_normal((*lead_keys, kv, dim)),
            **options,
        }
        if packed is not None:
            inputs["cu_seqlens"] = np.concatenate([[0], np.cumsum(packed)]).astype(np.int32)
        if kind is not None:
            # Gaps over many orders of magnitude, at UNIX times: only float64 differences survive.
            gaps = np.exp(rng.uniform(-3, 9, lead_keys))
            inputs["key_times"] = 1.7e9 + np.cumsum(gaps, axis=-1)
            inputs["times"] = inputs["key_times"] if packed else inputs["key_times"][:, keys - length :].copy()
            inputs |= {"rate": rng.uniform(0.1, 1.0, heads), "tau": np.exp(rng.uniform(0, 6, heads)), "kind": kind}
        return inputs

    return make


# A number of the generator as the rate: the weight that draws it, the first of the first query, is kept.
_DRAWN = float(philox_words(np.zeros(1, np.uint64), 3, 9)[0, 0]) / 2**32

OPERATION = Operation(
    "attention",
    _forward,
    _backward,
    activations=("q", "k", "v"),
    parameters=("rate", "tau"),
    gradients=("q", "k", "v", "rate", "tau"),
    cases=[
        Case("one position", _inputs(1, 1, 1, 8)),
        Case("causal", _inputs(2, 70, 2, 16)),
        Case("several tiles", _inputs(1, 300, 2, 32)),
        Case("not causal", _inputs(2, 37, 2, 24, causal=False)),
        Case("window", _inputs(1, 200, 2, 16, window=17)),
        Case("window of one", _inputs(1, 9, 2, 16, window=1)),
        Case("window, not causal", _inputs(1, 90, 1, 16, causal=False, window=20)),
        Case("fewer queries than keys", _inputs(2, 5, 2, 16, key_length=150)),
        Case("more queries than keys", _inputs(2, 80, 2, 16, key_length=9)),
        Case("grouped heads", _inputs(2, 66, 6, 16, kv_heads=2)),
        Case("one key/value head", _inputs(1, 66, 4, 8, kv_heads=1)),
        Case("packed", _inputs(1, 0, 2, 16, packed=[1, 70, 0, 3, 129])),
        Case("packed, nothing", _inputs(1, 0, 2, 16, packed=[])),
        Case("wide heads", _inputs(1, 40, 1, 200)),
        Case("linear bias", _inputs(2, 75, 3, 16, kind="linear")),
        Case("log bias", _inputs(2, 75, 3, 16, kind="log")),
        Case("log bias, fewer queries", _inputs(2, 9, 2, 16, key_length=80, kind="log")),
        Case("dropout", _inputs(2, 140, 2, 16, dropout=_DRAWN, seed=3, offset=9)),
        Case(
            "everything",
            _inputs(1, 0, 4, 24, kv_heads=2, kind="log", packed=[140, 7, 65], window=90, dropout=0.1, first_row=301),
        ),
        Case("8x256, 8 heads of 32", _inputs(8, 256, 8, 32), timed=True, flops=2 * 8 * 256 * 256 * 256),
        Case("8x256, log bias", _inputs(8, 256, 8, 32, kind="log"), timed=True, flops=2 * 8 * 256 * 256 * 256),
        Case("1x2048, log bias", _inputs(1, 2048, 8, 32, kind="log"), timed=True, flops=2 * 2048 * 2048 * 256),
    ],
    # Five products instead of two.
    backward_flops=2.5,
    # The weights' error grows with the logits' magnitude, which the share of the largest value does not see.
    tolerance=2.0,
)
