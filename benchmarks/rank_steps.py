"""What the benchmarks of several ranks do on each of them: a training step, with its sums or without."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import click
import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig
from ttr_gpu.distributed.communicator import Communicator
from ttr_gpu.distributed.gradients import GradientSum
from ttr_gpu.distributed.step_time import Network, Rates, StepTime, step_time
from ttr_gpu.model import TransformerModel
from ttr_gpu.train.cluster_plan import Constant, step_work
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.optimizer import Optimizer

from .harness import as_the_trainer_computes
from .step_shapes import Shape

# "during": pieces are summed while the backward runs; "after": all of them once it has ended.
Sums = Literal["none", "after", "during"]


preset_option = click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True, help="Size of the model."
)


class RankStep:
    """A step of one thread on 8 sequences of 256 and a vocabulary of 4096: for preset `tiny` that of `benchmarks step`.

    Attributes:
        config: of a run that has this step; megabytes: of its gradients.
        waited: seconds that the last step waited for sums.
    """

    def __init__(self, communicator: Communicator, preset: str) -> None:
        as_the_trainer_computes(1)
        shape = Shape("", ModelConfig(vocabulary_size=4096, **PRESETS[preset]), (256,) * 8)
        train = TrainConfig(lr=1e-5, tokens_per_batch=8 * 256, max_length=256)
        self.config = RunConfig(model=shape.model, train=train)
        self._model, self._batch = TransformerModel(shape.model), shape.batch()
        self._optimizer, self._gradients = Optimizer(self._model, train), GradientSum(self._model, communicator)
        self._steps = 0
        self.waited = 0.0
        self.megabytes = self._model.flat.gradients.nbytes / 1e6

    def __call__(self, sums: Sums) -> None:
        model = self._model
        self._steps += 1
        with model.arena.step():
            _, saved = model.loss_forward(self._batch)
            done = self._gradients.block_done if sums == "during" else None
            model.loss_backward(0.5, saved, done, accumulate=False)
        begin = time.perf_counter()
        if sums != "none":
            self._gradients.finish()
        self.waited = time.perf_counter() - begin
        self._optimizer.update(self._steps, 1e-5, self._optimizer.gradient_norm())

    def predicted(self, rates: Mapping[str, Constant], network: Network) -> StepTime:
        """The step on paper (see `ttr-gpu plan`), from measured rates."""
        own = (rates[name].value for name in ("products", "attention", "memory_bandwidth"))
        return step_time(step_work(self.config, self.config.train.tokens_per_batch), Rates(*own), network)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def slowest(communicator: Communicator, seconds: float) -> float:
    """Of all ranks."""
    return float(communicator.all_gather(np.array([seconds])).max())


def sleep_until_all() -> None:
    """A barrier that takes no core from who still computes."""
    from mpi4py import MPI

    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def said_by_first(line: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Run ranks; the JSON that rank 0 prints in its last line. ClickException with what they said if they fail."""
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise click.ClickException(done.stderr.strip()[-2000:] or f"{line[0]} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
