"""A pre-norm Transformer block (Xiong et al. 2020) over timestamped, packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array, array_module, check
from ttr_kernels.dropout_add import DropoutAddSaved, dropout_add_backward, dropout_add_forward
from ttr_kernels.rms_norm import RmsNormSaved, rms_norm, rms_norm_backward, rms_norm_forward
from ttr_kernels.rope import RopeTable

from ..config import DropoutConfig
from ..precision import Precision, precision
from .continuation import Continuation
from .dropout import DropoutKey
from .feed_forward_geglu import FeedForwardGeGLU, FeedForwardSaved
from .key_value_cache import KeyValueCache
from .linear_attention_cache import LinearAttentionCache
from .multi_head_attention import MultiHeadAttention, MultiHeadAttentionSaved
from .parameter import Parameter
from .sequences import Sequences

# Dropout draws in this many places per block: attention weights, its residual, feed-forward, its residual.
SITES = 4


@dataclass(frozen=True)
class TransformerBlockSaved:
    """What the forward keeps for the backward."""

    attention_norm: RmsNormSaved
    attention: MultiHeadAttentionSaved
    attention_residual: DropoutAddSaved | None
    feed_forward_norm: RmsNormSaved
    feed_forward: FeedForwardSaved
    feed_forward_residual: DropoutAddSaved


class TransformerBlock:
    """h = x + dropout(attention(norm(x)));  y = h + dropout(feed_forward(norm(h))).

    Args:
        embed_dim: width C.
        hidden_dim: width F of the gated feed-forward.
        num_heads: query heads; num_kv_heads: key/value heads, as many by default.
        window: sliding-window span in positions, or None.
        rope_base: base of the rotary frequencies.
        rope: what the rotary angle is proportional to: "position" in the sequence, or "time", of which time_scale takes
            the place of a position.
        time_bias: "none", "linear" or "log"; time_scale: a typical gap, in the unit of the times.
        dropout: probabilities; they apply only in forwards that are given a DropoutKey.
        precision: "float32", "bfloat16" or "float16", or a `Precision`.
        rng: for the initial weights; default: a generator seeded with 0.
        residual_layers: residual branches of the whole model, which the initial weights of their ends allow for.
        attention_features: random features of linear attention; None: softmax attention. See MultiHeadAttention.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        window: int | None = None,
        rope_base: float = 10000.0,
        rope: str = "position",
        time_bias: str = "log",
        time_scale: float = 1.0,
        norm_eps: float = 1e-6,
        dropout: DropoutConfig | None = None,
        precision: str | Precision = "float32",
        rng: np.random.Generator | None = None,
        name: str = "block",
        index: int = 0,
        residual_layers: int = 2,
        attention_features: int | None = None,
    ) -> None:
        rates = dropout or DropoutConfig()
        rng = rng or np.random.default_rng(0)
        self.precision = _precision(precision)
        if rope not in ("position", "time"):
            raise ValueError(f"rope: got {rope!r}, expected 'position' or 'time'")
        self.embed_dim, self.norm_eps, self.rope_base = embed_dim, norm_eps, rope_base
        self.rope_unit = time_scale if rope == "time" else None
        self.residual_dropout, self.site = rates.residual, index * SITES
        output_scale = residual_layers**-0.5
        ones = np.ones(embed_dim, self.precision.master)
        self.attention_norm = Parameter(f"{name}.attention_norm.weight", ones, decay=False)
        self.attention = MultiHeadAttention(
            embed_dim, num_heads, num_kv_heads=num_kv_heads or num_heads, window=window, time_bias=time_bias,
            time_scale=time_scale, dropout=rates.attention, output_scale=output_scale, precision=self.precision,
            rng=rng, name=f"{name}.attention", site=self.site, features=attention_features,
        )  # fmt: skip
        self.feed_forward_norm = Parameter(f"{name}.feed_forward_norm.weight", ones.copy(), decay=False)
        self.feed_forward = FeedForwardGeGLU(
            embed_dim, hidden_dim, dropout=rates.feed_forward, output_scale=output_scale, precision=self.precision,
            rng=rng, name=f"{name}.feed_forward", site=self.site + 2,
        )  # fmt: skip

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [
            self.attention_norm, *self.attention.parameters, self.feed_forward_norm, *self.feed_forward.parameters,
        ]  # fmt: skip

    def rope(self, sequences: Sequences) -> RopeTable:
        """The rotation of each row; blocks of a model share one."""
        return sequences.rope(self.attention.dim, self.rope_base, self.precision.compute, self.rope_unit)

    def forward(
        self, x: Array, sequences: Sequences, rope: RopeTable | None = None, dropout: DropoutKey | None = None
    ) -> tuple[Array, TransformerBlockSaved]:
        """x (..., C) whose rows are the positions of `sequences` -> (y like x, saved).

        Args:
            x: in the dtype of the precision.
            sequences: where sequences begin and when positions happened; `Sequences.batch(times)` for x (B, T, C).
            rope: from `rope(sequences)`; made here if not given.
            dropout: draws masks (training); None: no dropout.
        """
        rows = x.reshape(-1, self.embed_dim)
        if len(rows) != sequences.total:
            raise ValueError(f"x: got {len(rows)} rows, expected {sequences.total} like sequences.times")
        normed, attention_norm, attention, attention_residual, feed_forward_norm = self._attend(
            rows, sequences, rope or self.rope(sequences), dropout
        )
        fed, feed_forward = self.feed_forward.forward(normed, dropout)
        drop = self._last_dropout(dropout)
        y, residual = dropout_add_forward(fed, feed_forward_norm.x, **vars(drop), out=fed)
        saved = TransformerBlockSaved(
            attention_norm, attention, attention_residual, feed_forward_norm, feed_forward, residual
        )
        return y.reshape(x.shape), saved

    def recompute(
        self, x: Array, sequences: Sequences, rope: RopeTable, dropout: DropoutKey | None = None
    ) -> TransformerBlockSaved:
        """What the forward of the same arguments saved, the same bits, without what only its result needs."""
        normed, attention_norm, attention, attention_residual, feed_forward_norm = self._attend(
            x.reshape(-1, self.embed_dim), sequences, rope, dropout
        )
        feed_forward = self.feed_forward.recompute(normed, dropout)
        return TransformerBlockSaved(
            attention_norm, attention, attention_residual, feed_forward_norm, feed_forward, self._last_dropout(dropout)
        )

    def _attend(
        self, rows: Array, sequences: Sequences, rope: RopeTable, dropout: DropoutKey | None
    ) -> tuple[Array, RmsNormSaved, MultiHeadAttentionSaved, DropoutAddSaved | None, RmsNormSaved]:
        """The first half, and the norm before the second: what enters the feed-forward, and what was saved."""
        normed, attention_norm = rms_norm_forward(rows, self.attention_norm.value, eps=self.norm_eps)
        mixed, attention = self.attention.forward(normed, sequences, rope, dropout)
        attention_residual = None
        if dropout is not None and self.residual_dropout > 0:
            mixed, attention_residual = dropout_add_forward(
                mixed, rate=self.residual_dropout, **dropout.at(self.site + 1), out=mixed
            )
        normed, feed_forward_norm = rms_norm_forward(
            mixed, self.feed_forward_norm.value, residual=rows, eps=self.norm_eps, sum_out=mixed
        )
        return normed, attention_norm, attention, attention_residual, feed_forward_norm

    def _last_dropout(self, dropout: DropoutKey | None) -> DropoutAddSaved:
        if dropout is None:
            return DropoutAddSaved(0.0, 0, 0)
        return DropoutAddSaved(self.residual_dropout, **dropout.at(self.site + 3))

    def backward(self, dy: Array, saved: TransformerBlockSaved, accumulate: bool = True) -> Array:
        """dy like y -> dx like x; adds to the parameters' gradients, or (`accumulate` False) to those of vectors and
        writes those of matrices, whatever they hold."""
        rows = dy.reshape(-1, self.embed_dim)
        dfed = rows
        if saved.feed_forward_residual.rate > 0:
            dfed = dropout_add_backward(rows, saved.feed_forward_residual)
        dnormed = self.feed_forward.backward(dfed, saved.feed_forward, accumulate)
        dsum, _ = rms_norm_backward(
            dnormed, saved.feed_forward_norm, dsum=rows, dx=dnormed, dweight=self.feed_forward_norm.gradient
        )
        dmixed = dsum
        if saved.attention_residual is not None:
            dmixed = dropout_add_backward(dsum, saved.attention_residual)
        dnormed = self.attention.backward(dmixed, saved.attention, accumulate)
        dx, _ = rms_norm_backward(
            dnormed, saved.attention_norm, dsum=dsum, dx=dnormed, dweight=self.attention_norm.gradient
        )
        return dx.reshape(dy.shape)

    def extend(
        self, x: Array, new: Continuation, rope: RopeTable, cache: KeyValueCache | LinearAttentionCache, rings: Array
    ) -> Array:
        """x (total, C) of new positions -> y (total, C), as `forward` would give after all the positions before them;
        they are written to the cache. Without dropout; nothing is saved."""
        normed = rms_norm(x, self.attention_norm.value, eps=self.norm_eps)
        mixed = self.attention.extend(normed, new, rope, cache, rings)
        normed, norm = rms_norm_forward(
            mixed, self.feed_forward_norm.value, residual=x, eps=self.norm_eps, sum_out=mixed
        )
        fed, _ = self.feed_forward.forward(normed)
        y, _ = dropout_add_forward(fed, norm.x, rate=0.0, out=fed)
        return y

    def decode(self, x: Array, timestamp: float | Array, position: int | Array) -> Array:
        """One new position of each sequence in the attention's own cache: constant time and memory.

        Args:
            x: (B, C) in the dtype of the precision, one row for each sequence of the cache; `attention.clear_cache(B)`
                begins new ones (the first call makes a cache for as many sequences as there are rows).
            timestamp: when it happened, one number or (B,) float64; not before the position before it.
            position: from 0, one number or (B,): the next of each sequence.

        Returns:
            (B, C), the row that `forward` over the whole sequence would give for it.
        """
        cache = self.attention.cache
        if cache is None:
            self.attention.clear_cache(max(len(x), 1))
            cache = self.attention.cache
            assert cache is not None
        check(x=(x, "B C"))
        rings = np.arange(len(cache.lengths))
        if x.shape != (len(rings), self.embed_dim):
            raise ValueError(
                f"x: got shape {x.shape}, expected ({len(rings)}, {self.embed_dim}): a row per sequence of the cache"
            )
        xp = array_module(x)
        times = xp.broadcast_to(xp.asarray(timestamp, np.float64), (len(rings),)).copy()
        before = np.broadcast_to(np.asarray(position, np.int64), len(rings)).copy()
        for got, expected in zip(before, cache.lengths, strict=True):
            if got != expected:
                raise ValueError(
                    f"position: got {got}, expected {expected}, the next in the cache; attention.clear_cache() begins "
                    "a new sequence"
                )
        ones = np.ones(len(rings), np.int64)
        cache.check_room(rings, ones)
        last = cache.last_times(rings)
        early = xp.flatnonzero(~(times >= last) & xp.asarray(before > 0) | ~xp.isfinite(times))
        if len(early):
            got, after = float(times[early[0]]), float(last[early[0]])
            raise ValueError(
                f"timestamp: got {got!r}, expected a finite time, not before {after!r}, the last in the cache"
            )
        new = Continuation(np.arange(len(rings) + 1, dtype=np.int32), times, before, last)
        y = self.extend(x, new, self.rope(new), cache, rings)
        cache.advance(rings, ones)
        return y


def _precision(value: str | Precision) -> Precision:
    return value if isinstance(value, Precision) else precision(value)
