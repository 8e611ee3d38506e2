"""Time alone: test likelihood of gaps on published data sets, beside one log-normal and the true processes."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from .event_files import EventFile, read_events, write_dataset
from .generating_processes import TRUTHS, log_normal_nll
from .harness import machine, result_file, versions

FILES = ("wikipedia", "hawkes1", "renewal", "poisson", "self_correcting")
# Gaps of a chunk of training data in the published protocol.
CHUNK = 128
# LogNormMix of Shchur et al. 2020, tables 4 and 5, on other random splits; and what the floor averages over such ones.
PUBLISHED = {"wikipedia": (8.39, 8.67), "hawkes1": (0.52, None), "renewal": (0.25, None)}


@click.command(name="point-processes")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with wikipedia.npz and the others: arrays times, offsets (see benchmarks/README.md).",
)  # fmt: skip
@click.option("--files", default=",".join(FILES), show_default=True, help="Names of .npz files, without the suffix.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Of the split, one run each.")
@click.option("--whole", is_flag=True, help="Training sequences stay whole, not cut into chunks of 128 gaps.")
@click.option("--references", is_flag=True, help="Floors and truths alone; nothing is trained.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="As for `ttr-gpu train`, for every data set alike."
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; what it holds is not rerun."
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/point-processes"), show_default=True)
def point_processes(
    data: Path, files: str, seeds: str, whole: bool, references: bool, assignments: tuple[str, ...],
    threads: int | None, output: Path | None, work: Path,
) -> None:  # fmt: skip
    """Train on every file and split with the trainer's defaults; print each figure beside its floor and its truth.

    Every finished run is recorded in the output: start again after an interruption, and it goes on from there.
    """
    names = [name.strip() for name in files.split(",") if name.strip()]
    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise click.BadParameter(f"got {seeds!r}, expected numbers such as 0,1,2", param_hint="--seeds") from None
    protocol = "whole" if whole else f"chunks of {CHUNK} gaps"
    output = output or result_file("point-processes-whole" if whole else "point-processes")
    results = Results(output, protocol, assignments)
    for name in names:
        events = read_events(data / f"{name}.npz")
        for seed in chosen:
            figures = results.of(name, seed)
            figures.update(reference_figures(events, seed))
            if not references and "test" not in figures:
                print(f"{name} {seed}: training", flush=True)
                folder = work / ("whole" if whole else "chunks") / f"{name}-{seed}"
                figures.update(train_and_test(folder, events, seed, None if whole else CHUNK, assignments, threads))
            results.save()
        print_file(name, [results.of(name, seed) for seed in chosen])
    results.print_summary(names, chosen)
    draw(output.with_suffix(".png"), results, names, chosen)
    print(f"written: {output}")


class Results:
    """What has been found so far, in a file that is complete at every moment."""

    def __init__(self, path: Path, protocol: str, assignments: tuple[str, ...]) -> None:
        self.path = path
        told = {"protocol": protocol, "assignments": list(assignments)}
        self.content: dict[str, Any] = {
            "benchmark": "point-processes", "date": time.strftime("%Y-%m-%d"), "machine": machine(),
            "versions": versions(), **told, "runs": {},
        }  # fmt: skip
        if path.exists():
            self.content = json.loads(path.read_text())
            for key, value in told.items():
                if self.content.get(key) != value:
                    raise click.ClickException(
                        f"{path}: holds results of {key} {self.content.get(key)}, not {value}; choose another --output"
                    )

    def of(self, name: str, seed: int) -> dict[str, Any]:
        """The figures of one run, which may be added to."""
        figures: dict[str, Any] = self.content["runs"].setdefault(name, {}).setdefault(str(seed), {})
        return figures

    def save(self) -> None:
        """Write the file anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        partial.replace(self.path)

    def mean(self, name: str, seeds: list[int], figure: str) -> float | None:
        """Of a figure over the seeds; None if one of them has none."""
        values = [self.of(name, seed).get(figure) for seed in seeds]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    def print_summary(self, names: list[str], seeds: list[int]) -> None:
        """Means over the splits."""
        print(f"\nmean over splits {', '.join(map(str, seeds))}; training: {self.content['protocol']}; nats per event,")
        print("first event of a sequence not scored, no survival term")
        print(f"{'':<16} {'floor':>8} {'truth':>8} {'model':>8} {'below floor':>12} {'above truth':>12}  published")
        for name in names:
            floor, truth, test = (self.mean(name, seeds, figure) for figure in ("floor", "truth", "test"))
            below = None if floor is None or test is None else floor - test
            above = None if truth is None or test is None else test - truth
            values, floor_there = PUBLISHED.get(name, (None, None))
            published = "" if values is None else f"{values:g}"
            if values is not None and floor_there is not None:
                published += f", {floor_there - values:.2f} below its floor"
            print(
                f"{name:<16} {shown(floor):>8} {shown(truth):>8} {shown(test):>8} {shown(below):>12} {shown(above):>12}"
                f"  {published}"
            )


def reference_figures(events: EventFile, seed: int) -> dict[str, float]:
    """Floor and truth of the test split of this seed."""
    parts = events.split(seed)
    fitted = np.log(np.concatenate([np.diff(events.times[number]) for number in parts["train"]]))
    test = [events.times[number] for number in parts["test"]]
    gaps = np.concatenate([np.diff(times) for times in test])
    figures = {"floor": float(log_normal_nll(gaps, fitted.mean(), fitted.std()).mean())}
    if events.name in TRUTHS:
        figures["truth"] = float(np.concatenate([TRUTHS[events.name](times) for times in test]).mean())
    return figures


def train_and_test(
    folder: Path, events: EventFile, seed: int, chunk: int | None, assignments: tuple[str, ...], threads: int | None
) -> dict[str, Any]:
    """Train on one split, stop by its validation part, and score its test part, whole sequences at a time."""
    from ttr_gpu.data.dataset import open_dataset
    from ttr_gpu.infer.evaluation import evaluate_in_detail, evaluate_split
    from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
    from ttr_gpu.train.run import RunOptions, train
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads or machine()["cores"])
    limit_blas()
    shutil.rmtree(folder, ignore_errors=True)
    path = write_dataset(folder, events, events.split(seed), chunk=chunk)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    outcome = train(
        RunOptions(path, assignments=(f"train.seed={seed}", *assignments), out=folder, name="run", log_every=10**9),
        lambda line: None,
    )
    if outcome.signal_number is not None:
        raise click.Abort
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    checkpoint = open_checkpoint(find_checkpoint(folder / "run", best=True))
    model, length = checkpoint.load_model(), max(len(times) for times in events.times)
    dataset, batch = open_dataset(path), max(length, 2048)
    figures = {
        part: evaluate_split(model, dataset.split(part), tokens_per_batch=batch, max_length=length).time_nll
        for part in ("validation", "test")
    }
    if (step := dataset.gap.get("grid")) is not None:
        # The plain likelihood can be driven up by log-normals on the grid's points; this one cannot.
        test = dataset.split("test")
        gaps = evaluate_in_detail(model, test, tokens_per_batch=batch, max_length=length, step=step).gaps
        figures["dequantised"] = None if gaps is None else gaps.dequantised_nll
    shutil.rmtree(folder)
    return {
        **figures, "best_step": outcome.progress.best_step, "steps": outcome.progress.step, "ended": outcome.reason,
        "parameters": int(model.flat.values.size), "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
    }  # fmt: skip


def shown(value: float | None) -> str:
    """A figure of the table."""
    return "-" if value is None else f"{value:.3f}"


def print_file(name: str, runs: list[dict[str, Any]]) -> None:
    """Every split of a file."""
    for figure in ("floor", "truth", "test", "dequantised"):
        values = [run.get(figure) for run in runs]
        if values.count(None) == len(values) and figure == "dequantised":
            continue
        print(f"{name:<16} {figure:<11} {' '.join(f'{shown(value):>7}' for value in values)}")


def draw(path: Path, results: Results, names: list[str], seeds: list[int]) -> None:
    """Nats below the floor, for the model and the truth, split by split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.75 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        runs = [results.of(name, seed) for seed in seeds]
        for key, marker, color, size in (("truth", "|", "black", 400), ("test", "o", "#3182bd", 28)):
            below = [run["floor"] - run[key] for run in runs if run.get(key) is not None]
            label = {"truth": "true process", "test": "ttr-gpu"}[key] if row == 1 or len(names) == 1 else None
            axes.scatter(below, [row] * len(below), s=size, marker=marker, color=color, label=label, zorder=3)
        value, floor = PUBLISHED.get(name, (None, None))
        if value is not None and floor is not None:
            axes.scatter([floor - value], [row], s=70, marker="D", facecolor="none", edgecolor="#e6550d",
                         label="published LogNormMix", zorder=2)  # fmt: skip
    axes.axvline(0.0, color="#969696", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("nats per event below one log-normal (test, five splits): further right is better")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
