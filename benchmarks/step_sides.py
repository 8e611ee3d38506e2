"""The sides of `benchmarks step`, each made in a process of its own: our step, PyTorch's, a matrix product alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from ttr_gpu.train.config import TrainConfig

from .harness import as_the_trainer_computes
from .step_shapes import Shape, shape

TRAIN = TrainConfig(lr=1e-3)
_LIMIT_SECONDS = 0.4


class Side(NamedTuple):
    """A side: who, in which precision."""

    who: str  # "ttr-gpu", "PyTorch" or "PyTorch compiled"
    precision: str

    def __str__(self) -> str:
        return f"{self.who} {self.precision}"


OURS, EAGER, COMPILED = "ttr-gpu", "PyTorch", "PyTorch compiled"


def make_side(side: Side, shape_name: str, threads: int) -> Callable[[], float]:
    """The step of a side, which returns the loss before its update."""
    if side.who == OURS:
        return make_ours(shape(shape_name, side.precision), threads)
    return make_peer(shape_name, side.precision, threads, compiled=side.who == COMPILED)


def make_ours(worked_on: Shape, threads: int) -> Callable[[], float]:
    """Our step, set up as the trainer sets it up."""
    from ttr_gpu.model import TransformerModel
    from ttr_gpu.train.optimizer import Optimizer

    as_the_trainer_computes(threads)
    model, batch = TransformerModel(worked_on.model), worked_on.batch()
    optimizer = Optimizer(model, TRAIN)
    steps = 0

    def step() -> float:
        nonlocal steps
        steps += 1
        with model.arena.step():
            loss, saved = model.loss_forward(batch)
            model.loss_backward(1.0, saved, accumulate=False)
            optimizer.update(steps, TRAIN.lr or 0.0, optimizer.gradient_norm())
            return float(loss)

    return step


def make_peer(shape_name: str, precision: str, threads: int, compiled: bool) -> Callable[[], float]:
    """PyTorch's step, from the same weights and on the same batch; sequences of uneven length are padded."""
    import torch

    from ttr_gpu.memory import keep_freed_memory
    from ttr_gpu.model import TransformerModel

    from .peers import torch_model

    torch.set_num_threads(threads)
    # Its allocator is malloc too, and gains by this as ours does.
    keep_freed_memory()
    worked_on = shape(shape_name)
    model = torch_model.TorchModel(worked_on.model, recompute=shape_name == "long")
    torch_model.load_weights(model, TransformerModel(worked_on.model))
    optimizer = torch_model.make_optimizer(
        model, lr=TRAIN.lr or 0.0, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps, weight_decay=TRAIN.weight_decay
    )
    batch = torch_model.padded(worked_on.batch())
    loss = torch.compile(model) if compiled else model
    bfloat16 = precision == "bfloat16"
    return lambda: torch_model.training_step(model, optimizer, batch, TRAIN.clip_norm, loss=loss, bfloat16=bfloat16)


def make_limit(precision: str, threads: int) -> Callable[[], float]:
    """A product of 1024 × 1024 matrices, over and over for about as long as a step takes: its floating-point operations
    per second. Some processors do a third more for the first tenth of a second after a rest."""
    import ml_dtypes
    import numpy as np

    from ttr_kernels.common.parallel import limit_blas, set_threads
    from ttr_kernels.matmul import matmul

    set_threads(threads)
    limit_blas()
    size = 1024
    a = np.ones((size, size), np.float32 if precision == "float32" else ml_dtypes.bfloat16)
    out = np.empty_like(a)

    def rate() -> float:
        begin, products = time.perf_counter(), 0
        while time.perf_counter() - begin < _LIMIT_SECONDS:
            matmul(a, a, out=out)
            products += 1
        return products * 2.0 * size**3 / (time.perf_counter() - begin)

    return rate


def make_blas_limit(threads: int) -> Callable[[], float]:
    """The same in float32 by the BLAS that NumPy ships, in a process that has multiplied nothing before."""
    os.environ["TTR_FLOAT32_GEMM"] = "blas"
    return make_limit("float32", threads)
