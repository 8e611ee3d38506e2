"""Two ranks of one thread beside one rank of one thread, and all-reduce beside plain mpi4py."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from .harness import as_the_trainer_computes, result_file, write_result
from .step_shapes import shape
from .step_sides import TRAIN

MEGABYTES = (1, 4, 16, 64)


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=10, show_default=True, help="Turns of each contender.")
@click.option("--worker", is_flag=True, hidden=True)
def distributed(rounds: int, worker: bool) -> None:
    """Efficiency of data parallelism from 1 to 2 ranks, and bandwidth of the sums, on this machine.

    A step of the reference model (`python -m benchmarks step`) on rank 0 while rank 1 sleeps, and in turns the step of
    both with twice the batch: perfect is the same time.
    """
    if worker:
        _work(rounds)
        return
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if program is None:
        raise click.UsageError("there is no mpirun: pip install 'ttr-gpu[mpi]'")
    line = [program, "-n", "2", sys.executable, "-m", "benchmarks", "distributed", "--worker", "--rounds", str(rounds)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip()[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    click.echo(
        f"step        one rank {1e3 * found['alone']:.0f} ms, two ranks {1e3 * found['together']:.0f} ms with twice "
        f"the batch: efficiency {100 * found['efficiency']:.1f} % (quartiles of the turns {found['quartiles']})"
    )
    click.echo(
        f"sums        {found['gradient_megabytes']:.0f} MB of gradients, {1e3 * found['waited']:.1f} ms of the step "
        f"waited for"
    )
    for row in found["bandwidth"]:
        click.echo(
            f"all-reduce  {row['megabytes']:>3} MB: {row['ours']:.2f} GB/s, plain mpi4py {row['plain']:.2f} GB/s "
            f"({100 * row['ours'] / row['plain']:.0f} %); in the background {row['background']:.2f} GB/s"
        )
    write_result(result_file("distributed"), "distributed", found, "mpi4py", "mpich")


def _work(rounds: int) -> None:
    """On each rank."""
    from mpi4py import MPI

    from ttr_gpu.distributed.gradients import GradientSum
    from ttr_gpu.distributed.mpi import MpiCommunicator
    from ttr_gpu.model import TransformerModel
    from ttr_gpu.train.optimizer import Optimizer

    as_the_trainer_computes(1)
    communicator = MpiCommunicator()
    reference = shape("reference")
    model, batch = TransformerModel(reference.model), reference.batch()
    optimizer, gradients = Optimizer(model, TRAIN), GradientSum(model, communicator)
    waits: list[float] = []
    steps = 0

    def step(together: bool) -> None:
        nonlocal steps
        steps += 1
        with model.arena.step():
            model.zero_gradients()
            _, saved = model.loss_forward(batch)
            model.loss_backward(0.5, saved, gradients.block_done if together else None)
        if together:
            begin = time.perf_counter()
            gradients.finish()
            waits.append(time.perf_counter() - begin)
        optimizer.update(steps, 1e-5, optimizer.gradient_norm())

    def timed(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def turn(together: bool) -> float:
        _sleep_until_all(communicator)
        seconds = 0.0
        if together or communicator.rank == 0:
            step(together)
            seconds = min(timed(lambda: step(together)) for _ in range(2))
        _sleep_until_all(communicator)
        # Both ranks' time is that of the slower one.
        return float(communicator.all_gather(np.array([seconds])).max())

    alone, both = [], []
    for _ in range(rounds):
        alone.append(turn(False))
        both.append(turn(True))
    efficiencies = [one / two for one, two in zip(alone, both, strict=True)]
    bandwidth = []
    for megabytes in MEGABYTES:
        array = np.zeros(megabytes * 250_000, np.float32)

        def background(array: Any = array) -> None:
            communicator.start_all_reduce(array)
            communicator.wait()

        contenders: dict[str, Callable[[], Any]] = {
            "ours": lambda array=array: communicator.all_reduce(array),
            "plain": lambda array=array: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array, MPI.SUM),
            "background": background,
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds + 1):
            for name, work in contenders.items():
                communicator.barrier()
                seconds[name].append(timed(work))
        bandwidth.append(
            {"megabytes": megabytes, **{name: array.nbytes / min(found) / 1e9 for name, found in seconds.items()}}
        )
    communicator.close()
    if communicator.rank == 0:
        quartiles = [round(value, 3) for value in statistics.quantiles(efficiencies, n=4)]
        print(json.dumps({
            "alone": statistics.median(alone), "together": statistics.median(both),
            "efficiency": statistics.median(efficiencies), "quartiles": quartiles,
            "best_alone": min(alone), "best_together": min(both), "waited": statistics.median(waits),
            "gradient_megabytes": model.flat.gradients.nbytes / 1e6, "bandwidth": bandwidth, "rounds": rounds,
        }))  # fmt: skip


def _sleep_until_all(communicator: Any) -> None:
    """A barrier that takes no core from who still computes."""
    from mpi4py import MPI

    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)
