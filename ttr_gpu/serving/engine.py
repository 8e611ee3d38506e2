"""Named streams on one EventStreams: requests that wait together are computed together (continuous batching).

A round takes the first request of every stream that has one: of pushes, at most SLICE events each, so that a long one
holds nobody up. All new events go through the model side by side, then all predictions are made. Requests of one stream
keep their order; those of different streams never see each other.

Everything but the arithmetic runs in the event loop's thread: there is nothing to lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..infer.event_stream import EventStreams
from ..infer.next_event import NextEvent
from .refusal import Refusal

# Events of one request in a round.
SLICE = 128
# Events that a watcher may fall behind before the oldest are dropped.
BACKLOG = 256


@dataclass(frozen=True)
class Answer:
    """What a stream is after a request.

    Attributes:
        events: how many it has had in all.
        last_time: of the newest.
        next: what comes next, where it was asked for.
    """

    stream: str
    events: int
    last_time: float
    next: NextEvent | None


@dataclass(frozen=True)
class Seen:
    """What a watcher of a stream is told: events that came, and what is expected then."""

    stream: str
    types: list[int | str]
    times: list[float]
    next: NextEvent


@dataclass
class _Job:
    """A request; without events it only asks."""

    stream: str
    types: list[int | str]
    times: list[float]
    predict: bool
    at: float | None
    deadline: float
    future: asyncio.Future[Answer]
    ring: int = -1
    taken: int = 0

    def slice(self) -> slice:
        return slice(self.taken, min(self.taken + SLICE, len(self.types)))


class StreamEngine:
    """See the module.

    Args:
        streams: as many as may exist at once; none has had an event, or `names` says which have.
        names: ring of each stream that exists already.
        patience: seconds after which a request that has not begun is given up; nothing of it has been taken then.
        most_waiting: requests that may wait.
        batch_done: told of each round: (requests, events, seconds).

    Attributes:
        rings: of the streams that exist, by name.
        at_rest: a lock: who has it finds no round under way.
        changed: streams that have had events, or are no more, since whoever saves them has last emptied it.
    """

    def __init__(
        self, streams: EventStreams, *, names: dict[str, int] | None = None, patience: float = 30.0,
        most_waiting: int = 4096, batch_done: Callable[[int, int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.streams, self.patience, self.most_waiting = streams, patience, most_waiting
        self.rings = dict(names or {})
        self.limit = len(streams.cache.lengths)
        taken = set(self.rings.values())
        self.at_rest, self.changed = asyncio.Lock(), set[str]()
        self._free = [ring for ring in range(self.limit - 1, -1, -1) if ring not in taken]
        self._queues: dict[str, deque[_Job]] = {}
        self._waiting = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._watchers: dict[str, set[asyncio.Queue[Seen]]] = {}
        self._batch_done = batch_done or (lambda requests, events, seconds: None)

    @property
    def waiting(self) -> int:
        """Requests that have not been answered."""
        return self._waiting

    async def push(self, stream: str, types: list[int | str], times: list[float], *, predict: bool = False) -> Answer:
        """Events for a stream, which begins with its first. Refusal, and then none of them is taken."""
        return await self._submit(stream, types, times, predict, None)

    async def predict(self, stream: str, at: float | None = None) -> Answer:
        """What comes next in a stream, given that nothing has until `at`. Refusal for a stream that there is not."""
        return await self._submit(stream, [], [], True, at)

    def forget(self, stream: str) -> None:
        """Remove a stream that nothing waits for; its place is free for another."""
        if stream not in self.rings:
            raise Refusal(404, f"stream: there is no {stream!r}")
        if stream in self._queues:
            raise Refusal(409, f"stream: requests for {stream!r} are waiting; come again when they are answered")
        ring = self.rings.pop(stream)
        self.streams.clear([ring])
        self._free.append(ring)
        self.changed.add(stream)

    def within_request(self, stream: str) -> bool:
        """Whether a stream has had a part of the events of a request."""
        return stream in self._queues and self._queues[stream][0].taken > 0

    def describe(self, stream: str) -> Answer:
        """Where a stream stands, without asking the model."""
        if stream not in self.rings:
            raise Refusal(404, f"stream: there is no {stream!r}")
        ring = self.rings[stream]
        return Answer(stream, self.streams.length(ring), self.streams.last_time(ring), None)

    def watch(self, stream: str) -> asyncio.Queue[Seen]:
        """A queue that is told of this stream's events from now on; `unwatch` ends it. Old news make way for new."""
        queue: asyncio.Queue[Seen] = asyncio.Queue(BACKLOG)
        self._watchers.setdefault(stream, set()).add(queue)
        return queue

    def unwatch(self, stream: str, queue: asyncio.Queue[Seen]) -> None:
        """Tell this queue no more."""
        watchers = self._watchers.get(stream, set())
        watchers.discard(queue)
        if not watchers:
            self._watchers.pop(stream, None)

    async def run(self) -> None:
        """Serve until `close`, and then what still waits."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queues:
                jobs = self._begin()
                if jobs:
                    async with self.at_rest:
                        await self._round(jobs)
            if self._closing:
                return

    def close(self) -> None:
        """Take no more requests; `run` ends when those that wait are answered."""
        self._closing = True
        self._wake.set()

    def _submit(
        self, stream: str, types: list[int | str], times: list[float], predict: bool, at: float | None
    ) -> asyncio.Future[Answer]:
        if self._closing:
            raise Refusal(503, "the service is shutting down")
        if self._waiting >= self.most_waiting:
            raise Refusal(503, f"{self._waiting} requests are waiting already; come again later")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        job = _Job(stream, types, times, predict, at, time.monotonic() + self.patience, future)
        self._queues.setdefault(stream, deque()).append(job)
        self._waiting += 1
        self._wake.set()
        return future

    def _begin(self) -> list[_Job]:
        """The first request of every stream; those that cannot be served are answered at once."""
        jobs = []
        for stream in list(self._queues):
            job = self._queues[stream][0]
            if job.taken == 0:
                # Looked at first: a new stream of who has gone away must not take a place.
                if job.future.cancelled():
                    self._end(job)
                    continue
                try:
                    self._admit(job)
                except Refusal as refusal:
                    self._end(job, refusal)
                    continue
            jobs.append(job)
        return jobs

    def _admit(self, job: _Job) -> None:
        if time.monotonic() > job.deadline:
            raise Refusal(503, f"not begun within {self.patience:g} s, nothing was taken; come again later")
        known = job.stream in self.rings
        if not known and not job.types:
            raise Refusal(404, f"stream: there is no {job.stream!r}; push an event first")
        if not known and not self._free:
            raise Refusal(429, f"stream: got a new one, but there are {self.limit} already; DELETE one, or --streams")
        ring = self.rings[job.stream] if known else self._free[-1]
        if job.at is not None and job.at < self.streams.last_time(ring):
            last = self.streams.last_time(ring)
            raise Refusal(409, f"at: got {job.at!r}, expected a time not before {last!r}, that of the last event")
        try:
            self.streams.check([ring] * len(job.types), job.types, job.times)
        except (ValueError, UserError) as error:
            message = str(error).replace(f" in stream {ring}", "")
            raise Refusal(409 if "not before" in message or "capacity" in message else 422, message) from None
        job.ring = ring
        if not known:
            self.rings[job.stream] = self._free.pop()

    async def _round(self, jobs: list[_Job]) -> None:
        begun = time.monotonic()
        slices = [job.slice() for job in jobs]
        watched = [job for job in jobs if job.types and job.stream in self._watchers]
        self.changed.update(job.stream for job in jobs if job.types)
        try:
            foreseen = await asyncio.to_thread(self._compute, jobs, slices, watched)
        except Exception as error:
            # A defect, not a bad request: all of this round hear of it, and the service lives on.
            for job in jobs:
                if not self.streams.length(job.ring):
                    self._free.append(self.rings.pop(job.stream))
                self._end(job, error)
            return
        for job, part in zip(jobs, slices, strict=True):
            job.taken = part.stop
            if job in watched:
                self._tell(Seen(job.stream, job.types[part], job.times[part], foreseen[job.stream]))
            if job.taken == len(job.types):
                self._end(job, foreseen.get(job.stream) if job.predict else None)
        self._batch_done(len(jobs), sum(part.stop - part.start for part in slices), time.monotonic() - begun)

    def _compute(self, jobs: list[_Job], slices: list[slice], watched: list[_Job]) -> dict[str, NextEvent]:
        """In a thread of its own: push the slices, then predict for those that ask."""
        rings: list[int] = []
        types: list[int | str] = []
        times: list[float] = []
        for job, part in zip(jobs, slices, strict=True):
            rings += [job.ring] * (part.stop - part.start)
            types += job.types[part]
            times += job.times[part]
        if rings:
            self.streams.push(rings, types, times)
        asking = [
            job for job, part in zip(jobs, slices, strict=True)
            if job in watched or (job.predict and part.stop == len(job.types))
        ]  # fmt: skip
        if not asking:
            return {}
        predicted = self.streams.next_events([job.ring for job in asking], [job.at for job in asking])
        return {job.stream: each for job, each in zip(asking, predicted, strict=True)}

    def _end(self, job: _Job, result: NextEvent | Exception | None = None) -> None:
        queue = self._queues[job.stream]
        queue.popleft()
        if not queue:
            del self._queues[job.stream]
        self._waiting -= 1
        if job.future.done():
            return
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            ring = job.ring
            job.future.set_result(Answer(job.stream, self.streams.length(ring), self.streams.last_time(ring), result))

    def _tell(self, seen: Seen) -> None:
        for queue in self._watchers.get(seen.stream, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(seen)
