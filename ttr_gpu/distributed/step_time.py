"""The time of a data-parallel step on paper, from the rates of one rank and of what connects ranks.

    compute   products / P + attention / A + bytes / M                    operations and bytes; rates per second
    sum of S bytes over p ranks    2 ⌈log₂ p⌉ α + 2 (p − 1)/p · S/β       reduce-scatter, then all-gather
    N machines of g ranks          a sum over g, and one of S/g over N    each rank carries its share between machines
    update    bytes / M, with shared moments (ZeRO-1) 1/p of it and p broadcasts of S/p

The cost of a sum is that of Rabenseifner's algorithm (Thakur, Rabenseifner, Gropp 2005, *Optimization of Collective
Communication Operations in MPICH*, §4.5) without the additions, which go on while bytes arrive.

Gradients are summed piece by piece (`gradients.GradientSum`). Piece i, ready r_i after the blocks' backward begins, is
done at  f_i = max(f_{i−1}, r_i) + c_i; the last is ready when the backward ends. With an overlap o < 1 a share 1 − o of
each sum's time is taken from the backward, which shares its cores with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True)
class Rates:
    """Of one rank, per second: operations in matrix products and in attention, bytes read and written."""

    products: float
    attention: float
    memory: float


@dataclass(frozen=True)
class Link:
    """What connects `members` alike: `bandwidth` bytes/s that each sends while it receives as many, `latency` in s."""

    members: int
    bandwidth: float
    latency: float

    def sum_seconds(self, size: float) -> float:
        """A sum of arrays of `size` bytes over all members."""
        p = self.members
        return 0.0 if p == 1 else 2 * _rounds(p) * self.latency + 2 * (p - 1) / p * size / self.bandwidth


@dataclass(frozen=True)
class Network:
    """Ranks of a machine, `inside`, and machines, `between`; overlap: the share of a sum's time that costs the backward
    nothing."""

    inside: Link
    between: Link
    overlap: float = 1.0

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.inside.members * self.between.members

    def sum_seconds(self, size: float) -> float:
        """A sum of arrays of `size` bytes over all ranks."""
        return self.inside.sum_seconds(size) + self.between.sum_seconds(size / self.inside.members)

    def gather_seconds(self, size: float) -> float:
        """Each rank's part of `size` bytes broadcast to all others, one after the other."""
        if self.ranks == 1:
            return 0.0
        links = [link for link in (self.inside, self.between) if link.members > 1]
        latency = sum(_rounds(link.members) * link.latency for link in links)
        return self.ranks * latency + size / min(link.bandwidth for link in links)


@dataclass(frozen=True)
class Work:
    """What one rank does for one batch, and in a step.

    Attributes:
        products, attention, passes: operations, operations and bytes of a forward and backward of one batch.
        blocks_backward: the share of it that is the backward of the blocks, while which gradients become ready.
        batches: of a step, one after the other; the last one's backward is where sums can hide.
        pieces: (blocks done, bytes) of the gradients in the order of their sums; all blocks for what comes last.
        layers: blocks.
        update: bytes that an optimizer step of all parameters reads and writes; values: bytes of these.
    """

    products: float
    attention: float
    passes: float
    blocks_backward: float
    batches: float
    pieces: Sequence[tuple[int, float]]
    layers: int
    update: float
    values: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: computing; sums in all, and what of them nothing hides; the update; gathering of what others
    updated."""

    compute: float
    sums: float
    exposed: float
    update: float
    gather: float

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.exposed + self.update + self.gather


def step_time(work: Work, rates: Rates, network: Network, *, sharded: bool = False) -> StepTime:
    """Seconds of a step; `sharded`: moments are divided among the ranks (ZeRO-1)."""
    batch = work.products / rates.products + work.attention / rates.attention + work.passes / rates.memory
    costs = [network.sum_seconds(size) for _, size in work.pieces]
    backward = batch * work.blocks_backward
    ready = [backward * done / work.layers for done, _ in work.pieces]
    exposed = pipelined(ready, costs, network.overlap) - backward
    update = work.update / rates.memory
    if not sharded:
        return StepTime(batch * work.batches, sum(costs), exposed, update, 0.0)
    gather = network.gather_seconds(work.values)
    return StepTime(batch * work.batches, sum(costs), exposed, update / network.ranks, gather)


def pipelined(ready: Sequence[float], costs: Sequence[float], overlap: float) -> float:
    """When both the backward, which alone ends at ready[-1], and the last sum are done."""
    finished = taken = 0.0
    for at, cost in zip(ready, costs, strict=True):
        finished = max(finished, at + taken) + cost
        taken += (1.0 - overlap) * cost
    return max(finished, ready[-1] + taken)


def _rounds(members: int) -> int:
    return ceil(log2(members))
