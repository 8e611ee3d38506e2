"""Packed batches: windows of sequences laid end to end, without padding, in an order that needs no state but the step.

A window of n + 1 neighbouring tokens of one sequence gives n inputs and n targets. A sequence is cut into windows of at
most `max_length` inputs, each overlapping the next by one token, so every token but a sequence's first is a target
exactly once per epoch. With survival, a sequence's last event is an input too, whose target is CENSORED: nothing more
happened until the end of observation. Where a long sequence is cut differs from epoch to epoch, so that a token is not
seen with the same past each time.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np

from ..backend import CENSORED
from ..errors import UserError
from .dataset import Split

# Tokens read from disk in one piece, and tokens held in memory and shuffled together.
_SEGMENT, _POOL = 1 << 23, 1 << 26
# Tokens that evaluation reads at a time.
_BLOCK = 1 << 20
_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """Packed sequences (see the module's text).

    Attributes:
        tokens, targets: (total,) int32; target −1 means none, CENSORED that nothing more happened until its time.
        times, target_times: (total,) float64, relative to the data set's origin, in its unit.
        cu_seqlens: (N + 1,) int32: window n is positions cu_seqlens[n] .. cu_seqlens[n + 1].
        sequence_ids: (N,) sequence of each window; starts: (N,) its first token in the split.
        step, epoch: from 0; first_row: the part's first position in the batch, where several processes share it.
    """

    tokens: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]
    cu_seqlens: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    target_times: np.ndarray[Any, Any]
    sequence_ids: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    step: int
    epoch: int
    first_row: int = 0


@dataclass(frozen=True)
class Share:
    """Which of the batches of each step are one process's, of several that train together: some of them whole, or,
    where there are more processes than batches, some windows of one.

    Attributes:
        rank, size: of the process, from 0, and of all.
        batches: of a step (train.accumulate), all processes together.
    """

    rank: int = 0
    size: int = 1
    batches: int = 1

    def __post_init__(self) -> None:
        if self.batches % self.size and self.size % self.batches:
            raise UserError(
                f"train.accumulate: got {self.batches} batches per step for {self.size} processes, expected a multiple "
                f"or a divisor of {self.size}, such as --set train.accumulate={self.size}"
            )

    @property
    def count(self) -> int:
        """Batches of a step that this process has, whole or in part."""
        return max(1, self.batches // self.size)

    @property
    def parts(self) -> int:
        """Processes that share a batch."""
        return max(1, self.size // self.batches)

    def part_of(self, step: int) -> int | None:
        """Which of a batch's parts is this process's; None if none is. Batches count from 0 through all steps."""
        place = step % self.batches
        if self.parts == 1:
            return 0 if place // self.count == self.rank else None
        return self.rank % self.parts if self.rank // self.parts == place else None

    def windows(self, lengths: Any, part: int) -> slice:
        """The windows of a part of a batch: those between two cuts, each at the end of the window nearest to where even
        parts would end. There may be none. If the batch is `balanced`, 2, 4, 8 … parts are nearly even; else a part may
        have half a window at either end more or less than its share.
        """
        ends = np.concatenate([[0], np.cumsum(lengths)])
        even = ends[-1] * np.arange(self.parts + 1) / self.parts
        after = np.searchsorted(ends, even)
        before = np.maximum(after - 1, 0)
        cuts = np.where(even - ends[before] < ends[after] - even, before, after)
        return slice(int(cuts[part]), int(cuts[part + 1]))


ALL = Share()


@dataclass(frozen=True)
class Windows:
    """All windows of a split in file order: first token (absolute), inputs, and the sequence each is cut from."""

    first: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]
    sequence: np.ndarray[Any, Any]

    @staticmethod
    def of(
        split: Split, max_length: int, rng: np.random.Generator | None = None, *, survival: bool = False
    ) -> Windows:  # fmt: skip
        """Cut every sequence; with `rng` the first window of a long one has a random length. With survival the last
        event is an input, too.

        Long is what gives more than 4 windows: in a shorter one the past that an additional short window lacks would
        weigh more than what the variety gives.
        """
        inputs = np.maximum(np.diff(split.offsets) - (not survival), 0)
        missing = np.zeros(split.sequences, np.int64)  # of the first window
        if rng is not None:
            long = inputs > 4 * max_length
            missing[long] = rng.integers(0, max_length, int(long.sum()))
        counts = -(-(inputs + missing) // max_length)
        sequence = np.repeat(np.arange(split.sequences), counts)
        number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = np.maximum(number * max_length - missing[sequence], 0)
        end = np.minimum((number + 1) * max_length - missing[sequence], inputs[sequence])
        return Windows(split.offsets[:-1][sequence] + begin, end - begin, sequence)


class TrainingBatches:
    """Endless training batches, read and cut in a background thread.

    Args:
        split: to train on.
        fingerprint: of the data set; with `seed` it decides the order.
        tokens_per_batch: windows are packed whole, in shuffled order, up to this many tokens.
        max_length: inputs of the longest window.
        start_step: the first step wanted: what a run resumes with.
        share: which of the batches, all of which follow from the same numbers on every process.
        survival: with the last event of each sequence as an input (see the module's text).

    Data larger than memory are shuffled in pools: pieces of some million tokens are permuted, and windows within the
    pieces that are in memory together.
    """

    def __init__(
        self, split: Split, *, fingerprint: str, tokens_per_batch: int, max_length: int, seed: int = 0,
        start_step: int = 0, pool_tokens: int = _POOL, segment_tokens: int = _SEGMENT, share: Share = ALL,
        survival: bool = False,
    ) -> None:  # fmt: skip
        check_sizes(split, tokens_per_batch, max_length)
        self._survival = survival
        self._split, self._fingerprint, self._seed = split, fingerprint, seed
        self._budget, self._start, self.share = tokens_per_batch, start_step, share
        self._max_length = max_length
        self._pool_tokens, self._segment_tokens = pool_tokens, segment_tokens
        self._pool: tuple[tuple[int, ...], Any, Any, Any] | None = None
        self.steps_per_epoch = sum(len(bounds) - 1 for _, _, _, bounds in self._pools(0))
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(_AHEAD)
        self._peeked: Batch | BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def peek(self) -> Batch | None:
        """The batch that `next` will give, if it is there already."""
        if self._peeked is None and not self._queue.empty():
            self._peeked = self._queue.get()
        return self._peeked if isinstance(self._peeked, Batch) else None

    def __next__(self) -> Batch:
        while True:
            try:
                item, self._peeked = self._peeked, None
                if item is None:
                    item = self._queue.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the reader of batches has stopped") from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def __enter__(self) -> TrainingBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def memory(self) -> int:
        """Bytes of tokens and times that are held for batches to come, and of batches that are cut already."""
        return 12 * min(self._split.token_count, self._pool_tokens) + 24 * self._budget * (_AHEAD + 1)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self) -> None:
        try:
            for batch in self._batches():
                self._put(batch)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _batches(self) -> Iterator[Batch]:
        step, epoch = 0, 0
        while True:
            for segments, windows, order, bounds in self._pools(epoch):
                batches = len(bounds) - 1
                if step + batches <= self._start:
                    step += batches
                    continue
                tokens, times, shifts = self._load(segments)
                for begin, end in pairwise(bounds):
                    part = self.share.part_of(step)
                    if step >= self._start and part is not None:
                        chosen = balanced(windows, order[begin:end])
                        mine = self.share.windows(windows.length[chosen], part)
                        first_row = int(windows.length[chosen[: mine.start]].sum())
                        chosen = chosen[mine]
                        first = windows.first[chosen]
                        base = first - shifts[first // self._segment_tokens]
                        batch = _cut(windows, chosen, tokens, times, base, step, epoch, first_row)
                        if self._survival:
                            _censor(batch, self._split)
                        yield batch
                    step += 1
            epoch += 1

    def _pools(self, epoch: int) -> Iterator[tuple[tuple[int, ...], Windows, Any, list[int]]]:
        """(segments, windows of the epoch, those of the pool in shuffled order, where batches begin) of each pool."""
        rng = np.random.default_rng(_entropy(self._fingerprint, self._seed, epoch))
        windows = Windows.of(self._split, self._max_length, rng, survival=self._survival)
        pieces = max(1, -(-self._split.token_count // self._segment_tokens))
        # A window belongs to the segment in which it begins.
        edges = np.searchsorted(windows.first, np.arange(pieces + 1) * self._segment_tokens)
        segments = rng.permutation(pieces)
        per_pool = max(1, self._pool_tokens // self._segment_tokens)
        for begin in range(0, pieces, per_pool):
            # In file order, so that a pool that holds all data is the same in every epoch and stays in memory.
            chosen = tuple(sorted(int(segment) for segment in segments[begin : begin + per_pool]))
            members = np.concatenate([np.arange(edges[s], edges[s + 1]) for s in chosen])
            order = rng.permutation(members)
            yield chosen, windows, order, pack(windows.length[order], self._budget)

    def _load(self, segments: tuple[int, ...]) -> tuple[Any, Any, Any]:
        """Tokens and times of segments end to end, each with what windows that begin in it reach into the next; and by
        how much the tokens of each segment lie earlier there than in the split."""
        if self._pool is None or self._pool[0] != segments:
            self._pool = None
            tokens, times, shifts, filled = [], [], np.zeros(segments[-1] + 1, np.int64), 0
            for segment in segments:
                begin = segment * self._segment_tokens
                end = min(begin + self._segment_tokens + self._max_length + 1, self._split.token_count)
                part = self._split.read(begin, end)
                tokens.append(part[0])
                times.append(part[1])
                shifts[segment] = begin - filled
                filled += end - begin
            self._pool = (segments, np.concatenate(tokens), np.concatenate(times), shifts)
        return self._pool[1:]


def evaluation_batches(
    split: Split, *, tokens_per_batch: int, max_length: int, stride: int | None = None,
    limit_tokens: int | None = None, share: Share = ALL, survival: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Every predictable token of a split exactly once, in file order.

    Args:
        stride: windows advance by this many positions, and only positions that no earlier window scored have a target:
            every token then has at least max_length − stride tokens of its past (where there are so many). Default:
            max_length, windows side by side.
        limit_tokens: stop after about so many targets, of all processes together.
        share: every so many-th batch is this process's.
        survival: each sequence's last event is an input too, with target CENSORED.
    """
    check_sizes(split, tokens_per_batch, max_length, whole_batch=False)
    stride = stride or max_length
    windows = Windows.of(split, stride, survival=survival)
    starts = split.offsets[windows.sequence]
    # Reach back for context; what an earlier window has scored keeps no target.
    context = np.minimum(windows.first - starts, max_length - stride)
    reached = Windows(windows.first - context, windows.length + context, windows.sequence)
    bounds = pack(reached.length, tokens_per_batch)
    done = 0
    # What has been read: whole blocks, since a batch is less than what Zarr decompresses for it.
    begins, ends, tokens, times = 0, 0, np.empty(0, np.int32), np.empty(0)
    for step, (begin, end) in enumerate(pairwise(bounds)):
        if limit_tokens is not None and done >= limit_tokens:
            return
        done += int(windows.length[begin:end].sum())
        if step % share.size != share.rank:
            continue
        chosen = np.arange(begin, end)
        low = int(reached.first[begin:end].min())
        high = int((reached.first[begin:end] + reached.length[begin:end]).max()) + 1
        if low < begins or high > ends:
            begins, ends = low, min(max(high, low + _BLOCK), split.token_count)
            tokens, times = split.read(begins, ends)
        batch = _cut(reached, chosen, tokens, times, reached.first[chosen] - begins, step, 0)
        if survival:
            _censor(batch, split)
        if stride < max_length:
            position = np.arange(len(batch.targets)) - np.repeat(batch.cu_seqlens[:-1], reached.length[chosen])
            batch.targets[position < np.repeat(context[chosen], reached.length[chosen])] = -1
        yield batch


def last_windows(split: Split, *, tokens_per_batch: int, max_length: int) -> Iterator[Batch]:
    """The last `max_length` events of every sequence, its very last one included, in file order; without targets.

    For what is asked after a sequence's end: what has not happened until the end of observation.
    """
    ends = split.offsets[1:]
    first = np.maximum(split.offsets[:-1], ends - max_length)
    lengths = ends - first
    for step, (begin, end) in enumerate(pairwise(pack(lengths, max(tokens_per_batch, max_length)))):
        tokens, times = split.read(int(first[begin]), int(ends[end - 1]))
        starts = np.concatenate([[0], np.cumsum(lengths[begin:end])])
        index = np.repeat(first[begin:end] - first[begin] - starts[:-1], lengths[begin:end]) + np.arange(starts[-1])
        none = np.full(len(index), -1, np.int32)
        yield Batch(
            tokens[index], times[index], starts.astype(np.int32), none, times[index], np.arange(begin, end),
            first[begin:end], step, 0,
        )  # fmt: skip


def check_sizes(split: Split, tokens_per_batch: int, max_length: int, whole_batch: bool = True) -> None:
    """UserError if a window does not fit a batch, or the data do not fill one."""
    if max_length < 1:
        raise UserError(f"train.max_length: got {max_length}, expected at least 1")
    if tokens_per_batch < max_length:
        raise UserError(
            f"train.tokens_per_batch: got {tokens_per_batch}, expected at least train.max_length ({max_length}); "
            f"try --set train.max_length={tokens_per_batch}"
        )
    targets = split.token_count - split.sequences
    if targets < 1:
        raise UserError(f"{split.path}: split {split.name} has no sequence of two tokens; nothing can be predicted")
    if whole_batch and targets < tokens_per_batch:
        raise UserError(
            f"train.tokens_per_batch: a batch of {tokens_per_batch} tokens is larger than the data: split {split.name} "
            f"of {split.path} has {targets} targets; try --set train.tokens_per_batch={max(1, targets // 4)} "
            f"--set train.max_length={min(max_length, max(1, targets // 4))}"
        )


def pack(lengths: Any, budget: int) -> list[int]:
    """Where batches begin when windows of these lengths are laid end to end, as many as fit `budget`, in order."""
    ends = np.cumsum(lengths)
    bounds, used = [0], 0
    while bounds[-1] < len(lengths):
        last = int(np.searchsorted(ends, used + budget, "right"))
        bounds.append(last)
        used = int(ends[last - 1])
    return bounds


def balanced(windows: Windows, chosen: Any) -> Any:
    """The chosen windows in such an order that the halves, quarters, eighths … of a batch of them are nearly even.

    The longest first, each goes to the half that has less so far; and so on within the halves. On every number of
    processes a batch is the same: its rows decide on dropout's masks.
    """
    lengths = windows.length[chosen]
    descending = np.argsort(-lengths, kind="stable")
    return chosen[_in_halves(descending.tolist(), lengths.tolist())]


def _in_halves(descending: list[int], lengths: list[int]) -> list[int]:
    if len(descending) < 2:
        return descending
    halves: tuple[list[int], list[int]] = ([], [])
    lead = 0  # of the first half
    for window in descending:
        halves[lead > 0].append(window)
        lead += lengths[window] if lead <= 0 else -lengths[window]
    return [window for half in halves for window in _in_halves(half, lengths)]


def _cut(
    windows: Windows, chosen: Any, tokens: Any, times: Any, base: Any, step: int, epoch: int, first_row: int = 0
) -> Batch:
    """The batch of the chosen windows, which begin at `base` in `tokens`."""
    lengths = windows.length[chosen]
    ends = np.cumsum(lengths)
    index = np.repeat(base - (ends - lengths), lengths) + np.arange(int(lengths.sum()))
    sequence = windows.sequence[chosen]
    # After the split's last token there is none: with survival its target is not one.
    following = np.minimum(index + 1, len(tokens) - 1)
    return Batch(
        tokens=tokens[index], times=times[index], cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        targets=tokens[following], target_times=times[following], sequence_ids=sequence, starts=windows.first[chosen],
        step=step, epoch=epoch, first_row=first_row,
    )  # fmt: skip


def _censor(batch: Batch, split: Split) -> None:
    """Targets of the last events of sequences become CENSORED, at the end of observation."""
    last = batch.starts + np.diff(batch.cu_seqlens) == split.offsets[batch.sequence_ids + 1]
    at = batch.cu_seqlens[1:][last] - 1
    batch.targets[at], batch.target_times[at] = CENSORED, split.observed_until


def _entropy(fingerprint: str, seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{fingerprint}:{seed}:{epoch}".encode()).digest()[:16], "little")
