"""What a run would take on many machines, before there are any: `ttr-gpu plan`.

What a step has to do follows from the configuration; how fast it is done, from a few constants, each with its source.
`distributed.step_time` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..backend import Backend
from ..distributed.gradients import divided
from ..distributed.step_time import Link, Network, Rates, StepTime, Work, step_time
from ..errors import UserError
from ..model_size import ModelOutline, model_size, step_flops
from ..precision import precision
from .config import RunConfig
from .memory_plan import StepMemory, step_memory


@dataclass(frozen=True)
class Constant:
    """A number that a plan rests on: its value in SI units, and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Constants:
    """All of them.

    Attributes:
        products, attention: floating-point operations per second that a rank reaches in its matrix products, and in
            attention with its time bias, forward and backward.
        memory_bandwidth: bytes per second that a rank reads and writes in everything else.
        local_bandwidth, local_latency: of ranks of one machine: bytes per second that each sends, seconds per message.
        link_bandwidth, link_latency: of each rank's way to other machines.
        overlap: the share of a sum's time that costs a backward going on meanwhile nothing.
    """

    products: Constant
    attention: Constant
    memory_bandwidth: Constant
    local_bandwidth: Constant
    local_latency: Constant
    link_bandwidth: Constant
    link_latency: Constant
    overlap: Constant

    @property
    def rates(self) -> Rates:
        """Those of one rank."""
        return Rates(self.products.value, self.attention.value, self.memory_bandwidth.value)

    def network(self, nodes: int, ranks: int) -> Network:
        """So many machines of so many ranks."""
        inside = Link(ranks, self.local_bandwidth.value, self.local_latency.value)
        return Network(inside, Link(nodes, self.link_bandwidth.value, self.link_latency.value), self.overlap.value)


@dataclass(frozen=True)
class PlanRow:
    """A number of machines.

    Attributes:
        tokens: of a step, on all ranks; batches: of a step, on each rank.
        step: of a run whose ranks have all moments; step_sharded: with train.shard_optimizer.
        efficiency: what a step would take without sums, over what it takes.
        memory, memory_sharded: of the fullest rank, without and with train.shard_optimizer.
    """

    nodes: int
    ranks: int
    tokens: float
    batches: float
    step: StepTime
    step_sharded: StepTime
    memory: StepMemory
    memory_sharded: StepMemory

    @property
    def efficiency(self) -> float:
        """Share of the step that is no waiting for others."""
        return (self.step.compute + self.step.update) / self.step.total

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.step.total

    def described(self) -> dict[str, object]:
        """For JSON; seconds and bytes."""
        return {
            "nodes": self.nodes, "ranks": self.ranks, "tokens": self.tokens, "batches_per_rank": self.batches,
            "step_seconds": self.step.total, "step": asdict(self.step), "efficiency": self.efficiency,
            "tokens_per_second": self.tokens_per_second, "step_seconds_sharded": self.step_sharded.total,
            "step_sharded": asdict(self.step_sharded), "memory_bytes": self.memory.total,
            "memory": self.memory.parts(), "memory_bytes_sharded": self.memory_sharded.total,
        }  # fmt: skip


def plan_rows(
    config: RunConfig, constants: Constants, nodes: Sequence[int], ranks: int, backend: Backend,
    global_tokens: int | None = None,
) -> list[PlanRow]:  # fmt: skip
    """A row for each number of machines of `ranks` ranks.

    Args:
        backend: what ranks compute on, for their memory.
        global_tokens: tokens of a step however many ranks there are; None: train.tokens_per_batch on each.

    Raises UserError if the global batch is too small for a single window on each rank of the first row; larger numbers
    of machines for which that is so get no row.
    """
    train, outline, rows = config.train, ModelOutline(config.model, backend), list[PlanRow]()
    for count in nodes:
        all_ranks = count * ranks
        tokens = float(global_tokens or train.tokens_per_batch * all_ranks)
        own = tokens / all_ranks
        if own < train.max_length:
            continue
        batches = max(1.0, own / train.tokens_per_batch)
        work, network = step_work(config, own / batches, batches), constants.network(count, ranks)
        memory, sharded = (
            step_memory(outline, _sharding(config, shard), config.recompute, ranks=all_ranks) for shard in (False, True)
        )
        plain, divided_moments = (step_time(work, constants.rates, network, sharded=shard) for shard in (False, True))
        rows.append(PlanRow(count, all_ranks, tokens, batches, plain, divided_moments, memory, sharded))
    if not rows:
        raise UserError(
            f"--global-tokens: got {global_tokens}, expected at least train.max_length ({train.max_length}) for each "
            f"of {nodes[0] * ranks} ranks"
        )
    return rows


def _sharding(config: RunConfig, shard: bool) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"shard_optimizer": shard})})


def step_work(config: RunConfig, tokens: float, batches: float = 1.0) -> Work:
    """What a rank does for a batch of `tokens`, in windows of train.max_length, and in a step of `batches` of them."""
    model, size = config.model, model_size(config.model)
    master, item = precision(model.precision).master.itemsize, precision(model.precision).compute.itemsize
    length = config.train.max_length
    windows = tokens / length
    products, attention = (windows * flops for flops in step_flops(model, np.array([0, length])))
    forward, backward = block_passes(config)
    layers = model.num_layers
    # The head's softmax: logits written, read, turned into their gradient, and that read.
    passes = item * tokens * (layers * (forward + backward) + 4 * model.vocabulary_size + 5 * model.embed_dim)
    in_blocks = 6.0 * layers * size.block_matrices * tokens
    total = products + attention
    # Two of three products belong to the backward, of attention's five of seven.
    share = (in_blocks * 2 / 3 + attention * 5 / 7) / total
    pieces = [
        (layers - lowest if lowest >= 0 else layers, float(master * count))
        for lowest, count in divided(size, layers, master)
    ]
    # AdamW reads weight, gradient and two moments and writes all but the gradient; the norm reads gradients, which are
    # then set to zero; matrices have copies in 16 bits.
    update = master * 9.0 * size.total + (size.matrices * (master + item) if item != master else 0)
    return Work(products, attention, passes, share, batches, pieces, layers, update, float(master * size.total))


def block_passes(config: RunConfig) -> tuple[int, int]:
    """Elements that one token's way through a block reads and writes outside of products and attention, forward and
    backward: two norms (2 C, 3 C), two additions to the residual stream (3 C, 2 C), RoPE in place, GeGLU (3 F, 5 F)."""
    model = config.model
    c, f = model.embed_dim, model.hidden_dim
    rope = 2 * (c + model.kv_heads * model.head_dim)
    dropped = 2 * 2 * c if model.dropout.residual > 0 else 0
    hidden = 2 * f if model.dropout.feed_forward > 0 else 0
    return 2 * 2 * c + 2 * 3 * c + rope + 3 * f + hidden, 2 * 3 * c + 2 * 2 * c + dropped + rope + 5 * f + hidden


# NVIDIA's data sheet of the H200 SXM (and DGX H200): dense bfloat16/float16 989 TFLOP/s, float32 67 TFLOP/s, memory
# 4.8 TB/s, NVLink 900 GB/s of both directions together, a network adapter of 400 Gbit/s for each GPU.
_SHEET = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}
_REACHED = 0.65


def gpu_constants(precision_name: str) -> Constants:
    """Those of machines with H200 GPUs, none of them measured."""
    sheet = _SHEET[precision_name]
    attention = 200e12 if precision_name != "float32" else 30e12
    return Constants(
        products=Constant(
            _REACHED * sheet,
            f"assumed: {100 * _REACHED:.0f} % of the {sheet / 1e12:.0f} TFLOP/s in the data sheet of the H200",
        ),
        attention=Constant(attention, "assumed: the goal of this project's kernels, which have not run on a GPU"),
        memory_bandwidth=Constant(0.8 * 4.8e12, "assumed: 80 % of the 4.8 TB/s in the data sheet of the H200"),
        local_bandwidth=Constant(0.8 * 450e9, "assumed: 80 % of NVLink's 450 GB/s each way in the same data sheet"),
        local_latency=Constant(3e-6, "assumed"),
        link_bandwidth=Constant(0.8 * 50e9, "assumed: 80 % of a 400 Gbit/s adapter for each GPU"),
        link_latency=Constant(5e-6, "assumed"),
        overlap=Constant(1.0, "assumed: sums take no multiprocessor from the backward"),
    )


def cpu_constants(rates: dict[str, Constant], missing: Sequence[str] = ()) -> Constants:
    """Those of machines without GPUs: rates are measured, or to be given; the network is assumed.

    Raises UserError for `missing` rates that are not measured.
    """
    unknown = [name for name in missing if name not in rates]
    if unknown:
        raise UserError(
            f"--{unknown[0].replace('_', '-')}: expected a rate with --no-measure, since there is no default"
        )
    to_be_given = Constant(1.0, "given")
    return Constants(
        products=rates.get("products", to_be_given), attention=rates.get("attention", to_be_given),
        memory_bandwidth=rates.get("memory_bandwidth", to_be_given),
        local_bandwidth=rates.get("local_bandwidth") or Constant(2e9, "assumed: MPI's shared memory"),
        local_latency=rates.get("local_latency") or Constant(100e-6, "assumed: as that"),
        link_bandwidth=Constant(0.9 * 1.25e9, "assumed: 90 % of 10 Gbit/s Ethernet"),
        link_latency=Constant(100e-6, "assumed: TCP, and a waiting thread"),
        overlap=Constant(0.0, "reasoned: cores that sum do not compute"),
    )  # fmt: skip


def with_given(constants: Constants, given: dict[str, float | None]) -> Constants:
    """Constants, some of which the user gave."""
    return replace(constants, **{name: Constant(value, "given") for name, value in given.items() if value is not None})


def break_even(config: RunConfig, constants: Constants, network: Network) -> float:
    """Tokens of a rank from which on sums hide behind its backward, but for the last piece: where

    tokens · seconds of a token's backward = seconds of all sums but the last.
    """
    work = step_work(config, float(config.train.max_length))
    one = step_time(replace(work, pieces=[(work.layers, 0.0)]), constants.rates, replace(network, overlap=1.0))
    hidden = sum(network.sum_seconds(size) for _, size in work.pieces[:-1])
    return config.train.max_length * hidden / (one.compute * work.blocks_backward)
