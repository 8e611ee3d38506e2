"""Multi-head attention with rotary positions and a learned decay with age."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.attention import AttentionSaved, TimeBias, attention_backward, attention_forward
from ttr_kernels.common.arrays import Array, array_module, empty
from ttr_kernels.linear_attention import (
    LinearAttentionSaved,
    linear_attention_backward,
    linear_attention_forward,
    orthogonal_features,
)
from ttr_kernels.matmul import LinearSaved, linear, linear_backward, linear_forward
from ttr_kernels.rope import RopeSaved, RopeTable, rope_backward, rope_forward

from ..precision import Precision
from .continuation import Continuation
from .dropout import DropoutKey
from .key_value_cache import KeyValueCache
from .linear_attention_cache import LinearAttentionCache
from .parameter import Parameter, normal
from .sequences import Sequences


@dataclass(frozen=True)
class MultiHeadAttentionSaved:
    """What the forward keeps for the backward."""

    project: LinearSaved
    rope: RopeSaved
    attention: AttentionSaved | LinearAttentionSaved
    output: LinearSaved


class MultiHeadAttention:
    """Queries, keys and values in one matrix product; RoPE; attention with time bias, window and grouped heads.

    The decay of head h is −rate_h · φ(Δt / tau_h) with rate_h = softplus(rate.value[h]) and
    tau_h = time_scale · softplus(tau.value[h]), so that both stay positive whatever the optimizer does.

    With a number of random `features` the softmax is approximated in linear time (ttr_kernels.linear_attention):
    without window and dropout of weights, and with a linear time bias or none.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, num_kv_heads: int, window: int | None, time_bias: str,
        time_scale: float, dropout: float, output_scale: float, precision: Precision, rng: np.random.Generator,
        name: str, site: int, features: int | None = None,
    ) -> None:  # fmt: skip
        self.heads, self.kv_heads, self.dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.window, self.time_bias, self.time_scale = window, time_bias, time_scale
        self.dropout, self.precision, self.site = dropout, precision, site
        master = precision.master
        rows = (num_heads + 2 * num_kv_heads) * self.dim
        self.qkv = Parameter(f"{name}.qkv.weight", normal(rng, (rows, embed_dim), embed_dim**-0.5, master))
        output = normal(rng, (embed_dim, num_heads * self.dim), output_scale * embed_dim**-0.5, master)
        self.output = Parameter(f"{name}.output.weight", output)
        self.cache: KeyValueCache | LinearAttentionCache | None = None
        # They follow from the layer's number, so that a checkpoint need not hold them.
        self.features = None if features is None else orthogonal_features(features, self.dim, site, precision.master)
        self.rate: Parameter | None = None
        self.tau: Parameter | None = None
        if time_bias != "none":
            # Rates from 1/2 down to 1/256 as in ALiBi (Press et al. 2022): some heads begin short-sighted, some far.
            rates = 2.0 ** -np.linspace(1, 8, num_heads)
            self.rate = Parameter(f"{name}.time_bias.rate", _inverse_softplus(rates).astype(master), decay=False)
            ones = _inverse_softplus(np.ones(num_heads))
            self.tau = Parameter(f"{name}.time_bias.tau", ones.astype(master), decay=False)

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [p for p in (self.qkv, self.rate, self.tau, self.output) if p is not None]

    def decay(self) -> TimeBias | None:
        """The time bias that the parameters stand for, or None."""
        if self.rate is None or self.tau is None:
            return None
        return TimeBias(*decay_of(self.rate.value, self.tau.value, self.time_scale), self.time_bias)

    def forward(
        self, x: Array, sequences: Sequences, rope: RopeTable, dropout: DropoutKey | None = None
    ) -> tuple[Array, MultiHeadAttentionSaved]:
        """x (total, C) -> y (total, C). Dropout of attention weights only where a key is given."""
        mixed, project, turned, attended = self._mix(x, sequences, rope, dropout)
        y, output = linear_forward(mixed, self.output.cast(self.precision.compute))
        return y, MultiHeadAttentionSaved(project, turned, attended, output)

    def recompute(
        self, x: Array, sequences: Sequences, rope: RopeTable, dropout: DropoutKey | None = None
    ) -> MultiHeadAttentionSaved:
        """What the forward of the same arguments saved, without its last product."""
        mixed, project, turned, attended = self._mix(x, sequences, rope, dropout)
        output = LinearSaved(mixed, self.output.cast(self.precision.compute), False)
        return MultiHeadAttentionSaved(project, turned, attended, output)

    def _mix(
        self, x: Array, sequences: Sequences, rope: RopeTable, dropout: DropoutKey | None
    ) -> tuple[Array, LinearSaved, RopeSaved, AttentionSaved | LinearAttentionSaved]:
        fused, project = linear_forward(x, self.qkv.cast(self.precision.compute))
        q, k, v, rotated = self._split(fused)
        _, turned = rope_forward(rotated, rope, out=rotated)
        drop: dict[str, Any] = {}
        if dropout is not None and self.dropout > 0:
            drop = {"dropout": self.dropout, **dropout.at(self.site)}
        packed: dict[str, Any] = {"cu_seqlens": sequences.cu_seqlens, "times": sequences.times}
        attended: AttentionSaved | LinearAttentionSaved
        if self.features is None:
            mixed, attended = attention_forward(q, k, v, window=self.window, time_bias=self.decay(), **packed, **drop)
        else:
            features = array_module(x).asarray(self.features)
            mixed, attended = linear_attention_forward(q, k, v, features, time_bias=self.decay(), **packed)
        return mixed.reshape(len(x), -1), project, turned, attended

    def backward(self, dy: Array, saved: MultiHeadAttentionSaved, accumulate: bool = True) -> Array:
        """dy (total, C) -> dx (total, C); adds to the parameters' gradients, or writes those of its matrices."""
        dmixed, _, _ = linear_backward(dy, saved.output, dweight=self.output.gradient, accumulate=accumulate)
        dfused = empty((len(dy), len(self.qkv.value)), dy.dtype, dy)
        dq, dk, dv, drotated = self._split(dfused)
        attended, dmixed = saved.attention, dmixed.reshape(saved.attention.q.shape)
        if isinstance(attended, AttentionSaved):
            decay = attention_backward(dmixed, attended, dq=dq, dk=dk, dv=dv)[3]
        else:
            decay = linear_attention_backward(dmixed, attended, dq=dq, dk=dk, dv=dv)[3]
        if decay is not None and self.rate is not None and self.tau is not None:
            self.rate.gradient += decay.rate * _sigmoid(self.rate.value)
            self.tau.gradient += decay.tau * self.rate.value.dtype.type(self.time_scale) * _sigmoid(self.tau.value)
        rope_backward(drotated, saved.rope, dx=drotated)
        dx, _, _ = linear_backward(dfused, saved.project, dweight=self.qkv.gradient, accumulate=accumulate)
        return dx

    def new_cache(
        self, sequences: int = 1, capacity: int | None = None, lengths: Array | None = None
    ) -> KeyValueCache | LinearAttentionCache:
        """An empty cache for decoding so many sequences; `capacity` as in KeyValueCache."""
        xp = array_module(self.qkv.value)
        if self.features is not None:
            return LinearAttentionCache(sequences, self.heads, self.features, lengths=lengths, xp=xp)
        return KeyValueCache(
            sequences, self.kv_heads, self.dim, self.precision.compute, window=self.window, capacity=capacity,
            lengths=lengths, xp=xp,
        )  # fmt: skip

    def clear_cache(self, sequences: int = 1, capacity: int | None = None) -> None:
        """Forget: `TransformerBlock.decode` then begins new sequences, as many as are given."""
        self.cache = self.new_cache(sequences, capacity)

    def extend(
        self, x: Array, new: Continuation, rope: RopeTable, cache: KeyValueCache | LinearAttentionCache, rings: Array
    ) -> Array:
        """x (total, C) of new positions -> y (total, C). They see each other and what the cache holds of their
        sequences, `rings` (N,), and are written to it."""
        dtype = self.precision.compute
        q, k, v, rotated = self._split(linear(x, self.qkv.cast(dtype)))
        rope_forward(rotated, rope, out=rotated)
        mixed = cache.attend(q, k, v, new, rings, self.decay())
        return linear(mixed.reshape(len(x), -1), self.output.cast(dtype))

    def _split(self, fused: Array) -> tuple[Array, Array, Array, Array]:
        """Views of a fused (total, (H + 2·H_kv)·D) array: q, k, v, and q with k, which are rotated."""
        rows = fused.reshape(len(fused), self.heads + 2 * self.kv_heads, self.dim)
        keys_end = self.heads + self.kv_heads
        return rows[:, : self.heads], rows[:, self.heads : keys_end], rows[:, keys_end:], rows[:, :keys_end]


def decay_of(rate: Array, tau: Array, time_scale: float) -> tuple[Array, Array]:
    """(rate, tau) of a TimeBias from the parameters, any number of heads."""
    number = rate.dtype.type
    # softplus underflows to 0 far below; a time scale must not.
    floored = array_module(tau).maximum(_softplus(tau), number(1e-6))
    return _softplus(rate), floored * number(time_scale)


def _softplus(x: Array) -> Array:
    y: Array = array_module(x).logaddexp(x, x.dtype.type(0))
    return y


def _sigmoid(x: Array) -> Array:
    xp = array_module(x)
    y: Array = xp.exp(-xp.logaddexp(-x, x.dtype.type(0)))
    return y


def _inverse_softplus(y: Array) -> Array:
    return y + np.log(-np.expm1(-y))
