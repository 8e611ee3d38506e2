"""One training step (forward, backward, clipping, AdamW) beside PyTorch's, in float32 and bfloat16."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import click

from ttr_gpu.backend import CPU
from ttr_gpu.model import TransformerModel

from .harness import Call, Contender, Spread, compare_option, machine, ratio, report, result_file, take_turns
from .step_shapes import SHAPES, shape
from .step_sides import COMPILED, EAGER, OURS, Side, make_blas_limit, make_limit, make_side

PEERS = {"eager": EAGER, "compiled": COMPILED}
# What the first losses may differ by, as a share of the loss: float32 beside float32, and anything beside bfloat16.
AGREEMENT = {"float32": 1e-4, "bfloat16": 5e-3}


@click.command()
@click.option("--shape", "shape_name", type=click.Choice(SHAPES), default="reference", show_default=True)
@click.option("--precision", "precisions", type=click.Choice(list(AGREEMENT)), multiple=True, default=list(AGREEMENT),
              show_default=True, help="May be repeated.")  # fmt: skip
@click.option("--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, default=list(PEERS), show_default=True,
              help="May be repeated.")  # fmt: skip
@click.option("--alone", is_flag=True, help="Without PyTorch.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=8, show_default=True, help="Turns of each side, at most.")
@click.option("--calls", type=click.IntRange(min=1), default=3, show_default=True,
              help="Steps timed in each turn, at most.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0), default=150.0, show_default=True,
              help="About how long all turns may take together: fewer of slow steps, two at least.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
@compare_option
def step(
    shape_name: str, precisions: tuple[str, ...], peers: tuple[str, ...], alone: bool, threads: int | None, turns: int,
    calls: int, seconds: float, output: Path | None, compare: Path | None,
) -> None:  # fmt: skip
    """Time a training step beside PyTorch's, in turns."""
    threads = threads or machine()["cores"]
    packages = [] if alone else find_packages()
    who = [OURS, *(PEERS[peer] for peer in peers if packages)]
    sides = [Side(name, precision) for precision in precisions for name in who]
    with contextlib.ExitStack() as stack:
        limits = [stack.enter_context(Contender(f"limit {p}", make_limit, p, threads)) for p in precisions]
        if "float32" in precisions:
            limits.append(stack.enter_context(Contender("limit of the BLAS", make_blas_limit, threads)))
        contenders, first, estimates = [], [], []
        # One after the other: the first calls compile kernels and fill memory.
        for side in list(sides):
            contender = Contender(str(side), make_side, side, shape_name, threads)
            try:
                found = contender.call(2)
            except RuntimeError as error:
                if side.who == OURS:
                    raise
                # Such as a peer that needs more memory than there is.
                print(f"left out: {error}")
                sides.remove(side)
                continue
            first.append(found[0].value)
            estimates.append(found[1].seconds)
            contenders.append(stack.enter_context(contender))
        check_agreement(sides, first)
        planned = plan_turns(sum(estimates), turns, calls, seconds)
        timed = take_turns([*contenders, *limits], **planned)
    # The BLAS's is the last.
    rates = dict(zip([*precisions, "BLAS"], timed[len(contenders) :], strict=False))
    result = summarize(shape_name, sides, first, timed[: len(contenders)], rates, threads)
    print_table(result)
    output = output or result_file("step" if shape_name == "reference" else f"step-{shape_name}")
    report(output, "step", result, compare, "torch")
    draw(output.with_suffix(".png"), result)


def plan_turns(one_of_each: float, turns: int, calls: int, seconds: float) -> dict[str, int]:
    """Arguments of `take_turns` for sides that together take `one_of_each` seconds a call, so that all take about so
    many seconds: fewer turns, then fewer calls in each; at last none of them goes uncounted, and there are two."""
    uncounted = 1

    def fits() -> bool:
        return turns * (uncounted + calls) * one_of_each <= seconds

    while turns > 4 and not fits():
        turns -= 1
    while calls > 1 and not fits():
        calls -= 1
    if not fits():
        uncounted = 0
    while turns > 2 and not fits():
        turns -= 1
    return {"turns": turns, "calls": calls, "uncounted": uncounted}


def find_packages() -> list[str]:
    """["torch"] if it is installed; otherwise says that the peer is missing."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return ["torch"]
    print("PyTorch is not installed, so our step is timed alone; for the comparison: pip install torch")
    return []


def check_agreement(sides: list[Side], losses: list[float]) -> None:
    """All sides must compute the same, up to their precision: otherwise their times say nothing."""
    for side, loss in zip(sides, losses, strict=True):
        # A NaN compares as false: it must not pass for agreement.
        if not (math.isfinite(loss) and abs(losses[0] - loss) <= AGREEMENT[side.precision] * abs(losses[0])):
            raise click.ClickException(
                f"the losses of the first step differ: {sides[0]} {losses[0]}, {side} {loss}, allowed "
                f"{AGREEMENT[side.precision]:g} of it"
            )


def summarize(
    shape_name: str, sides: list[Side], first: list[float], timed: list[list[list[Call]]],
    rates: dict[str, list[list[Call]]], threads: int,
) -> dict[str, Any]:  # fmt: skip
    """What the result file says beyond machine and versions."""
    worked_on = shape(shape_name)
    batch = worked_on.batch()
    flops = TransformerModel(worked_on.model, backend=CPU).flops(batch)
    limits = {
        precision: {"flops_per_second": (rate := Spread.of([call.value for turn in turns for call in turn]).median),
                    "seconds": flops / rate}
        for precision, turns in rates.items()
    }  # fmt: skip
    described, ours = {}, {side.precision: turns for side, turns in zip(sides, timed, strict=True) if side.who == OURS}
    for side, loss, turns in zip(sides, first, timed, strict=True):
        calls = [call for turn in turns for call in turn]
        seconds = Spread.of([call.seconds for call in calls])
        described[str(side)] = {
            "precision": side.precision,
            "seconds": seconds._asdict(),
            "cpu_seconds": Spread.of([call.cpu_seconds for call in calls])._asdict(),
            "tokens_per_second": len(batch.tokens) / seconds.median,
            "share_of_limit": limits[side.precision]["seconds"] / seconds.median,
            "over_ours": None if side.who == OURS else ratio(turns, ours[side.precision])._asdict(),
            "first_loss": loss,
            "last_loss": calls[-1].value,
            "turns": [[round(call.seconds, 5) for call in turn] for turn in turns],
        }
    return {
        "shape": shape_name, "description": worked_on.description, "threads": threads, "tokens": len(batch.tokens),
        "lengths": list(worked_on.lengths), "flops": flops, "model": worked_on.model.model_dump(),
        "sides": described, "limits": limits,
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(f"training step of {result['tokens']} tokens ({result['description']}), {result['threads']} threads, "
          f"{machine()['cpu']}")  # fmt: skip
    for precision, limit in result["limits"].items():
        of = "by the BLAS" if precision == "BLAS" else f"in {precision}"
        print(f"matrix product {of}: {limit['flops_per_second'] / 1e9:.0f} GFLOP/s; the step's "
              f"{result['flops'] / 1e9:.1f} GFLOP would take {1e3 * limit['seconds']:.0f} ms")  # fmt: skip
    print(f"{'':<26} {'median':>9} {'quartiles':>17} {'tokens/s':>9} {'of limit':>9} {'time over ours':>20} "
          f"{'first loss':>11}")  # fmt: skip
    for name, side in result["sides"].items():
        seconds, over = side["seconds"], side["over_ours"]
        quartiles = f"{1e3 * seconds['lower']:.1f} – {1e3 * seconds['upper']:.1f}"
        beside = f"{over['median']:.2f} ({over['lower']:.2f} – {over['upper']:.2f})" if over else ""
        print(
            f"{name:<26} {1e3 * seconds['median']:>6.1f} ms {quartiles:>17} {side['tokens_per_second']:>9.0f} "
            f"{100 * side['share_of_limit']:>7.0f} % {beside:>20} {side['first_loss']:>11.6f}"
        )


def draw(path: Path, result: dict[str, Any]) -> None:
    """A bar for each side, with its quartiles, and the time that its products alone would take."""
    from matplotlib.figure import Figure

    sides = result["sides"]
    spreads = [side["seconds"] for side in sides.values()]
    medians = [1e3 * spread["median"] for spread in spreads]
    below = [1e3 * (spread["median"] - spread["lower"]) for spread in spreads]
    above = [1e3 * (spread["upper"] - spread["median"]) for spread in spreads]
    colors = ["tab:blue" if name.startswith(OURS) else "tab:gray" for name in sides]
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(sides)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(sides), medians, xerr=[below, above], color=colors, capsize=3)
    axes.bar_label(bars, labels=[f"{median:.0f} ms" for median in medians], label_type="center", color="white")
    for index, side in enumerate(sides.values()):
        limit = 1e3 * result["limits"][side["precision"]]["seconds"]
        axes.plot([limit, limit], [index - 0.4, index + 0.4], color="black")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per training step (median, quartiles); black: its matrix products alone")
    axes.set_title(f"{result['description']}, {result['threads']} threads, {machine()['cpu']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
