"""What a training step of ours costs as sequences, widths, layers and threads grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click

from ttr_gpu.backend import CPU
from ttr_gpu.config import PRESETS, ModelConfig
from ttr_gpu.model import TransformerModel

from .harness import Contender, Spread, compare_option, machine, report, result_file
from .step_shapes import Shape
from .step_sides import make_ours

TOKENS, WINDOW = 8192, 256
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


class Point(NamedTuple):
    """One measurement: what is varied, its value, and the step that shows it."""

    axis: str
    value: int
    shape: Shape
    threads: int


def points(threads: int) -> list[Point]:
    """Along each axis the others stay at the reference: width 256, 4 layers, sequences of 256."""

    def made(length: int = 256, tokens: int = 2048, **changes: Any) -> Shape:
        model = ModelConfig(vocabulary_size=4096, **{**PRESETS["tiny"], **changes})
        return Shape("", model, (length,) * (tokens // length))

    found = [Point("length, no window", t, made(t, TOKENS), threads) for t in LENGTHS]
    found += [Point(f"length, window {WINDOW}", t, made(t, TOKENS, window=WINDOW), threads) for t in LENGTHS]
    found += [Point("width", d, made(embed_dim=d, hidden_dim=4 * d, num_heads=d // 32), threads)
              for d in (128, 256, 512, 768)]  # fmt: skip
    found += [Point("layers", layers, made(num_layers=layers), threads) for layers in (2, 4, 8, 16)]
    return found + [Point("threads", count, made(), count) for count in range(1, threads + 1)]


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="The most threads; default: all cores.")
@click.option("--calls", type=click.IntRange(min=1), default=3, show_default=True, help="Steps timed of each.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
@compare_option
def scaling(threads: int | None, calls: int, output: Path | None, compare: Path | None) -> None:
    """Time our step along T (with and without a window), width, layers and threads."""
    sides = {}
    print(f"float32, {machine()['cpu']}")
    print(f"{'':<26} {'median':>10} {'per token':>10} {'GFLOP/s':>8}")
    for point in points(threads or machine()["cores"]):
        with Contender(point.axis, make_ours, point.shape, point.threads) as contender:
            seconds = Spread.of([call.seconds for call in contender.call(2 + calls)[2:]])
        tokens = sum(point.shape.lengths)
        flops = TransformerModel(point.shape.model, backend=CPU).flops(point.shape.batch())
        name = f"{point.axis}: {point.value}"
        sides[name] = {
            "axis": point.axis, "value": point.value, "seconds": seconds._asdict(), "tokens": tokens,
            "seconds_per_token": seconds.median / tokens, "flops_per_second": flops / seconds.median,
        }  # fmt: skip
        print(f"{name:<26} {1e3 * seconds.median:>7.1f} ms {1e6 * seconds.median / tokens:>7.1f} µs "
              f"{flops / seconds.median / 1e9:>8.0f}")  # fmt: skip
    output = output or result_file("scaling")
    report(output, "scaling", {"sides": sides}, compare)
    draw(output.with_suffix(".png"), sides)


def draw(path: Path, sides: dict[str, Any]) -> None:
    """Time per token, a panel for each axis (two lines for lengths)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = dict(zip(("length", "width", "layers", "threads"), figure.subplots(1, 4), strict=True))
    for axis in dict.fromkeys(side["axis"] for side in sides.values()):
        along = [side for side in sides.values() if side["axis"] == axis]
        panel = panels[axis.split(",")[0]]
        per_token = [1e6 * side["seconds_per_token"] for side in along]
        panel.plot([side["value"] for side in along], per_token, marker="o", label=axis)
        panel.set(xlabel=axis.split(",")[0], ylim=(0, None))
        if axis.startswith("length"):
            panel.set_xscale("log", base=2)
            panel.legend(frameon=False, fontsize=8)
    panels["length"].set_ylabel("microseconds per token")
    figure.savefig(path, dpi=150)
