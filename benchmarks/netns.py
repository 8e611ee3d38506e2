"""Steps of two ranks on two hosts, against the bandwidth of the cable between them: what overlap hides."""

from __future__ import annotations

import json
import signal
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from ttr_gpu.backend import CPU
from ttr_gpu.distributed.step_time import Link, Network
from ttr_gpu.train.measured_rates import measured_rates, measured_sums

from .harness import Spread, result_file, write_result
from .namespaces import Hosts, limit_cable
from .rank_steps import RankStep, Sums, preset_option, said_by_first, sleep_until_all, slowest, timed

MEGABITS = (100, 200, 400, 1000, 4000)
# Of the sums by which a bandwidth is measured: the least takes a third of a second.
_SUM = 4 << 20
_MODES: tuple[Sums, ...] = ("none", "after", "during")


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=5, show_default=True, help="Turns of each bandwidth.")
@click.option("--megabits", multiple=True, type=click.IntRange(min=1), help=f"Default: {MEGABITS} and no limit.")
@preset_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
@click.option("--worker", is_flag=True, hidden=True)
def netns(rounds: int, megabits: tuple[int, ...], preset: str, output: Path | None, worker: bool) -> None:
    """Step time of two ranks in two network namespaces against the bandwidth between them (Linux, root).

    At each bandwidth the step of the model without sums, with sums after the backward, and with sums during
    the backward, in turns; beside each what `ttr-gpu plan` predicts from rates and bandwidth measured in the same turn.
    """
    limits: list[int | None] = [*(megabits or MEGABITS), None]
    # Else its end would leave the hosts behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if worker:
        _work(rounds, limits, preset)
        return
    options = ["--rounds", str(rounds)]
    options += [text for limit in limits if limit is not None for text in ("--megabits", str(limit))]
    try:
        with Hosts() as hosts:
            line = hosts.mpirun("-m", "benchmarks", "netns", "--worker", "--preset", preset, *options)
            found = said_by_first(line, hosts.environment())
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{'cable':>10} {'MB/s':>7} {'no sums':>9} {'after':>9} {'during':>9} {'hidden':>7}   predicted")
    for row in found["rows"]:
        cable = f"{row['megabits']} Mbit" if row["megabits"] else "no limit"
        seconds = {mode: row[mode]["seconds"]["median"] for mode in _MODES}
        hidden = "" if row["hidden"] is None else f"{100 * row['hidden']:.0f} %"
        ratios = ", ".join(f"{mode} {row[mode]['predicted_over_measured']['median']:.2f}" for mode in _MODES)
        click.echo(
            f"{cable:>10} {row['bandwidth'] / 1e6:>7.1f} "
            + " ".join(f"{1e3 * seconds[mode]:>6.0f} ms" for mode in _MODES)
            + f" {hidden:>7}   over measured: {ratios}"
        )
    output = output or result_file("netns")
    write_result(output, "netns", found, "mpi4py", "mpich")
    draw(output.with_suffix(".png"), found["rows"])


def _work(rounds: int, limits: list[int | None], preset: str) -> None:
    """On each rank."""
    from ttr_gpu.distributed.mpi import MpiCommunicator

    communicator = MpiCommunicator()
    step = RankStep(communicator, preset)
    alone = Link(1, 1.0, 0.0)
    turns: list[list[dict[str, Any]]] = [[] for _ in limits]
    for mode in _MODES:
        step(mode)
    for _ in range(rounds):
        for limit, found in zip(limits, turns, strict=True):
            sleep_until_all()
            limit_cable(limit)
            sleep_until_all()
            turn: dict[str, Any] = {"sums": measured_sums(CPU, communicator, calls=2, size=_SUM)}
            for mode in _MODES:
                communicator.barrier()
                turn[mode] = slowest(communicator, timed(partial(step, mode)))
            # Both at once, as they compute; sums between the hosts apart, as they are above.
            turn["rates"] = measured_rates(step.config, CPU, communicator, calls=1)
            found.append(turn)
    limit_cable(None)
    communicator.close()
    if communicator.rank:
        return
    rows = []
    for limit, found in zip(limits, turns, strict=True):
        predicted: dict[Sums, list[float]] = {mode: [] for mode in _MODES}
        for turn in found:
            between = Link(2, turn["sums"]["local_bandwidth"].value, turn["sums"]["local_latency"].value)
            # Who waits for a cable leaves the core to the backward.
            times = step.predicted(turn["rates"], Network(alone, between, overlap=1.0))
            predicted["none"].append(times.compute + times.update)
            predicted["after"].append(times.compute + times.update + times.sums)
            predicted["during"].append(times.total)
        rows.append(_row(limit, found, predicted))
    print(json.dumps({"gradient_megabytes": step.megabytes, "rounds": rounds, "rows": rows}))


def _row(limit: int | None, turns: list[dict[str, Any]], predicted: dict[Sums, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"megabits": limit}
    for name in ("bandwidth", "latency"):
        row[name] = statistics.median(turn["sums"][f"local_{name}"].value for turn in turns)
    without, after, during = (statistics.median(turn[mode] for turn in turns) for mode in _MODES)
    # Of the time that sums take when they are waited for, the part that the backward hid.
    row["hidden"] = (after - during) / (after - without) if after > without else None
    for mode in _MODES:
        ratios = [guess / turn[mode] for guess, turn in zip(predicted[mode], turns, strict=True)]
        row[mode] = {
            "seconds": Spread.of([turn[mode] for turn in turns])._asdict(),
            "predicted_seconds": statistics.median(predicted[mode]),
            "predicted_over_measured": Spread.of(ratios)._asdict(),
        }
    return row


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Step time against bandwidth: measured as points with quartiles, predicted as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    bandwidths = [row["bandwidth"] / 1e6 for row in rows]
    names = {"none": "no sums", "after": "sums after the backward", "during": "sums during the backward"}
    for mode, color in zip(_MODES, ("tab:gray", "tab:red", "tab:blue"), strict=True):
        medians = [row[mode]["seconds"]["median"] for row in rows]
        spread = [
            [row[mode]["seconds"]["median"] - row[mode]["seconds"]["lower"] for row in rows],
            [row[mode]["seconds"]["upper"] - row[mode]["seconds"]["median"] for row in rows],
        ]
        panel.errorbar(bandwidths, medians, spread, fmt="o", color=color, label=f"{names[mode]}, measured")
        panel.plot(bandwidths, [row[mode]["predicted_seconds"] for row in rows], color=color, label="predicted")
    panel.set(xscale="log", xlabel="bandwidth of sums between the hosts, MB/s", ylabel="seconds of a step")
    panel.set_ylim(0, None)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
