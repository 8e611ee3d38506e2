"""The resolved plan, printed before the first step: how large, how long, on what, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.parallel import get_threads
from ttr_kernels.matmul import matmul

from ..data.batches import Batch
from ..data.dataset import Dataset, Split
from ..errors import UserError
from ..model import TransformerModel
from .config import RunConfig
from .memory import available_bytes
from .metrics import duration


@dataclass(frozen=True)
class Plan:
    """Steps of a run, and what was measured of the machine."""

    total_steps: int
    steps_per_epoch: int
    warmup: int
    evaluate_every: int
    checkpoint_every: int
    peak: float
    lines: list[str]


def make_plan(
    config: RunConfig, model: TransformerModel, dataset: Dataset, split: Split, batches_per_epoch: int, device: str
) -> Plan:
    """Resolve the numbers of steps, measure the machine's matrix product and one step, and check the memory.

    Raises UserError if the estimate exceeds the memory that is free.
    """
    train = config.train
    per_epoch = max(1, batches_per_epoch // train.accumulate)
    total = train.steps or max(1, round(train.epochs * per_epoch))
    warmup = min(total, max(1, total // 20) if train.warmup_steps is None else train.warmup_steps)
    every = train.evaluate_every or max(1, min(per_epoch, total // 10))
    memory = model.memory_estimate(train.tokens_per_batch)
    need, free = sum(memory.values()), available_bytes()
    if free and need > free:
        raise UserError(
            f"memory: this run needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "try a smaller --preset or --set train.tokens_per_batch"
        )
    peak = measure_gemm_peak()
    seconds = _step_seconds(model, train.tokens_per_batch, train.max_length, peak) * train.accumulate
    tokens = train.tokens_per_batch * train.accumulate
    shape = config.model
    gib = {name: f"{name} {size / 2**20:,.0f}" for name, size in memory.items()}
    lines = [
        f"data       {dataset.path}: {dataset.kind}, {split.token_count:,} training tokens in {split.sequences:,} "
        f"sequences, vocabulary {dataset.vocabulary_size:,}",
        f"model      {len(model.flat.values):,} parameters: {shape.num_layers} layers, width {shape.embed_dim}, "
        f"{shape.num_heads} heads, feed-forward {shape.hidden_dim}, time bias {shape.time_bias}, "
        f"time features {shape.time_features}",
        f"training   {total:,} steps ({total / per_epoch:.1f} epochs of {per_epoch:,}) of up to {tokens:,} tokens, "
        f"peak lr {config.lr:.2e} after {warmup} steps, dropout {shape.dropout.attention:g}/"
        f"{shape.dropout.feed_forward:g}/{shape.dropout.residual:g}",
        f"memory     about {need / 2**20:,.0f} MiB ({', '.join(gib.values())})",
        f"device     {device}; {get_threads()} threads, matrix product measured at {peak / 1e9:,.0f} GFLOP/s",
        f"time       about {duration(seconds * total)} ({seconds:.3f} s per step, without evaluations)",
    ]
    return Plan(total, per_epoch, warmup, every, train.checkpoint_every or every, peak, lines)


def measure_gemm_peak(size: int = 1024, repeats: int = 8) -> float:
    """Floating-point operations per second of a float32 matrix product on all threads, the best of some."""
    a, out = np.ones((size, size), np.float32), np.empty((size, size), np.float32)
    best = np.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        matmul(a, a, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _step_seconds(model: TransformerModel, tokens: int, max_length: int, peak: float) -> float:
    """Seconds of one forward and backward, measured unless it would take long. Leaves the gradients zero."""
    lengths = [max_length] * (tokens // max_length)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(ends[-1])
    zeros, times = np.zeros(total, np.int32), np.arange(total, dtype=np.float64) * model.config.time_scale
    batch = Batch(zeros, times, ends, zeros, times, ends[:-1], ends[:-1], 0, 0)
    if model.flops(batch) / peak > 1.0:
        # Large models reach about two thirds of the peak.
        return model.flops(batch) / (0.66 * peak)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        _, saved = model.loss_forward(batch)
        model.loss_backward(1.0, saved)
        seconds = time.perf_counter() - begin
    model.zero_gradients()
    return seconds
