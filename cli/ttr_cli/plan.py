"""`ttr-gpu plan`: step time, memory and efficiency on many machines, on paper."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from .threads import threads_option, use_threads

_RATE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines; rows up to so many.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="GPUs of each: a rank for each.")
@click.option(
    "--ranks", type=click.IntRange(min=1), help="Of each machine without GPUs; default: 1, or those of mpirun."
)
@click.option("--preset", help="As in `ttr-gpu train`; default: from DATA, or gpt2.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]), help="As in `ttr-gpu train`.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="As in `ttr-gpu train`.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="As in `ttr-gpu train`.")
@click.option(
    "--global-tokens", type=click.IntRange(min=1), metavar="N",
    help="Tokens of a step, whatever the number of ranks; default: train.tokens_per_batch on each.",
)  # fmt: skip
@click.option("--measure/--no-measure", default=None, help="Measure rates on this machine; default: without --gpus.")
@click.option("--products", type=_RATE, metavar="TFLOP/S", help="That a rank reaches in matrix products.")
@click.option("--attention", type=_RATE, metavar="TFLOP/S", help="That a rank reaches in attention.")
@click.option("--memory-bandwidth", type=_RATE, metavar="GB/S", help="Of a rank.")
@click.option("--local-bandwidth", type=_RATE, metavar="GB/S", help="That a rank sends to others of its machine.")
@click.option(
    "--local-latency",
    type=click.FloatRange(min=0),
    metavar="US",
    help="Of a message inside a machine, in microseconds.",
)
@click.option("--link-bandwidth", type=_RATE, metavar="GB/S", help="That a rank sends to other machines.")
@click.option(
    "--link-latency", type=click.FloatRange(min=0), metavar="US", help="Of a message between machines, in microseconds."
)
@click.option("--overlap", type=click.FloatRange(0, 1), help="Share of a sum's time that costs the backward nothing.")
@threads_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write JSON.")
def plan(
    data: Path | None, nodes: int, gpus: int, ranks: int | None, preset: str | None, precision: str | None,
    config: Path | None, assignments: tuple[str, ...], global_tokens: int | None, measure: bool | None,
    threads: int | None, output: Path | None, **given: float | None,
) -> None:  # fmt: skip
    """Predict step time, memory and efficiency of training on many machines.

    \b
    ttr-gpu plan --nodes 64 --gpus 8 --preset gpt2-xl --precision bfloat16 --set train.max_length=1024
    ttr-gpu plan data.zarr --nodes 4 --ranks 2
    mpirun -n 2 ttr-gpu plan --preset tiny --ranks 2      measures sums between two ranks too

    DATA, a data set, decides what `ttr-gpu train` would let it decide; without it the vocabulary is that of GPT-2
    (50257). Every constant is printed with its source; docs/distributed.md explains the model.
    """
    from ttr_gpu.distributed.session import session
    from ttr_gpu.errors import UserError
    from ttr_gpu.train.cluster_report import PlanOptions, cluster_plan
    from ttr_gpu.whole_file import whole_file

    if gpus and ranks is not None:
        raise UserError("--ranks: got it with --gpus, which has a rank for each GPU; expected one of the two")
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected a finite number")
    use_threads(threads)
    if precision is not None:
        assignments = (*assignments, f"model.precision={precision}")
    options = PlanOptions(data, nodes, gpus, ranks, preset, config, assignments, global_tokens, measure, _in_si(given))
    with session("auto" if gpus else "cpu") as run:
        report = cluster_plan(options, run)
        if not run.leads:
            return
        for line in report.lines:
            click.echo(line)
        if output is not None:
            with whole_file(output) as file:
                file.write(json.dumps(report.described, indent=2) + "\n")


_UNITS = {"products": 1e12, "attention": 1e12, "latency": 1e-6, "bandwidth": 1e9, "overlap": 1.0}


def _in_si(given: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if value is None else value * _UNITS[name.rpartition("_")[2]] for name, value in given.items()}
