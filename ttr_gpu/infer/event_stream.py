"""Live streams of events: each new one is taken in at a constant cost, and the next one is predicted at any moment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import to_host
from ..decoding import decode_outputs, prefill_outputs
from ..errors import UserError
from ..fused_decoding import ROWS
from ..model import TransformerModel
from .next_event import NextEvent
from .prompts import EventPrompts
from .sampling import Sampling, probabilities

FORMAT, FORMAT_VERSION = "ttr-gpu-stream", "2"
# Events of one stream in one push from which on they are read as a prompt is, not one by one.
_PACKED = 8


class _Arrived(NamedTuple):
    """Events of a push, stream by stream: rings and counts (N,), starts (N + 1,), tokens and moments (total,)."""

    rings: Array
    counts: Array
    starts: Array
    tokens: Array
    moments: Array


@dataclass(frozen=True)
class SavedStream:
    """A copy of a stream's state, as it stands in its file."""

    metadata: dict[str, str]
    arrays: dict[str, Array]

    def write(self, path: Path) -> None:
        """To a file, which is there whole or not at all, also after the power has failed. OSError if it cannot be."""
        from safetensors.numpy import save

        content = save(self.arrays, self.metadata)
        temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


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
        # A model may have room for more types than the data have.
        self._types_known = model.config.vocabulary_size if names is None else len(names)
        self._known_fingerprint: str | None = None
        # The last block's output at each stream's last event: the head turns it into a distribution when asked.
        self._last: Array = np.zeros((count, model.config.embed_dim), model.precision.compute)

    def push(
        self, streams: Sequence[int] | Array, types: Sequence[int | str] | Array, times: Sequence[float] | Array
    ) -> None:
        """Events in the order of their arrival, of any streams, several of one stream too.

        Args:
            streams: (n,) which stream each belongs to.
            types: (n,) their types, names or numbers from 0; where names are numerals, a number is such a name.
            times: (n,) when they happened, in the data set's unit (its origin included); in each stream not before the
                event before.

        Raises:
            ValueError: a stream that there is not, a time that is not finite or goes back, or (without a window) more
                events than a stream can remember. UserError: an unknown name. All streams then are as they were.
        """
        arrived = self._arrange(streams, types, times)
        many = arrived.counts > _PACKED
        if many.any():
            self._read(arrived, np.flatnonzero(many))
        few = np.where(many, 0, arrived.counts)
        for turn in range(int(few.max(initial=0))):
            going = np.flatnonzero(few > turn)
            for begin in range(0, len(going), ROWS):
                chosen = going[begin : begin + ROWS]
                rows, rings = arrived.starts[chosen] + turn, arrived.rings[chosen]
                outputs = decode_outputs(self.model, arrived.tokens[rows], arrived.moments[rows], self.cache, rings)
                self._last[rings] = to_host(outputs)

    def _read(self, arrived: _Arrived, chosen: Array) -> None:
        """All events of these streams, packed."""
        rows = np.concatenate([np.arange(*arrived.starts[each : each + 2]) for each in chosen])
        starts = np.concatenate(([0], np.cumsum(arrived.counts[chosen]))).astype(np.int32)
        rings = arrived.rings[chosen]
        outputs = prefill_outputs(self.model, arrived.tokens[rows], arrived.moments[rows], starts, self.cache, rings)
        self._last[rings] = to_host(outputs)

    def check(
        self, streams: Sequence[int] | Array, types: Sequence[int | str] | Array, times: Sequence[float] | Array
    ) -> None:
        """Raise what `push` of the same events would raise, and take none of them."""
        self._arrange(streams, types, times)

    def next(self, streams: Array | Sequence[int] | None = None) -> Array:
        """Probabilities (n, V) of the type of the next event of each stream; default: of all.

        Raises:
            ValueError: a stream without an event so far.
        """
        return self._types(self.model.next_logits(self._outputs(streams)))

    def next_events(self, streams: Sequence[int] | Array, at: Sequence[float | None] | None = None) -> list[NextEvent]:
        """What comes next in each stream, type and time.

        Args:
            streams: (n,).
            at: (n,) until when nothing more has come in each, in the data set's unit; None: nothing is known beyond
                its last event.

        Raises:
            ValueError: a stream without an event so far, a time that is not finite or before a stream's last event.
        """
        outputs = self._outputs(streams)
        logits = self.model.next_logits(outputs)
        types = self._types(logits)
        gaps = None if self.model.time_head is None else self.model.next_gap(outputs, logits=logits)
        found = []
        for row, stream in enumerate(streams):
            last = self.last_time(int(stream))
            until = None if at is None else at[row]
            if until is not None and not last <= until < np.inf:
                raise ValueError(
                    f"at: got {until!r}, expected a finite time, not before {last!r}, that of the last event"
                )
            gap = None if gaps is None else gaps[row : row + 1]
            found.append(NextEvent(types[row], last, last if until is None else until, gap))
        return found

    def length(self, stream: int) -> int:
        """Events that a stream has had."""
        return int(self.cache.lengths[stream])

    def last_time(self, stream: int) -> float:
        """When its newest event happened, in the data set's unit; −inf before the first."""
        return float(self.cache.last_times[stream] + self.origin) if self.cache.lengths[stream] else -np.inf

    def _outputs(self, streams: Array | Sequence[int] | None) -> Array:
        """The last block's output at each stream's last event, where the model computes."""
        rings = np.arange(len(self.cache.lengths)) if streams is None else np.asarray(streams, np.int64)
        self._check_streams(rings)
        for ring in rings[self.cache.lengths[rings] == 0]:
            raise ValueError(f"stream {ring}: has no event yet; push one first")
        outputs: Array = self.model.backend.put(self._last[rings])
        return outputs

    def _types(self, logits: Array) -> Array:
        return probabilities(to_host(logits)[:, : self._types_known], Sampling())

    def _arrange(
        self, streams: Sequence[int] | Array, types: Sequence[int | str] | Array, times: Sequence[float] | Array
    ) -> _Arrived:
        """The events stream by stream, each in the order of its arrival; ValueError or UserError as in `push`."""
        rings, moments = np.asarray(streams, np.int64), np.asarray(times, np.float64) - self.origin
        tokens = np.array([self._token(each) for each in types], np.int32)
        if not rings.shape == moments.shape == tokens.shape or rings.ndim != 1:
            raise ValueError(
                f"streams, types, times: got shapes {rings.shape}, {tokens.shape}, {moments.shape}, expected equal ones"
            )
        self._check_streams(rings)
        order = np.argsort(rings, kind="stable")
        rings, tokens, moments = rings[order], tokens[order], moments[order]
        firsts = np.flatnonzero(np.diff(rings, prepend=-1))
        starts = np.append(firsts, len(rings)).astype(np.int32)
        counts = np.diff(starts).astype(np.int64)
        self._check_times(rings, moments, np.arange(len(rings)) - np.repeat(firsts, counts))
        self.cache.layers[0].check_room(rings[firsts], counts)
        return _Arrived(rings[firsts], counts, starts, tokens, moments)

    def clear(self, streams: Array | Sequence[int]) -> None:
        """Forget these streams: they begin anew."""
        rings = np.asarray(streams, np.int64)
        self._check_streams(rings)
        self.cache.clear(rings)

    def save(self, path: str | Path, stream: int = 0, *, name: str = "") -> None:
        """Write the state of one stream to a file (safetensors), whole or not at all; `name` is kept in it."""
        self.copy(stream, name=name).write(Path(path))

    def copy(self, stream: int = 0, *, name: str = "") -> SavedStream:
        """The state of one stream as it is now, to be written while others go on."""
        self._check_streams(np.array([stream]))
        metadata = {
            "format": FORMAT, "format_version": FORMAT_VERSION, "model": self.fingerprint(), "name": name,
            "length": str(self.cache.lengths[stream]), "last_time": float(self.cache.last_times[stream]).hex(),
            "first_time": float(self.cache.first_times[stream]).hex(),
        }  # fmt: skip
        arrays = {"last": self._last[stream].copy(), **self.cache.state(stream)}
        return SavedStream(metadata, {name: _storable(array) for name, array in arrays.items()})

    def load(self, path: str | Path, stream: int = 0) -> str:
        """Let a stream go on where a saved one stopped: what it answers then is the same to the bit. -> its name.

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
        if metadata["model"] != self.fingerprint():
            raise UserError(f"{path}: is a stream of another model; load it with the weights it was saved with")
        compute = self.model.precision.compute
        arrays = {name: array.view(compute) if array.dtype == np.uint16 else array for name, array in arrays.items()}
        self._last[stream] = arrays.pop("last")
        last, first = (float.fromhex(metadata[name]) for name in ("last_time", "first_time"))
        self.cache.restore(stream, int(metadata["length"]), last, first, arrays)
        return str(metadata.get("name", ""))

    def fingerprint(self) -> str:
        """Of the architecture and the weights, which stay what they are while there are streams."""
        if self._known_fingerprint is None:
            digest = hashlib.sha256(self.model.config.model_dump_json().encode())
            digest.update(np.ascontiguousarray(to_host(self.model.flat.values)).data)
            self._known_fingerprint = digest.hexdigest()
        return self._known_fingerprint

    def _token(self, kind: Any) -> int:
        if isinstance(kind, str):
            if self._names is None:
                raise ValueError(f"types: got {kind!r}, expected numbers, since no names were given")
            return self._names.token(kind)
        if isinstance(kind, bool) or not isinstance(kind, int | np.integer):
            raise ValueError(f"types: got {kind!r}, expected the name or the number of an event type")
        if self._names is not None and self._names.numerals:
            # Whoever writes 17 without quotes means the type of that name, not the one in that place.
            return self._names.token(int(kind))
        if not 0 <= kind < self._types_known:
            raise ValueError(f"types: got {kind}, expected 0 .. {self._types_known - 1}")
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

    def next(self, at: float | None = None) -> NextEvent:
        """What comes next, which type and when, given that nothing has come until `at` (default: its last event).

        ValueError before the first event, and for an `at` before the last one.
        """
        return self._streams.next_events([0], [at])[0]

    def clear(self) -> None:
        """Begin anew."""
        self._streams.clear([0])

    def save(self, path: str | Path) -> None:
        """Write its state to a file, whole or not at all."""
        self._streams.save(path)

    def load(self, path: str | Path) -> None:
        """Go on where a saved stream of the same model stopped. UserError for another file or model."""
        self._streams.load(path)


def _storable(array: Array) -> Array:
    """safetensors writes wrong data for arrays that are not C-contiguous, and does not know all 16-bit floats."""
    whole = np.ascontiguousarray(to_host(array))
    return whole.view(np.uint16) if whole.itemsize == 2 else whole
