"""What a layer of linear attention remembers while it decodes: one matrix per head, however long the past."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ttr_kernels.attention import TimeBias
from ttr_kernels.common.arrays import Array
from ttr_kernels.linear_attention import LinearAttentionState, linear_attention_extend

from .continuation import Continuation


class LinearAttentionCache:
    """The states of `sequences` sequences. There is room for any number of positions.

    Args:
        features: (M, D), the layer's random features.
        lengths: (R,) int64, positions so far; the caches of a model's layers share one array. Default: zeros.
    """

    def __init__(
        self, sequences: int, heads: int, features: Array, *, lengths: Array | None = None, xp: ModuleType = np
    ) -> None:
        if sequences < 1:
            raise ValueError(f"sequences: got {sequences}, expected at least 1")
        self.features: Array = xp.asarray(features)
        self._past = LinearAttentionState.empty(sequences, heads, len(features), features.shape[1], features.dtype, xp)
        self.lengths = np.zeros(sequences, np.int64) if lengths is None else lengths
        self._xp = xp

    @property
    def bytes(self) -> int:
        """Memory of the states."""
        return int(self._past.sums.nbytes + self._past.shift.nbytes + self._past.times.nbytes)

    def check_room(self, rings: Array, counts: Array) -> None:
        """There is always room."""

    def advance(self, rings: Array, counts: Array) -> None:
        """The positions that were taken in now count."""
        self.lengths[rings] += counts

    def last_times(self, rings: Array) -> Array:
        """(N,) float64, when the newest position of each ring happened; anything where there is none."""
        times: Array = self._past.times[self._xp.asarray(rings)]
        return times

    def attend(self, q: Array, k: Array, v: Array, new: Continuation, rings: Array, bias: TimeBias | None) -> Array:
        """Attention of new positions (total, H, D) to each other and to their sequences' past, which takes them."""
        begun = rings[new.before == 0]
        if len(begun):
            self._past.clear(begun)
        return linear_attention_extend(
            q, k, v, self.features, self._past, rings=rings, cu_seqlens=new.cu_seqlens, times=new.times, time_bias=bias
        )

    def state(self, ring: int) -> dict[str, Array]:
        """What is remembered of one sequence, by name: copies."""
        return {name: getattr(self._past, name)[ring : ring + 1].copy() for name in ("sums", "shift", "times")}

    def restore(self, ring: int, length: int, state: dict[str, Array]) -> None:
        """Put a `state` of a sequence of this length into a ring; `lengths` stays."""
        for name in ("sums", "shift", "times"):
            buffer = getattr(self._past, name)
            if state[name].shape != buffer[:1].shape:
                raise ValueError(f"{name}: got shape {state[name].shape}, expected {buffer[:1].shape}")
            buffer[ring] = self._xp.asarray(state[name])[0]

    def copy(self, source: int, targets: Array) -> None:
        """Make other rings hold what ring `source` holds; `lengths` stays."""
        targets = self._xp.asarray(targets)
        for buffer in (self._past.sums, self._past.shift, self._past.times):
            buffer[targets] = buffer[source]
