"""Shapes that decoding attention is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention import TimeBias
from ..common.arrays import Array
from ..common.cases import Case, Operation
from . import decode_attention


def _forward(
    q: Array, k: Array, v: Array, rate: Array | None = None, tau: Array | None = None, kind: str = "log", **options: Any
) -> tuple[Array, None]:
    bias = None if rate is None or tau is None else TimeBias(rate, tau, kind)
    return decode_attention(q, k, v, time_bias=bias, **options), None


def _inputs(
    lengths: list[int], capacity: int, heads: int, dim: int, *, kv_heads: int | None = None, kind: str | None = None,
    rings: list[int] | None = None, **options: Any,
) -> Any:  # fmt: skip
    kv, count = kv_heads or heads, len(lengths) if rings is None else max(rings) + 1

    def make(rng: np.random.Generator) -> dict[str, Any]:
        own = np.arange(count) if rings is None else np.array(rings)
        k, v = rng.standard_normal((2, count, capacity, kv, dim))
        key_times = rng.uniform(0.0, 1e9, (count, capacity))
        times = np.full(len(lengths), 1.7e9)
        for b, length in enumerate(lengths):
            # Gaps over many orders of magnitude, at UNIX times: only float64 differences survive.
            newest = 1.7e9 + np.cumsum(np.exp(rng.uniform(-3, 9, min(length, capacity))))
            key_times[own[b], np.arange(length - len(newest), length) % capacity] = newest
            times[b] = newest[-1] + 3.5 if length else 1.7e9
        empty = np.ones((count, capacity), bool)
        for b, length in enumerate(lengths):
            empty[own[b], np.arange(length - min(length, capacity), length) % capacity] = False
        # A result that looks at a slot which holds nothing is NaN.
        k[empty] = v[empty] = key_times[empty] = np.nan
        inputs = {"q": rng.standard_normal((len(lengths), heads, dim)), "k": k, "v": v, **options}
        inputs["lengths"] = np.array(lengths, np.int64)
        if rings is not None:
            inputs["rings"] = own
        if kind is not None:
            inputs |= {"times": times, "key_times": key_times, "kind": kind}
            inputs |= {"rate": rng.uniform(0.1, 1.0, heads), "tau": np.exp(rng.uniform(0, 6, heads))}
        return inputs

    return make


OPERATION = Operation(
    "decode_attention",
    _forward,
    None,
    activations=("q", "k", "v"),
    parameters=("rate", "tau"),
    gradients=(),
    cases=[
        Case("one position", _inputs([1], 1, 1, 8)),
        Case("uneven lengths", _inputs([1, 0, 17, 130, 300], 300, 2, 16)),
        Case("nothing yet", _inputs([0, 0], 7, 2, 16)),
        Case("no sequences", _inputs([], 7, 2, 16)),
        Case("after the ring has wrapped", _inputs([40, 41, 79, 100_003], 40, 2, 16)),
        Case("several pieces, wrapped", _inputs([700, 1029], 515, 2, 24)),
        Case("whole pieces and one key fewer", _inputs([128, 127, 384, 383], 384, 1, 8)),
        Case("window", _inputs([3, 90, 5001], 100, 2, 16, window=33)),
        Case("window of one", _inputs([1, 9], 16, 2, 16, window=1)),
        Case("grouped heads", _inputs([60, 200], 130, 6, 16, kv_heads=2)),
        Case("one key/value head", _inputs([60], 64, 4, 8, kv_heads=1)),
        Case("wide heads", _inputs([50], 64, 1, 200)),
        Case("heads of whole vectors", _inputs([515, 38], 260, 4, 48, kv_heads=2, kind="log")),
        Case("linear bias", _inputs([9, 200], 150, 3, 16, kind="linear")),
        Case("log bias", _inputs([9, 200], 150, 3, 16, kind="log")),
        Case("everything", _inputs([140, 7, 6500], 144, 4, 24, kv_heads=2, kind="log", window=90, rings=[3, 0, 1])),
        Case(
            "16 x 1024, log bias",
            _inputs([100_000] * 16, 1024, 8, 32, kind="log"),
            timed=True,
            flops=4 * 16 * 1024 * 256,
        ),
        Case("1 x 1024, log bias", _inputs([100_000], 1024, 8, 32, kind="log"), timed=True, flops=4 * 1024 * 256),
        Case("1 x 16384, log bias", _inputs([100_000], 16384, 8, 32, kind="log"), timed=True, flops=4 * 16384 * 256),
    ],
    # The weights' error grows with the logits' magnitude, which the share of the largest value does not see.
    tolerance=2.0,
)
