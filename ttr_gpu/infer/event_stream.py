"""Live streams of events: each new one is taken in at a constant cost, and the next one is predicted at any moment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import to_host
from ..decoding import extend
from ..errors import UserError
from ..model import TransformerModel
from .prompts import EventPrompts
from .sampling import Sampling, probabilities

FORMAT, FORMAT_VERSION = "ttr-gpu-stream", "1"
# Streams that go through the model at a time: its activations are bounded by them.
_ROWS = 512


class EventStreams:
    """Many streams side by side, each with a ring of the model's cache: memory is bounded by their number, whatever
    happens in them.

    Args:
        model: trained on events.
        count: number of streams, which are then called 0 .. count − 1.
        names: of the event types; without them types are numbers.
        origin: what was subtracted from the data set's times.
        capacity: events that a stream remembers; default: the model's window. Without a window a stream that receives
            more events than that is refused them.

    Attributes:
        cache: what the model remembers of them.
    """

    def __init__(
        self, model: TransformerModel, count: int, *, names: Sequence[str] | None = None, origin: float = 0.0,
        capacity: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.origin = model, origin
        self.cache = model.new_cache(count, capacity)
        self._names = None if names is None else EventPrompts(names)
        # The last block's output at each stream's last event: the head turns it into a distribution when asked.
        self._last: Array = np.zeros((count, model.config.embed_dim), model.precision.compute)

    def push(
        self, streams: Sequence[int] | Array, types: Sequence[int | str] | Array, times: Sequence[float] | Array
    ) -> None:
        """Events in the order of their arrival, of any streams, several of one stream too.

        Args:
            streams: (n,) which stream each belongs to.
            types: (n,) their types, numbers or names.
            times: (n,) when they happened, in the data set's unit (its origin included); in each stream not before the
                event before.

        Raises:
            ValueError: a stream that there is not, a time that is not finite or goes back, or (without a window) more
                events than a stream can remember. UserError: an unknown name. All streams then are as they were.
        """
        rings, moments = np.asarray(streams, np.int64), np.asarray(times, np.float64) - self.origin
        tokens = np.array([self._token(each) for each in types], np.int32)
        if not rings.shape == moments.shape == tokens.shape or rings.ndim != 1:
            raise ValueError(
                f"streams, types, times: got shapes {rings.shape}, {tokens.shape}, {moments.shape}, expected equal ones"
            )
        self._check_streams(rings)
        # Per stream in the order of arrival, and the number of each event among those of its stream.
        order = np.argsort(rings, kind="stable")
        firsts = np.flatnonzero(np.diff(rings[order], prepend=-1))
        number = np.arange(len(order)) - np.repeat(firsts, np.diff(firsts, append=len(order)))
        self._check_times(rings[order], moments[order], number)
        self.cache.layers[0].check_room(rings[order][firsts], np.diff(firsts, append=len(order)))
        for turn in range(int(number.max(initial=-1)) + 1):
            chosen = order[number == turn]
            for begin in range(0, len(chosen), _ROWS):
                rows = chosen[begin : begin + _ROWS]
                starts = np.arange(len(rows) + 1, dtype=np.int32)
                x = extend(self.model, tokens[rows], moments[rows], starts, self.cache, rings[rows])
                self._last[rings[rows]] = to_host(x)

    def next(self, streams: Array | Sequence[int] | None = None) -> Array:
        """Probabilities (n, V) of the type of the next event of each stream; default: of all.

        Raises:
            ValueError: a stream without an event so far.
        """
        rings = np.arange(len(self.cache.lengths)) if streams is None else np.asarray(streams, np.int64)
        self._check_streams(rings)
        for ring in rings[self.cache.lengths[rings] == 0]:
            raise ValueError(f"stream {ring}: has no event yet; push one first")
        logits = self.model.next_logits(self.model.backend.put(self._last[rings]))
        return probabilities(to_host(logits), Sampling())

    def clear(self, streams: Array | Sequence[int]) -> None:
        """Forget these streams: they begin anew."""
        rings = np.asarray(streams, np.int64)
        self._check_streams(rings)
        self.cache.clear(rings)

    def save(self, path: str | Path, stream: int = 0) -> None:
        """Write the state of one stream to a file (safetensors), whole or not at all."""
        from safetensors.numpy import save_file

        self._check_streams(np.array([stream]))
        path = Path(path)
        metadata = {
            "format": FORMAT, "format_version": FORMAT_VERSION, "model": _fingerprint(self.model),
            "length": str(self.cache.lengths[stream]), "last_time": float(self.cache.last_times[stream]).hex(),
        }  # fmt: skip
        arrays = {"last": self._last[stream], **self.cache.state(stream)}
        temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            save_file({name: _storable(array) for name, array in arrays.items()}, temporary, metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: str | Path, stream: int = 0) -> None:
        """Let a stream go on where a saved one stopped: what it answers then is the same to the bit.

        Raises:
            UserError: a file that is none of `save`, or of a stream of another model.
        """
        from safetensors import SafetensorError, safe_open

        self._check_streams(np.array([stream]))
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: is no saved stream of format version {FORMAT_VERSION}")
        if metadata["model"] != _fingerprint(self.model):
            raise UserError(f"{path}: is a stream of another model; load it with the weights it was saved with")
        compute = self.model.precision.compute
        arrays = {name: array.view(compute) if array.dtype == np.uint16 else array for name, array in arrays.items()}
        self._last[stream] = arrays.pop("last")
        self.cache.restore(stream, int(metadata["length"]), float.fromhex(metadata["last_time"]), arrays)

    def _token(self, kind: Any) -> int:
        if isinstance(kind, str):
            if self._names is None:
                raise ValueError(f"types: got {kind!r}, expected numbers, since no names were given")
            return self._names.token(kind)
        if not 0 <= kind < self.model.config.vocabulary_size or kind != int(kind):
            raise ValueError(f"types: got {kind}, expected 0 .. {self.model.config.vocabulary_size - 1}")
        return int(kind)

    def _check_streams(self, rings: Array) -> None:
        count = len(self.cache.lengths)
        if len(rings) and not 0 <= rings.min() <= rings.max() < count:
            bad = rings[(rings < 0) | (rings >= count)][0]
            raise ValueError(f"streams: got {bad}, expected 0 .. {count - 1}")

    def _check_times(self, rings: Array, moments: Array, number: Array) -> None:
        """Of events sorted by stream; `number` counts those of a stream."""
        before = np.concatenate(([0.0], moments[:-1]))
        known = np.where(self.cache.lengths > 0, self.cache.last_times, -np.inf)[rings]
        before = np.where(number == 0, known, before)
        bad = np.flatnonzero(~(np.isfinite(moments) & (moments >= before)))
        if len(bad):
            got, after = float(moments[bad[0]] + self.origin), float(before[bad[0]] + self.origin)
            order = "" if after == -np.inf else f", not before {after!r}, that of the event before"
            raise ValueError(f"times: got {got!r} in stream {rings[bad[0]]}, expected a finite time{order}")


class EventStream:
    """One stream of events.

    Args:
        model: trained on events.
        names, origin, capacity: see EventStreams, which serves many streams at once.
    """

    def __init__(
        self, model: TransformerModel, *, names: Sequence[str] | None = None, origin: float = 0.0,
        capacity: int | None = None,
    ) -> None:  # fmt: skip
        self._streams = EventStreams(model, 1, names=names, origin=origin, capacity=capacity)

    def push(self, kind: int | str, time: float) -> None:
        """An event of this type, a number or a name, at this time; see EventStreams.push."""
        self._streams.push([0], [kind], [time])

    def next(self) -> Array:
        """Probabilities (V,) of the type of the next event. ValueError before the first event."""
        probability: Array = self._streams.next()[0]
        return probability

    def clear(self) -> None:
        """Begin anew."""
        self._streams.clear([0])

    def save(self, path: str | Path) -> None:
        """Write its state to a file, whole or not at all."""
        self._streams.save(path)

    def load(self, path: str | Path) -> None:
        """Go on where a saved stream of the same model stopped. UserError for another file or model."""
        self._streams.load(path)


def _fingerprint(model: TransformerModel) -> str:
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    digest.update(np.ascontiguousarray(to_host(model.flat.values)).data)
    return digest.hexdigest()


def _storable(array: Array) -> Array:
    """safetensors writes wrong data for arrays that are not C-contiguous, and does not know all 16-bit floats."""
    whole = np.ascontiguousarray(to_host(array))
    return whole.view(np.uint16) if whole.itemsize == 2 else whole
