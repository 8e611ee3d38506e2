"""Two ranks of one thread beside one rank of one thread and beside the prediction of `ttr-gpu plan`, and all-reduce
beside plain mpi4py."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.backend import CPU
from ttr_gpu.distributed.communicator import LOCAL
from ttr_gpu.distributed.step_time import Link, Network
from ttr_gpu.train.measured_rates import measured_rates, measured_sums

from .harness import Spread, result_file, write_result
from .rank_steps import RankStep, preset_option, said_by_first, sleep_until_all, slowest, timed

MEGABYTES = (1, 4, 16, 64)
_LEAST_SUMS = 30  # of each size: the best counts
_ALONE = Link(1, 1.0, 0.0)


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=10, show_default=True, help="Turns of each contender.")
@preset_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
@click.option("--worker", is_flag=True, hidden=True)
def distributed(rounds: int, preset: str, output: Path | None, worker: bool) -> None:
    """Efficiency of data parallelism from 1 to 2 ranks, and bandwidth of the sums, on this machine.

    A step of the model (by default that of `python -m benchmarks step`) on rank 0 while rank 1 sleeps, and in turns the
    step of both with twice the batch: perfect is the same time. In the same turns the rates that `ttr-gpu plan`
    measures, and what it predicts from them.
    """
    if worker:
        _work(rounds, preset)
        return
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if program is None:
        raise click.UsageError("there is no mpirun: pip install 'ttr-gpu[mpi]'")
    line = [program, "-n", "2", sys.executable, "-m", "benchmarks", "distributed", "--worker", "--rounds", str(rounds)]
    line += ["--preset", preset]
    found = said_by_first(line)
    click.echo(
        f"step        one rank {1e3 * found['alone']:.0f} ms, two ranks {1e3 * found['together']:.0f} ms with twice "
        f"the batch: efficiency {100 * found['efficiency']:.1f} % (quartiles of the turns {found['quartiles']})"
    )
    for ranks, name in ((1, "alone"), (2, "together")):
        predicted = found["predicted"][name]
        over = predicted["over_measured"]
        click.echo(
            f"predicted   {ranks} rank{'s' if ranks > 1 else ''}: {1e3 * predicted['seconds']:.0f} ms, "
            f"{over['median']:.3f} of what was measured, turn by turn (quartiles {over['lower']:.3f}, "
            f"{over['upper']:.3f})"
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
    write_result(output or result_file("distributed"), "distributed", found, "mpi4py", "mpich")


def _work(rounds: int, preset: str) -> None:
    """On each rank."""
    from mpi4py import MPI

    from ttr_gpu.distributed.mpi import MpiCommunicator

    communicator = MpiCommunicator()
    step = RankStep(communicator, preset)

    def turn(together: bool) -> tuple[float, float, Any]:
        """Seconds of a step, of its prediction, and the rates from which that was made."""
        sleep_until_all()
        seconds, predicted, rates = 0.0, 0.0, {}
        if together or communicator.rank == 0:
            step("during" if together else "none")
            seconds = min(timed(lambda: step("during" if together else "none")) for _ in range(2))
            rates = measured_rates(step.config, CPU, communicator if together else LOCAL, calls=2)
            rates |= measured_sums(CPU, communicator, calls=2) if together else {}
            network = Network(_ALONE, _ALONE)
            if together:
                inside = Link(2, rates["local_bandwidth"].value, rates["local_latency"].value)
                # The cores that sum are those that compute.
                network = Network(inside, _ALONE, overlap=0.0)
            predicted = step.predicted(rates, network).total
        sleep_until_all()
        return slowest(communicator, seconds), predicted, {name: rate.value for name, rate in rates.items()}

    alone, both, waits = [], [], []
    for _ in range(rounds):
        alone.append(turn(False))
        both.append(turn(True))
        waits.append(step.waited)
    bandwidth = _bandwidth(communicator, MPI, rounds)
    communicator.close()
    if communicator.rank == 0:
        efficiencies = [one[0] / two[0] for one, two in zip(alone, both, strict=True)]
        print(json.dumps({
            "alone": statistics.median(turn[0] for turn in alone),
            "together": statistics.median(turn[0] for turn in both),
            "efficiency": statistics.median(efficiencies),
            "quartiles": [round(value, 3) for value in statistics.quantiles(efficiencies, n=4)],
            "best_alone": min(turn[0] for turn in alone), "best_together": min(turn[0] for turn in both),
            "predicted": {"alone": _predicted(alone), "together": _predicted(both)},
            "waited": statistics.median(waits), "gradient_megabytes": step.megabytes,
            "bandwidth": bandwidth, "rounds": rounds,
        }))  # fmt: skip


def _predicted(turns: list[tuple[float, float, Any]]) -> dict[str, Any]:
    """Medians of predictions and of the rates they rest on; predictions over measurements, turn by turn."""
    rates = {name: statistics.median(turn[2][name] for turn in turns) for name in turns[0][2]}
    over = Spread.of([predicted / measured for measured, predicted, _ in turns])
    return {
        "seconds": statistics.median(turn[1] for turn in turns), "over_measured": over._asdict(), "constants": rates,
    }  # fmt: skip


def _bandwidth(communicator: Any, mpi: Any, rounds: int) -> list[dict[str, float]]:
    """Sums of arrays of several sizes: through the communicator, through mpi4py alone, and in the background."""
    rows = []
    for megabytes in MEGABYTES:
        array = np.zeros(megabytes * 250_000, np.float32)

        def background(array: Any = array) -> None:
            communicator.start_all_reduce(array)
            communicator.wait()

        contenders: dict[str, Callable[[], Any]] = {
            "ours": partial(communicator.all_reduce, array),
            "plain": partial(mpi.COMM_WORLD.Allreduce, mpi.IN_PLACE, array, mpi.SUM),
            "background": background,
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        order = list(contenders)
        for number in range(max(rounds, _LEAST_SUMS)):
            # Each follows each: what comes after a sum in the background finds its thread just gone to sleep.
            for name in order[number % 3 :] + order[: number % 3]:
                communicator.barrier()
                seconds[name].append(timed(contenders[name]))
        rows.append(
            {"megabytes": megabytes, **{name: array.nbytes / min(found) / 1e9 for name, found in seconds.items()}}
        )
    return rows
