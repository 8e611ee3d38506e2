"""A model that goes on from what it remembers: the caches of its layers, and new positions of many sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ttr_kernels.common.arrays import INT32, Array

from .backend import to_host
from .fused_decoding import ROWS as FUSED_ROWS
from .fused_decoding import FusedDecoding, fused_decoding
from .nn.continuation import Continuation
from .nn.key_value_cache import KeyValueCache
from .nn.linear_attention_cache import LinearAttentionCache

if TYPE_CHECKING:
    from .model import TransformerModel

# Positions that go through the model at a time when a prompt is read: its activations are bounded by them.
PREFILL_ROWS = 512


class ModelCache:
    """What a model remembers of `sequences` sequences, each in a ring of its own: bounded, whatever their lengths.

    Args:
        model: whose layers it serves.
        sequences: number of rings.
        capacity: positions of a ring; default: the model's window (see KeyValueCache).

    Attributes:
        layers: one KeyValueCache per block (one LinearAttentionCache, where the model attends so).
        lengths: (R,) int64, positions of each sequence so far.
        last_times, first_times: (R,) float64, when the newest of them happened, and the first one.
    """

    def __init__(self, model: TransformerModel, sequences: int = 1, capacity: int | None = None) -> None:
        self.lengths = np.zeros(max(sequences, 0), np.int64)
        self.last_times, self.first_times = np.zeros((2, max(sequences, 0)))
        self.layers: list[KeyValueCache | LinearAttentionCache] = [
            block.attention.new_cache(sequences, capacity, self.lengths) for block in model.blocks
        ]
        # What steps of a few sequences take instead of the layers one by one, where there is one.
        self.fused: FusedDecoding | None = fused_decoding(model, self.layers)

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(layer.bytes for layer in self.layers)

    def clear(self, rings: Array | None = None) -> None:
        """Begin new sequences in these rings; default: in all."""
        self.lengths[slice(None) if rings is None else rings] = 0

    def copy(self, source: int, targets: Array) -> None:
        """Let other rings go on from where ring `source` is: for several continuations of one prompt."""
        for layer in self.layers:
            layer.copy(source, targets)
        for known in (self.lengths, self.last_times, self.first_times):
            known[targets] = known[source]

    def state(self, ring: int) -> dict[str, Array]:
        """What is remembered of one sequence, beyond length, first and last time: named copies, NumPy on a GPU too."""
        return {
            f"layers.{index}.{name}": to_host(array)
            for index, layer in enumerate(self.layers)
            for name, array in layer.state(ring).items()
        }

    def restore(
        self, ring: int, length: int, last_time: float, first_time: float, state: dict[str, Array]
    ) -> None:  # fmt: skip
        """Let a ring go on from a `state`. ValueError if it is that of another model."""
        names = set(self.state(ring))
        if set(state) != names:
            raise ValueError(f"state: got {', '.join(sorted(set(state) ^ names)[:3])} too many or too few")
        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            layer.restore(ring, length, own)
        self.lengths[ring], self.last_times[ring], self.first_times[ring] = length, last_time, first_time


def extend(
    model: TransformerModel, tokens: Array, times: Array, cu_seqlens: Array, cache: ModelCache, rings: Array
) -> Array:
    """Output of the last block (total, C) for new, packed positions of the sequences in `rings`; the cache takes them.

    Args:
        tokens: (total,) int32; times: (total,) float64, ascending in each sequence and after what is cached of it.
        cu_seqlens: (N + 1,) int32, where the new positions of each sequence begin.
        rings: (N,) int64, different from each other.

    Raises:
        ValueError: a token that is none, a time that is not finite or goes back, no room in the cache. The cache then
            is as it was.
    """
    counts = np.diff(cu_seqlens).astype(np.int64)
    if _fits_fused(model, cache, len(rings)) and len(tokens) == len(times) == len(rings) and (counts == 1).all():
        return _step(model, tokens, times, cache, rings, logits=False)[0]
    _check(model, tokens, times, cu_seqlens, counts, cache, rings)
    cache.layers[0].check_room(rings, counts)
    xp = model.backend.xp
    some = counts > 0
    begins = some & (cache.lengths[rings] == 0)
    first = cache.first_times[rings]
    first[begins] = times[cu_seqlens[:-1][begins]]
    new = Continuation(
        cu_seqlens, xp.asarray(times), cache.lengths[rings], xp.asarray(cache.last_times[rings]), xp.asarray(first)
    )
    x, _ = model.embedding.forward(xp.asarray(tokens), new)
    rope = model.blocks[0].rope(new)
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        x = block.extend(x, new, rope, layer, rings)
    # Only now do they count: what fails or is interrupted before leaves the cache as it was.
    cache.first_times[rings] = first
    cache.lengths[rings] += counts
    cache.last_times[rings[some]] = times[cu_seqlens[1:][some] - 1]
    return x


def decode_outputs(
    model: TransformerModel, tokens: Array, times: Array, cache: ModelCache, rings: Array | None = None
) -> Array:
    """One new position of each sequence -> the last block's output there (B, C). See TransformerModel.decode_step."""
    rings, tokens, times = _one_each(tokens, times, cache, rings)
    return extend(model, tokens, times, np.arange(len(rings) + 1, dtype=np.int32), cache, rings)


def decode_step(
    model: TransformerModel, tokens: Array, times: Array, cache: ModelCache, rings: Array | None = None
) -> Array:
    """One new position of each sequence -> logits (B, V) of the token after it. See TransformerModel.decode_step."""
    rings, tokens, times = _one_each(tokens, times, cache, rings)
    if _fits_fused(model, cache, len(rings)):
        return _step(model, tokens, times, cache, rings, logits=True)[1]
    starts = np.arange(len(rings) + 1, dtype=np.int32)
    return model.next_logits(extend(model, tokens, times, starts, cache, rings))


def _one_each(tokens: Array, times: Array, cache: ModelCache, rings: Array | None) -> tuple[Array, Array, Array]:
    """Rings (by default all), tokens and times in their dtypes; ValueError unless there are as many of each."""
    rings = np.arange(len(cache.lengths)) if rings is None else np.asarray(rings, np.int64)
    tokens, times = np.asarray(tokens, np.int32), np.asarray(times, np.float64)
    if not tokens.shape == times.shape == rings.shape == (len(rings),):
        raise ValueError(
            f"tokens, times: got shapes {tokens.shape} and {times.shape}, expected ({len(rings)},), one per sequence"
        )
    return rings, tokens, times


def _fits_fused(model: TransformerModel, cache: ModelCache, rows: int) -> bool:
    return cache.fused is not None and cache.fused.model is model and 1 <= rows <= FUSED_ROWS


def _step(
    model: TransformerModel, tokens: Array, times: Array, cache: ModelCache, rings: Array, *, logits: bool
) -> tuple[Array, Array]:
    """One position of each sequence through the fused step; ValueError as in `extend`."""
    assert cache.fused is not None
    lengths = cache.lengths[rings] if _valid_rings(rings, len(cache.lengths)) else None
    # The common case in a few comparisons; what is wrong, and its message, is found below.
    if (
        lengths is None
        or tokens.view(np.uint32).max() >= model.config.vocabulary_size
        or not (np.isfinite(times) & ((times >= cache.last_times[rings]) | (lengths == 0))).all()
    ):
        ones = np.ones(len(rings), np.int64)
        _check(model, tokens, times, np.arange(len(rings) + 1, dtype=np.int32), ones, cache, rings)
    cache.layers[0].check_room(rings, np.ones(1, np.int64))
    x, predicted = cache.fused.step(tokens, times, cache, rings, logits=logits)
    if (begins := cache.lengths[rings] == 0).any():
        cache.first_times[rings[begins]] = times[begins]
    cache.lengths[rings] += 1
    cache.last_times[rings] = times
    return x, predicted


def _valid_rings(rings: Array, count: int) -> bool:
    return bool(0 <= rings.min() <= rings.max() < count) and len(set(rings.tolist())) == len(rings)


def prefill_outputs(
    model: TransformerModel, tokens: Array, times: Array, cu_seqlens: Array, cache: ModelCache,
    rings: Array | None = None, rows: int = PREFILL_ROWS,
) -> Array:  # fmt: skip
    """Packed new positions -> the last block's output (N, C) at the last of each sequence.

    See TransformerModel.prefill.
    """
    rings = np.arange(len(cache.lengths)) if rings is None else np.asarray(rings, np.int64)
    tokens, times = np.asarray(tokens, np.int32), np.asarray(times, np.float64)
    if cu_seqlens.dtype != INT32 or cu_seqlens.shape != (len(rings) + 1,):
        raise ValueError(
            f"cu_seqlens: got shape {cu_seqlens.shape} of {cu_seqlens.dtype}, expected ({len(rings) + 1},) of int32"
        )
    if (np.diff(cu_seqlens) < 1).any():
        raise ValueError("cu_seqlens: got a sequence without a new position, expected at least one each")
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    xp = model.backend.xp
    last: Array = xp.empty((len(rings), model.config.embed_dim), model.precision.compute)
    for begin in range(0, len(tokens), rows):
        end = min(begin + rows, len(tokens))
        # The sequences that have positions in [begin, end), and where those begin there.
        first, beyond = np.searchsorted(cu_seqlens, begin, "right") - 1, np.searchsorted(cu_seqlens, end, "left")
        starts = (np.clip(cu_seqlens[first : beyond + 1], begin, end) - begin).astype(np.int32)
        x = extend(model, tokens[begin:end], times[begin:end], starts, cache, rings[first:beyond])
        last[first:beyond] = x[xp.asarray(starts[1:] - 1)]
    return last


def _check(
    model: TransformerModel, tokens: Array, times: Array, cu_seqlens: Array, counts: Array, cache: ModelCache,
    rings: Array,
) -> None:  # fmt: skip
    if len(cache.layers) != len(model.blocks):
        raise ValueError(f"cache: got {len(cache.layers)} layers, expected {len(model.blocks)} as in the model")
    if len(rings) and not 0 <= rings.min() <= rings.max() < len(cache.lengths):
        raise ValueError(f"rings: got {rings.min()} .. {rings.max()}, expected 0 .. {len(cache.lengths) - 1}")
    if len(np.unique(rings)) != len(rings):
        raise ValueError("rings: got one of them twice, expected different ones")
    if not len(tokens) == len(times) == cu_seqlens[-1]:
        raise ValueError(
            f"tokens, times: got {len(tokens)} and {len(times)}, expected {cu_seqlens[-1]} like cu_seqlens"
        )
    vocabulary = model.config.vocabulary_size
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        bad = tokens[(tokens < 0) | (tokens >= vocabulary)][0]
        raise ValueError(f"tokens: got {bad}, expected 0 .. {vocabulary - 1}")
    before = np.concatenate(([0.0], times[:-1]))
    some = counts > 0
    starts = cu_seqlens[:-1][some]
    before[starts] = np.where(cache.lengths[rings[some]] > 0, cache.last_times[rings[some]], -np.inf)
    bad_rows = np.flatnonzero(~((times >= before) & np.isfinite(times)))
    if len(bad_rows):
        got, after = float(times[bad_rows[0]]), float(before[bad_rows[0]])
        order = "" if after == -np.inf else f", not before {after!r}, that of the position before"
        raise ValueError(f"times: got {got!r}, expected a finite time{order}")
