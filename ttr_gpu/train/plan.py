"""The resolved plan, printed before the first step: how large, how long, on what, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.parallel import get_threads
from ttr_kernels.matmul import matmul
from ttr_kernels.matmul.onednn import why_not_bfloat16

from ..backend import CPU, Backend
from ..data.batches import Batch
from ..data.dataset import Dataset, Split
from ..distributed.communicator import LOCAL, Communicator
from ..errors import UserError
from ..model import TransformerModel
from ..model_size import ModelOutline, model_size
from ..nn.dropout import DropoutKey
from ..nn.recompute import Recompute
from .config import RunConfig
from .memory_plan import (
    Planned,
    PolicyCost,
    StepMemory,
    cheapest,
    extra_flops,
    full_batch,
    in_units,
    policy_costs,
    step_memory,
)
from .metrics import duration


@dataclass(frozen=True)
class Plan:
    """Steps of a run, and what was measured of the machine.

    Attributes:
        batch: of the greatest size; step_seconds: of its forward and backward.
        memory: of a step; free: bytes that the device can still give, 0 if it does not say.
    """

    total_steps: int
    steps_per_epoch: int
    warmup: int
    evaluate_every: int
    checkpoint_every: int
    peak: float
    batch: Batch
    step_seconds: float
    memory: StepMemory
    free: int
    lines: list[str]

    def check_memory(self) -> None:
        """UserError if the run needs more memory than is free."""
        _check_free(self.memory.total - self.memory.program, self.free)


def check_weights_fit(config: RunConfig, backend: Backend, ranks: int = 1) -> None:
    """UserError if not even weights, gradients and moments have the memory that is free: asked before they are made."""
    memory = step_memory(ModelOutline(config.model, backend), config, config.recompute, ranks=ranks)
    _check_free(memory.total - memory.activations - memory.scratch, backend.free_bytes())


def _check_free(needed: int, free: int) -> None:
    if free and needed > free:
        raise UserError(
            f"memory: this run needs about {in_units(needed)} and {in_units(free)} are free; try --set "
            "train.recompute=block, a smaller train.tokens_per_batch or --preset (--plan shows what each policy needs)"
        )


def make_plan(
    config: RunConfig, model: Planned, dataset: Dataset, split: Split, batches_per_epoch: int, *,
    program: int, data: int, communicator: Communicator = LOCAL,
) -> Plan:  # fmt: skip
    """Resolve the numbers of steps, measure the device's matrix product, and a step if there is memory for it and the
    model is made.

    Args:
        program, data: bytes that the program and the training data take.
    """
    train = config.train
    per_epoch = max(1, batches_per_epoch // train.accumulate)
    total = train.steps or max(1, round(train.epochs * per_epoch))
    warmup = min(total, max(1, total // 20) if train.warmup_steps is None else train.warmup_steps)
    every = train.evaluate_every or max(1, min(per_epoch, total // 10))
    backend = model.backend
    memory = step_memory(model, config, config.recompute, program=program, data=data, ranks=communicator.size)
    free = backend.free_bytes()
    peak = measure_gemm_peak(backend, dtype=_multiplied_dtype(model))
    batch = full_batch(config)
    fits = not free or memory.total - program <= free
    if fits and isinstance(model, TransformerModel):
        # The plan is right within a tenth (see tests/ttr_gpu/test_recompute.py).
        model.arena.reserve(memory.activations * 11 // 10)
    seconds = _step_seconds(model, config, config.recompute, peak, measure=fits)
    ranks = communicator.size
    step, tokens = train.accumulate * seconds / ranks, train.tokens_per_batch * train.accumulate
    shape = config.model
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.parts().items())
    recomputed = "" if train.recompute == "none" else f", recomputing {train.recompute}"
    if train.recompute != "none" and train.recompute_every > 1:
        recomputed += f" in every {train.recompute_every}. block"
    lines = [
        f"data       {dataset.path}: {dataset.kind}, {split.token_count:,} training tokens in {split.sequences:,} "
        f"sequences, vocabulary {dataset.vocabulary_size:,}",
        f"model      {model_size(shape).total:,} parameters: {shape.num_layers} layers, width {shape.embed_dim}, "
        f"{shape.num_heads} heads, feed-forward {shape.hidden_dim}, time bias {shape.time_bias}, "
        f"time features {shape.time_features}",
        f"training   {total:,} steps ({total / per_epoch:.1f} epochs of {per_epoch:,}) of up to {tokens:,} tokens, "
        f"{train.optimizer}, peak lr {config.lr:.2e} after {warmup} steps, then {train.schedule}, "
        f"dropout {shape.dropout.attention:g}/{shape.dropout.feed_forward:g}/{shape.dropout.residual:g}",
        f"memory     about {memory.total / 2**20:,.0f} MiB ({parts}){recomputed}",
        f"device     {backend.device}; {get_threads()} threads, {_products(model)} measured at "
        f"{peak / 1e9:,.0f} GFLOP/s",
        f"time       about {duration(step * total)} ({step:.3f} s per step, without evaluations)",
    ]
    if ranks > 1:
        own = f"{train.accumulate // ranks or 1} of {train.accumulate}" if train.accumulate >= ranks else (
            f"a part, 1 of {ranks // train.accumulate}, of one of {train.accumulate}"
        )  # fmt: skip
        lines.insert(5, f"processes  {ranks} through {communicator.name}; each computes {own} batches of a step")
    return Plan(
        total, per_epoch, warmup, every, train.checkpoint_every or every, peak, batch, seconds, memory, free, lines
    )


def costs_of_policies(plan: Plan, model: Planned, config: RunConfig) -> list[PolicyCost]:
    """What each policy of recomputation would take in this run, the cheapest first."""
    seconds = plan.step_seconds / (1 + extra_flops(model, plan.batch, config.recompute) / model.flops(plan.batch))
    costs = policy_costs(model, config, plan.batch, seconds, program=plan.memory.program, data=plan.memory.data)
    return [replace(cost, seconds=config.train.accumulate * cost.seconds) for cost in costs]


def fitted(config: RunConfig, model: Planned, limit: int, *, program: int, data: int, ranks: int = 1) -> RunConfig:
    """The run under the cheapest policy of recomputation that takes at most `limit` bytes.

    Raises UserError, saying what would fit, if none does.
    """
    costs = policy_costs(model, config, full_batch(config), 0.0, program=program, data=data, ranks=ranks)
    return config.with_recompute(cheapest(costs, limit))


def loaded_program(config: RunConfig, backend: Backend) -> int:
    """Memory of this process once the kernels are loaded, which a step of a tiny model does; 0 on a GPU."""
    if backend.name != "cpu":
        return 0
    dims = {"embed_dim": 2 * config.model.num_heads, "hidden_dim": 4, "num_layers": 1, "vocabulary_size": 2}
    model = TransformerModel(config.model.model_copy(update=dims))
    small = config.train.model_copy(update={"tokens_per_batch": 4, "max_length": 4})
    loss, saved = model.loss_forward(full_batch(config.model_copy(update={"train": small})), DropoutKey(0, 0))
    model.loss_backward(float(loss), saved)
    return backend.used_bytes()


def _multiplied_dtype(model: Planned) -> Any:
    """What matrices are multiplied in: on a CPU, 16-bit floats may be no more than how they are stored."""
    compute = model.precision.compute
    if model.backend.name == "gpu" or (compute == BFLOAT16 and why_not_bfloat16() is None):
        return compute
    return np.dtype(np.float32)


def _products(model: Planned) -> str:
    name, multiplied = model.precision.name, _multiplied_dtype(model).name
    if name == "float32":
        return "matrix product"
    if name == multiplied:
        return f"{name} matrix product"
    reason = f" ({why_not_bfloat16()})" if name == "bfloat16" else ""
    return f"{name} storage, float32 matrix product{reason}"


def measure_gemm_peak(
    backend: Backend = CPU, dtype: Any = np.float32, repeats: int = 8, size: int | None = None
) -> float:  # fmt: skip
    """Floating-point operations per second of a large matrix product, the best of some."""
    size = size or (1024 if backend.name == "cpu" else 4096)
    a, out = backend.xp.ones((size, size), dtype), backend.xp.empty((size, size), dtype)
    best = np.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        matmul(a, a, out=out)
        backend.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def _step_seconds(model: Planned, config: RunConfig, recompute: Recompute, peak: float, *, measure: bool) -> float:
    """Seconds of one forward and backward, measured on half a batch unless that would take long. Leaves the
    gradients zero."""
    train = config.train
    half = full_batch(config, max(1, train.tokens_per_batch // train.max_length // 2))
    share = len(half.tokens) / train.tokens_per_batch
    flops = model.flops(half) + extra_flops(model, half, recompute)
    if not measure or not isinstance(model, TransformerModel) or flops / peak > 0.7:
        # Large models reach about two thirds of the peak.
        return flops / (0.66 * peak) / share
    seconds = 0.0
    # The first loads the kernels, the second makes the process's memory grow.
    for batch in (full_batch(config, 1), half, half):
        begin = time.perf_counter()
        with model.arena.step():
            _, saved = model.loss_forward(batch, recompute=recompute)
            model.loss_backward(1.0, saved)
        model.backend.synchronize()
        seconds = time.perf_counter() - begin
    model.zero_gradients()
    return seconds / share
