"""How much memory a training step takes and what recomputing activations would save and cost, before it is tried.

The activations are counted array by array, as the layers allocate and free them (see their forward and backward), at
the moments that can be the fullest: while the head computes its loss, and in the backward of each block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

import numpy as np

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.parallel import get_threads
from ttr_kernels.cross_entropy import default_rows_per_chunk
from ttr_kernels.matmul.blas import is_called_directly
from ttr_kernels.matmul.cpu import reads_16_bit_floats
from ttr_kernels.matmul.onednn import why_not_bfloat16

from ..data.batches import Batch
from ..errors import UserError
from ..model import TransformerModel
from ..model_size import ModelOutline, attention_pairs, model_size
from ..nn.recompute import Policy, Recompute
from ..nn.time2vec import time_kinds
from .config import RunConfig

# What is planned, made or not.
Planned = TransformerModel | ModelOutline

# How far apart blocks that are recomputed may lie in the table and the choice of --memory-limit.
_EVERY = (1, 2, 4)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, by what takes them.

    Attributes:
        program: interpreter, libraries, compiled kernels; data: sequences and batches in memory.
        parameters: with their 16-bit copies; averages: of weights (train.ema).
        checkpoint: the copy that is written while training goes on; on a GPU it lies in the host's memory, and is 0.
        activations: at their peak, with gradients of activations: the size of the arena.
        scratch: of matrix products and performer attention, which threads keep. What softmax attention keeps, less
            than a MiB for each thread, is left out.
    """

    program: int
    data: int
    parameters: int
    gradients: int
    optimizer: int
    averages: int
    checkpoint: int
    activations: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """By name, without what is not there."""
        return {name: size for name, size in vars(self).items() if size}


@dataclass(frozen=True)
class PolicyCost:
    """What a policy of recomputation takes.

    Attributes:
        extra: operations that are added, as a share of the step's.
        seconds: of a step, predicted.
    """

    recompute: Recompute
    memory: StepMemory
    extra: float
    seconds: float


def step_memory(
    model: Planned, config: RunConfig, recompute: Recompute, *, program: int = 0, data: int = 0, ranks: int = 1
) -> StepMemory:
    """The memory of a step of `config` under a policy, on the fullest of so many ranks: the first, which saves."""
    counts, compute, master = model_size(config.model), model.precision.compute, model.precision.master
    size = master.itemsize * counts.total
    copies = 0
    if compute != master:
        # A table that is no head's as well is not copied: its rows are cast as they are looked up.
        copies = compute.itemsize * (counts.matrices - (0 if config.model.tied_head else counts.table))
    optimizer = 2 * size
    if config.train.optimizer == "muon":
        optimizer -= master.itemsize * config.model.num_layers * counts.block_matrices
    averages = size if config.train.ema else 0
    return StepMemory(
        program=program, data=data, parameters=size + copies, gradients=size,
        optimizer=optimizer // ranks if config.train.shard_optimizer else optimizer, averages=averages,
        checkpoint=size + optimizer + averages if model.backend.name == "cpu" else 0,
        activations=_activations(model, config, recompute), scratch=_scratch(model, config),
    )  # fmt: skip


def _activations(model: Planned, config: RunConfig, recompute: Recompute) -> int:
    """Peak of what a forward and backward allocate."""
    shape, train = config.model, config.train
    tokens, item = train.tokens_per_batch, model.precision.compute.itemsize
    c, f, heads = shape.embed_dim, shape.hidden_dim, shape.num_heads
    qkv = c + 2 * shape.kv_heads * shape.head_dim
    stream = item * c  # a row of the residual stream
    # Saved by a block: norm, q/k/v, attention, sum, norm; gate and value, and their product; statistics in float32.
    attention, feed_forward, statistics = item * (qkv + c) + 4 * heads, 3 * item * f, 8
    whole = 3 * stream + attention + feed_forward + statistics
    kept = {
        "none": whole, "block": 0, "attention": whole - attention, "feed_forward": whole - feed_forward
    }  # fmt: skip
    # Before the first block: its input, Time2Vec features and their arguments, cosines and sines, the batch itself.
    kinds = len(time_kinds(shape.time_features, shape.time_pace))
    before = stream + kinds * (item * shape.time_features_dim + 8) + 4 * shape.head_dim + 24
    # With the last block's output, which the head's norm keeps: the head's gradient of it, losses, best tokens.
    after = stream + 4 + 8
    # The time head in float32: the mixture's parameters thrice over, and a 16-bit input's copy; then their gradients.
    k, wide = shape.time_components, 4 * c if item == 2 else 0
    after += 24 * k + 24 + wide if k else 0
    gaps = 12 * k + 4 * c + stream if k else 0
    if k and shape.time_given_type:
        # Its hidden layer, twice as wide before the gate, and the types; then the gradients of both.
        after += 12 * c + 4
        gaps += 12 * c
    # A gradient of the residual stream more where dropout does not leave it as it is.
    dropped = stream if shape.dropout.residual > 0 else 0
    in_feed_forward = item * f + stream + dropped
    in_attention = 2 * stream + item * qkv + 2 * dropped + max(_query_gradients(model, config), stream)
    classes = shape.vocabulary_size
    head = item * _chunk(model, tokens) * classes

    policies = [recompute.of_block(index) for index in range(shape.num_layers)]
    below = 0  # saved by earlier blocks, with their outputs
    fullest = 0
    for index, policy in enumerate(policies):
        incoming = 0 if index == shape.num_layers - 1 else stream
        fullest = max(fullest, below + whole + incoming + max(in_feed_forward, in_attention))
        below += kept[policy] + stream
    # During the loss the head's norm and its result stand beside what all blocks have saved.
    in_backward = tokens * (before + after + stream + fullest)
    in_loss = tokens * (before + after + below + stream) + max(head, tokens * gaps)
    weight_gradient = 4 * classes * c
    return max(in_backward, in_loss) + weight_gradient


def _chunk(model: Planned, tokens: int) -> int:
    """Rows of logits that exist at once."""
    return min(tokens, default_rows_per_chunk(model.config.vocabulary_size, model.backend.name != "cpu"))


def _query_gradients(model: Planned, config: RunConfig) -> int:
    """Bytes per row of the float32 sums in the backward of attention: on a CPU the queries' gradients, which parts of
    the keys have each for themselves where there are few sequences and heads to share among threads."""
    shape, train = config.model, config.train
    if model.backend.name != "cpu":
        return 8 * shape.num_heads
    if shape.attention == "performer":
        return 0
    sequences = max(1, train.tokens_per_batch // train.max_length)
    parts = max(1, min(-(-32 // (sequences * shape.kv_heads)), 8, -(-train.max_length // 64)))
    if parts == 1 and train.max_length <= 256:
        # Each unit of work has all of a sequence's keys, and writes the gradients themselves.
        parts = 0
    return 4 * shape.num_heads * (parts * -(-shape.head_dim // 16) * 16 + 1)


def _scratch(model: Planned, config: RunConfig) -> int:
    """What kernels keep for themselves between their calls."""
    features = _features(model, config) if config.model.attention == "performer" else 0
    return features + (_operands(model, config) if model.backend.name == "cpu" else 0)


def _features(model: Planned, config: RunConfig) -> int:
    """Buffers of performer attention, float32: on a CPU of a chunk of positions for each thread, on a GPU of all."""
    shape, train = config.model, config.train
    m, d, heads, length = shape.attention_features, shape.head_dim, shape.num_heads, train.max_length
    sequences = max(1, train.tokens_per_batch // length)
    if model.backend.name == "cpu":
        from ttr_kernels.linear_attention.cpu_kernels import scratch_floats

        threads = min(get_threads(), sequences * shape.kv_heads)
        return 4 * threads * scratch_floats(heads // shape.kv_heads, d, m, -(-length // 64), 3)
    rows, chunks = train.tokens_per_batch, sequences * -(-length // 64)
    per_row = (2 * heads + shape.kv_heads) * m + heads * (2 * d + 3)
    return 4 * (rows * per_row + 2 * chunks * heads * m * (d + 1))


def _operands(model: Planned, config: RunConfig) -> int:
    """What matrix products on a CPU keep: a result to be added or rounded, and 16-bit operands as float32.

    Nothing where BLAS adds to its result, and a MiB or two for each thread where blocks of our own are multiplied or
    oneDNN multiplies bfloat16.
    """
    shape, tokens = model.config, config.train.tokens_per_batch
    largest = model_size(shape).largest
    if model.precision.compute.itemsize == 4:
        return 0 if is_called_directly() else 4 * largest
    if reads_16_bit_floats() or (model.precision.compute == BFLOAT16 and why_not_bfloat16() is None):
        return 0
    widest = max(2 * shape.hidden_dim, shape.embed_dim + 2 * shape.kv_heads * shape.head_dim)
    logits = _chunk(model, tokens) * shape.vocabulary_size
    left = max(tokens * widest, logits)
    right = max(tokens * max(shape.hidden_dim, shape.embed_dim), largest)
    return 4 * (left + right + max(tokens * widest, logits, largest))


def extra_flops(model: Planned, batch: Batch, recompute: Recompute) -> float:
    """Operations of a step that a policy adds to `model.flops`: matrix products and attention that run twice."""
    shape, rows = model.config, len(batch.tokens)
    qkv = shape.embed_dim + 2 * shape.kv_heads * shape.head_dim
    attention = 2.0 * rows * shape.embed_dim * qkv + 4.0 * attention_pairs(batch.cu_seqlens, shape) * shape.embed_dim
    feed_forward = 4.0 * rows * shape.embed_dim * shape.hidden_dim
    again = {
        "none": 0.0, "attention": attention, "feed_forward": feed_forward,
        "block": attention + 2.0 * rows * shape.embed_dim**2 + feed_forward,
    }  # fmt: skip
    return sum(again[recompute.of_block(index)] for index in range(shape.num_layers))


def policy_costs(
    model: Planned, config: RunConfig, batch: Batch, seconds: float, *, program: int, data: int, ranks: int = 1
) -> list[PolicyCost]:
    """Every policy's cost, the cheapest first. `seconds` is a step's of `batch` with nothing recomputed."""
    layers = config.model.num_layers
    candidates = [Recompute()] + [
        Recompute(policy, every)
        for policy in get_args(Policy)
        if policy != "none"
        for every in _EVERY
        if every == 1 or every < layers
    ]
    flops = model.flops(batch)
    costs = []
    for candidate in candidates:
        extra = extra_flops(model, batch, candidate) / flops
        memory = step_memory(model, config, candidate, program=program, data=data, ranks=ranks)
        costs.append(PolicyCost(candidate, memory, extra, seconds * (1 + extra)))
    return sorted(costs, key=lambda cost: (cost.extra, cost.memory.total))


def cheapest(costs: list[PolicyCost], limit: int) -> Recompute:
    """The policy with the least extra compute whose memory is within the limit.

    Raises UserError saying what the least is that this batch needs.
    """
    for cost in costs:
        if cost.memory.total <= limit:
            return cost.recompute
    least = min(costs, key=lambda cost: cost.memory.total)
    fixed = least.memory.total - least.memory.activations - least.memory.scratch
    remedy = (
        f"parameters, gradients, optimizer and program alone take {in_units(fixed)}: use a smaller model"
        if fixed >= limit
        else "use a smaller train.tokens_per_batch, with a larger train.accumulate for batches of the same size"
    )
    raise UserError(
        f"--memory-limit: got {in_units(limit)}, expected at least {in_units(least.memory.total)}, which "
        f"train.recompute={least.recompute.policy} needs; {remedy}"
    )


def table(costs: list[PolicyCost], limit: int, current: Recompute) -> list[str]:
    """Policy against memory, compute and time, a line each; `limit` is the memory there is (0: not known)."""
    lines = [f"{'recompute':<28}{'activations':>12}{'all memory':>12}{'extra compute':>15}{'s/step':>9}"]
    for cost in costs:
        recompute = cost.recompute
        name = recompute.policy + (f", every {recompute.every}. block" if recompute.every > 1 else "")
        fits = "" if not limit or cost.memory.total <= limit else "  does not fit"
        mark = "  <- this run" if recompute == current else ""
        lines.append(
            f"{name:<28}{in_units(cost.memory.activations):>12}{in_units(cost.memory.total):>12}"
            f"{100 * cost.extra:>13.1f} %{cost.seconds:>9.3f}{fits}{mark}"
        )
    return lines


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{name}i": 1024**power for power, name in enumerate("kmgt", 1)}


def in_bytes(text: str) -> int:
    """ "4GiB", "500 MB" or "1e9" as a number of bytes; UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    try:
        number = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except (ValueError, KeyError):
        number = 0.0
    if not number >= 1:
        raise UserError(f"--memory-limit: got {text!r}, expected a size such as 4GiB, 500MB or 8e9")
    return int(number)


def in_units(size: int) -> str:
    """A number of bytes with its unit."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def full_batch(config: RunConfig, sequences: int | None = None) -> Batch:
    """A batch of windows of the greatest length, so many, or as many as fit: what a step is measured with."""
    length = config.train.max_length
    count = sequences or config.train.tokens_per_batch // length
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(length)
    zeros, times = np.zeros(count * length, np.int32), np.arange(count * length) * config.model.time_scale
    return Batch(zeros, times, ends, zeros, times, ends[:-1], ends[:-1], 0, 0)
