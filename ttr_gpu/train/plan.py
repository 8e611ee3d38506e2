"""The resolved plan, printed before the first step: how large, how long, on what, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.matmul import matmul

from ..backend import CPU, Backend
from ..data.batches import Batch
from ..data.dataset import Dataset, Split
from ..errors import UserError
from ..model import TransformerModel
from .config import RunConfig
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
    config: RunConfig, model: TransformerModel, dataset: Dataset, split: Split, batches_per_epoch: int
) -> Plan:
    """Resolve the numbers of steps, measure the device's matrix product and one step, and check the memory.

    Raises UserError if the estimate exceeds the memory that is free.
    """
    train = config.train
    per_epoch = max(1, batches_per_epoch // train.accumulate)
    total = train.steps or max(1, round(train.epochs * per_epoch))
    warmup = min(total, max(1, total // 20) if train.warmup_steps is None else train.warmup_steps)
    every = train.evaluate_every or max(1, min(per_epoch, total // 10))
    memory = model.memory_estimate(train.tokens_per_batch)
    backend = model.backend
    need, free = sum(memory.values()), backend.free_bytes()
    if free and need > free:
        raise UserError(
            f"memory: this run needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "try a smaller --preset or --set train.tokens_per_batch"
        )
    peak = measure_gemm_peak(backend, dtype=model.precision.compute if backend.name == "gpu" else np.float32)
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
        f"device     {backend.device}; {backend.threads} threads, {_products(model)} measured at "
        f"{peak / 1e9:,.0f} GFLOP/s",
        f"time       about {duration(seconds * total)} ({seconds:.3f} s per step, without evaluations)",
    ]
    return Plan(total, per_epoch, warmup, every, train.checkpoint_every or every, peak, lines)


def _products(model: TransformerModel) -> str:
    """What multiplies matrices: on a CPU, 16-bit floats are how weights and activations are stored."""
    name = model.precision.name
    if name == "float32":
        return "matrix product"
    return f"{name} matrix product" if model.backend.name == "gpu" else f"{name} storage, float32 matrix product"


def measure_gemm_peak(backend: Backend = CPU, dtype: Any = np.float32, repeats: int = 8) -> float:
    """Floating-point operations per second of a large matrix product, the best of some."""
    size = 1024 if backend.name == "cpu" else 4096
    a, out = backend.xp.ones((size, size), dtype), backend.xp.empty((size, size), dtype)
    best = np.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        matmul(a, a, out=out)
        backend.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _step_seconds(model: TransformerModel, tokens: int, max_length: int, peak: float) -> float:
    """Seconds of one forward and backward, measured on half a batch unless that would take long. Leaves the
    gradients zero."""
    half = _blank_batch(model, max(1, tokens // max_length // 2), max_length)
    share = len(half.tokens) / tokens
    if model.flops(half) / peak > 0.7:
        # Large models reach about two thirds of the peak.
        return model.flops(half) / (0.66 * peak) / share
    seconds = 0.0
    for batch in (_blank_batch(model, 1, max_length), half):  # the first loads the kernels
        begin = time.perf_counter()
        _, saved = model.loss_forward(batch)
        model.loss_backward(1.0, saved)
        model.backend.synchronize()
        seconds = time.perf_counter() - begin
    model.zero_gradients()
    return seconds / share


def _blank_batch(model: TransformerModel, sequences: int, length: int) -> Batch:
    """So many windows of one token, at even times."""
    ends = np.arange(sequences + 1, dtype=np.int32) * np.int32(length)
    total = sequences * length
    zeros, times = np.zeros(total, np.int32), np.arange(total, dtype=np.float64) * model.config.time_scale
    return Batch(zeros, times, ends, zeros, times, ends[:-1], ends[:-1], 0, 0)
