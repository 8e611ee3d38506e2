"""Ring buffers of rotated keys, values and timestamps: what one attention layer remembers while it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ttr_kernels.attention import TimeBias, attention
from ttr_kernels.common.arrays import Array, DType
from ttr_kernels.decode_attention import decode_attention

from .continuation import Continuation

# Positions of a cache that is told neither a window nor a capacity.
DEFAULT_CAPACITY = 2048


class KeyValueCache:
    """One ring per sequence. Position p is in slot p mod capacity: a write costs the same at every position, nothing
    moves or grows, and what a window no longer shows is overwritten.

    Args:
        sequences: number of rings R.
        window: the layer's attention window, or None.
        capacity: positions of a ring; default: the window, without one DEFAULT_CAPACITY. A ring shorter than the
            window (or without one) refuses positions beyond its capacity, since attention would have to see what was
            overwritten.
        lengths: (R,) int64, positions so far; the caches of a model's layers share one array. Default: zeros.

    Attributes:
        keys, values: (R, capacity, H_kv, D); keys after their rotation.
        times: (R, capacity) float64.
    """

    def __init__(
        self, sequences: int, kv_heads: int, dim: int, dtype: DType, *, window: int | None, capacity: int | None = None,
        lengths: Array | None = None, xp: ModuleType = np,
    ) -> None:  # fmt: skip
        if sequences < 1:
            raise ValueError(f"sequences: got {sequences}, expected at least 1")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: got {capacity}, expected at least 1")
        default = DEFAULT_CAPACITY if window is None else window
        # More than a window is never looked at.
        self.capacity = min(capacity or default, window or capacity or default)
        self.window = window
        self.keys: Array = xp.zeros((sequences, self.capacity, kv_heads, dim), dtype)
        self.values: Array = xp.zeros_like(self.keys)
        self.times: Array = xp.zeros((sequences, self.capacity), np.float64)
        self.lengths = np.zeros(sequences, np.int64) if lengths is None else lengths
        self._xp = xp

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return int(self.keys.nbytes + self.values.nbytes + self.times.nbytes)

    def check_room(self, rings: Array, counts: Array) -> None:
        """ValueError if so many more positions of these rings would overwrite what attention must still see."""
        if self.window is not None and self.capacity >= self.window:
            return
        wanted = int((self.lengths[rings] + counts).max(initial=0))
        if wanted > self.capacity:
            limit = "the model has no window" if self.window is None else f"it is below the window of {self.window}"
            raise ValueError(
                f"position: got {wanted - 1}, expected below the capacity of {self.capacity} positions ({limit}); set "
                "a larger capacity where the cache is made, or train with --set model.window=N: its cost per position "
                "stays the same"
            )

    def write(self, rings: Array, new: Continuation, k: Array, v: Array) -> None:
        """Put keys and values (total, H_kv, D) of new positions in their slots. `lengths` stays: see `advance`."""
        counts = np.diff(new.cu_seqlens)
        positions = new.positions()
        # Of more than a ring holds, the newest.
        kept = np.flatnonzero(positions >= np.repeat(new.before + counts - self.capacity, counts))
        ring, slot = np.repeat(rings, counts)[kept], positions[kept] % self.capacity
        ring, slot, row = (self._xp.asarray(index) for index in (ring, slot, kept))
        self.keys[ring, slot] = k[row]
        self.values[ring, slot] = v[row]
        self.times[ring, slot] = new.times[row]

    def advance(self, rings: Array, counts: Array) -> None:
        """The positions that were written now count. Last of all, so that a step that fails leaves nothing behind."""
        self.lengths[rings] += counts

    def last_times(self, rings: Array) -> Array:
        """(N,) float64, when the newest position of each ring happened; anything where there is none."""
        times: Array = self.times[self._xp.asarray(rings), self._xp.asarray((self.lengths[rings] - 1) % self.capacity)]
        return times

    def attend(self, q: Array, k: Array, v: Array, new: Continuation, rings: Array, bias: TimeBias | None) -> Array:
        """Attention of new positions (total, H, D) to each other and to what the rings hold of their sequences; their
        keys and values are written."""
        if len(q) == len(rings) and (np.diff(new.cu_seqlens) == 1).all():
            self.write(rings, new, k, v)
            return decode_attention(
                q, self.keys, self.values, new.before + 1, rings=rings, window=self.window, times=new.times,
                key_times=self.times, time_bias=bias,
            )  # fmt: skip
        if new.before.any():
            mixed = self._attend_past(q, k, v, new, rings, bias)
        else:
            mixed = attention(q, k, v, window=self.window, cu_seqlens=new.cu_seqlens, times=new.times, time_bias=bias)
        self.write(rings, new, k, v)
        return mixed

    def _attend_past(
        self, q: Array, k: Array, v: Array, new: Continuation, rings: Array, bias: TimeBias | None
    ) -> Array:
        """Several new positions per sequence, which see those before them too: one sequence after the other."""
        xp = self._xp
        mixed: Array = xp.empty(q.shape, q.dtype)
        bounds = zip(rings, new.before, new.cu_seqlens[:-1], new.cu_seqlens[1:], strict=True)
        for ring, before, begin, end in bounds:
            past = self._slots(before, self.capacity if self.window is None else self.window - 1)
            times = new.times[begin:end]
            attention(
                q[None, begin:end], xp.concatenate((self.keys[ring, past], k[begin:end]))[None],
                xp.concatenate((self.values[ring, past], v[begin:end]))[None], window=self.window, times=times[None],
                key_times=xp.concatenate((self.times[ring, past], times))[None], time_bias=bias,
                out=mixed[None, begin:end],
            )  # fmt: skip
        return mixed

    def _slots(self, length: int, limit: int) -> Array:
        """Slots of the newest positions of a sequence, in their order: at most `limit`, and what the ring holds."""
        slots: Array = self._xp.asarray(np.arange(max(0, length - min(limit, self.capacity)), length) % self.capacity)
        return slots

    def state(self, ring: int) -> dict[str, Array]:
        """What is remembered of one sequence, by name, in the order of its positions: copies."""
        slots = self._slots(int(self.lengths[ring]), self.capacity)
        return {"keys": self.keys[ring, slots], "values": self.values[ring, slots], "times": self.times[ring, slots]}

    def restore(self, ring: int, length: int, state: dict[str, Array]) -> None:
        """Put a `state` of a sequence of this length into a ring; `lengths` stays."""
        slots = self._slots(length, self.capacity)
        for name, buffer in (("keys", self.keys), ("values", self.values), ("times", self.times)):
            expected = (len(slots), *buffer.shape[2:])
            if state[name].shape != expected:
                raise ValueError(f"{name}: got shape {state[name].shape}, expected {expected}")
            buffer[ring, slots] = self._xp.asarray(state[name])

    def copy(self, source: int, targets: Array) -> None:
        """Make other rings hold what ring `source` holds; `lengths` stays."""
        targets = self._xp.asarray(targets)
        for buffer in (self.keys, self.values, self.times):
            buffer[targets] = buffer[source]


def lay_together(layers: Sequence[KeyValueCache]) -> tuple[Array, Array, Array]:
    """Give several empty layers of one size rings that lie in one array each: keys, values (L, R, capacity, H_kv, D)
    and times (L, R, capacity), of which the layers' own are views then."""

    def together(name: str) -> Array:
        own: list[Array] = [getattr(layer, name) for layer in layers]
        array = np.zeros((len(own), *own[0].shape), own[0].dtype)
        for layer, part in zip(layers, array, strict=True):
            setattr(layer, name, part)
        return array

    return together("keys"), together("values"), together("times")
