"""Every operation beside PyTorch's, eager and compiled, and NumPy's: forward, and forward with backward, in float32."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import Any

import click
import numpy as np

from .harness import Call, Contender, Spread, compare_option, machine, report, result_file, take_turns
from .kernel_sides import COPY, NUMPY, PEERS, make_copy, make_numpy, make_ours, make_torch
from .step import find_packages
from .step_sides import COMPILED, EAGER, OURS

# What the results may differ by, as a share of the largest.
AGREEMENT = 1e-4


@click.command()
@click.option("--only", type=click.Choice(PEERS), multiple=True, help="Only this operation; may be repeated.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True, help="Turns of each side.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="About how long each side may take: slow operations are timed in fewer turns, 3 at the least.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
@compare_option
def kernels(
    only: tuple[str, ...], threads: int | None, turns: int, seconds: float, output: Path | None, compare: Path | None
) -> None:  # fmt: skip
    """Time operations beside PyTorch's, NumPy's, and a copy of their bytes, in turns."""
    threads = threads or machine()["cores"]
    with contextlib.ExitStack() as stack:
        sides: list[tuple[Any, ...]] = [(OURS, make_ours), (COPY, make_copy), (NUMPY, make_numpy)]
        if find_packages():
            sides += [(EAGER, make_torch, False), (COMPILED, make_torch, True)]
        contenders = [
            stack.enter_context(Contender(name, make, only, threads, seconds, *rest)) for name, make, *rest in sides
        ]
        first = {contender.name: contender.call(1)[0].value for contender in contenders}
        check_agreement(first)
        # Each part is the best of some calls: that the first finds other data in the caches does not matter.
        timed = take_turns(contenders, turns=turns, calls=1, uncounted=0)
    result = {"threads": threads, "sides": summarize([c.name for c in contenders], timed)}
    print_table(result)
    output = output or result_file("kernels")
    report(output, "kernels", result, compare, "torch")
    draw(output.with_suffix(".png"), result)


def check_agreement(first: dict[str, dict[str, Any]]) -> None:
    """All sides must compute the same: otherwise their times say nothing."""
    for case, (_, ours) in first[OURS].items():
        for side, found in first.items():
            if side == COPY or case not in found:
                continue
            difference = np.abs(np.subtract(found[case][1], ours)).max()
            if not difference <= AGREEMENT * max(np.abs(ours).max(), 1.0):
                raise click.ClickException(f"{case}: the results of {OURS} and {side} differ by {difference:.1e}")


def summarize(names: list[str], timed: list[list[list[Call]]]) -> dict[str, Any]:
    """By "<case>, <part>, <side>": the spread of its seconds, and that of its time over ours, turn by turn."""
    sides = {}
    for case, (parts, _) in timed[0][0][0].value.items():
        for part in parts:
            for name, turns in zip(names, timed, strict=True):
                if case not in turns[0][0].value:
                    continue
                beside = [
                    (turn[0].value[case][0][part], own[0].value[case][0][part])
                    for turn, own in zip(turns, timed[0], strict=True)
                ]
                # Turns in which both were timed.
                pairs = [(value, own) for value, own in beside if value is not None and own is not None]
                values, over = [value for value, _ in pairs], Spread.of([value / own for value, own in pairs])
                sides[f"{case}, {part}, {name}"] = {
                    "case": case, "part": part, "side": name, "seconds": Spread.of(values)._asdict(),
                    "over_ours": over._asdict(), "turns": len(pairs),
                }  # fmt: skip
    return sides


def print_table(result: dict[str, Any]) -> None:
    """A line for each case and part: our time, and the others' over it."""
    others = [name for name in (NUMPY, EAGER, COMPILED) if any(s["side"] == name for s in result["sides"].values())]
    print(f"float32, {result['threads']} threads, {machine()['cpu']}; time over ours (quartiles); "
          "copy: of the bytes of activations and results")  # fmt: skip
    print(f"{'':<44} {'':<21} {'ours':>10} {COPY:>6} " + " ".join(f"{name.lower():>20}" for name in others))
    for (case, part), sides in _rows(result).items():
        by_name = {side["side"]: side for side in sides}
        beside = [_text(by_name[name]["over_ours"]) if name in by_name else "–" for name in others]
        ours, copy = 1e3 * by_name[OURS]["seconds"]["median"], by_name[COPY]["over_ours"]["median"]
        print(f"{case:<44} {part:<21} {ours:>7.3f} ms {copy:>6.2f} " + " ".join(f"{text:>20}" for text in beside))


def _text(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['lower']:.2f} – {spread['upper']:.2f})"


def _rows(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for side in result["sides"].values():
        rows.setdefault((side["case"], side["part"]), []).append(side)
    return rows


def draw(path: Path, result: dict[str, Any]) -> None:
    """How many times as long the fastest peer takes, for each case, with its backward."""
    from matplotlib.figure import Figure

    bars = {}
    for (case, part), sides in _rows(result).items():
        peers = [side for side in sides if side["side"] not in (OURS, COPY)]
        if part != "forward":
            bars[case] = min((peer["over_ours"] for peer in peers), key=lambda spread: spread["median"])
    if not bars:
        return
    medians = [spread["median"] for spread in bars.values()]
    errors = [[abs(s["median"] - s[end]) for s in bars.values()] for end in ("lower", "upper")]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(bars), medians, xerr=errors, color="tab:blue", capsize=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvline(statistics.geometric_mean(medians), color="tab:orange", linestyle="--", label="geometric mean")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("the fastest peer's time over ours: PyTorch eager, compiled, NumPy")
    axes.set_title(f"forward and backward, float32, {result['threads']} threads, {machine()['cpu']}", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
