"""The trainer on this machine: a step under each precision and policy of recomputation, and what a checkpoint costs."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig
from ttr_gpu.nn.recompute import Policy, Recompute
from ttr_gpu.train.config import RunConfig

from .harness import (
    Call,
    Contender,
    Spread,
    as_the_trainer_computes,
    machine,
    peak_memory,
    ratio,
    reset_peak_memory,
    result_file,
    take_turns,
    write_result,
)
from .step_shapes import shape
from .step_sides import TRAIN

PRECISIONS = ("float32", "bfloat16", "float16")
POLICIES: tuple[Policy, ...] = get_args(Policy)
# What is saved and loaded (a third of it weights, the rest the optimizer's), and the steps around each checkpoint.
PRESET, STEPS, VOCABULARY = "small", 4, 4096
MIB = 1 << 20


def make_step(threads: int, precision: str, policy: Policy) -> Callable[[], dict[str, int]]:
    """A training step of the model of `step`; each call says what memory it took."""
    optimizer, step = _trained(threads, shape("reference", precision).model)
    recompute, arena = Recompute(policy), optimizer.model.arena
    # Kernels are loaded and the arena has its size: what is left is the step's own.
    for _ in range(2):
        step(recompute)

    def measured() -> dict[str, int]:
        _, method = reset_peak_memory()
        arena.reset_peak()
        step(recompute)
        return {"activations": arena.peak, "resident": peak_memory(method)}

    return measured


def _trained(threads: int, config: ModelConfig) -> tuple[Any, Callable[[Recompute], None]]:
    """An optimizer of a new model, and a training step of it on the batch of `step`."""
    from ttr_gpu.model import TransformerModel
    from ttr_gpu.nn import DropoutKey
    from ttr_gpu.train.optimizer import Optimizer

    as_the_trainer_computes(threads)
    model, batch = TransformerModel(config), shape("reference").batch()
    optimizer = Optimizer(model, TRAIN)
    scale = 65536.0 if config.precision == "float16" else 1.0
    steps = 0

    def step(recompute: Recompute) -> None:
        nonlocal steps
        steps += 1
        with model.arena.step():
            key = DropoutKey(0, steps)
            _, saved = model.loss_forward(batch, key, gradient_scale=scale, recompute=recompute)
            model.loss_backward(scale, saved, accumulate=False)
            optimizer.update(steps, 1e-4, optimizer.gradient_norm(), 1.0 / scale)

    return optimizer, step


def make_checkpoints(threads: int, repeats: int) -> Callable[[], dict[str, Any]]:
    """Save, load and copy in turns, then steps with and without a checkpoint on the way."""
    config = RunConfig(model=ModelConfig(vocabulary_size=VOCABULARY, **PRESETS[PRESET]), train=TRAIN)
    optimizer, step = _trained(threads, config.model)
    step(Recompute())

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as folder:
            bandwidth = _bandwidth(Path(folder), config, optimizer, repeats)
            return {**bandwidth, **_pauses(Path(folder) / "run", config, optimizer, step, repeats)}

    return measure


def _bandwidth(folder: Path, config: RunConfig, optimizer: Any, repeats: int) -> dict[str, Any]:
    """Seconds of saving, of loading with its checksums, and of copying the same files, synced or not."""
    from ttr_gpu.train.checkpoint import checkpoint_arrays, open_checkpoint, write_checkpoint

    arrays = checkpoint_arrays(optimizer)
    saved = folder / "step-00000001"
    data: dict[str, Any] = {"path": "", "fingerprint": ""}
    seconds: dict[str, list[float]] = {"save": [], "load": [], "copy_synced": [], "copy": []}

    def timed(name: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - begin)

    for _ in range(repeats):
        shutil.rmtree(saved, ignore_errors=True)
        os.sync()
        timed("save", lambda: write_checkpoint(saved, config, data, {"step": 1}, arrays))
        for name in ("copy_synced", "copy"):
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()
            timed(name, lambda name=name: _copy(saved, folder / name, sync=name == "copy_synced"))  # type: ignore[misc]
        timed("load", lambda: open_checkpoint(saved).restore(optimizer))
    size = sum(path.stat().st_size for path in saved.iterdir())
    spreads = {name: Spread.of(values)._asdict() for name, values in seconds.items()}
    pairs = {"save_over_copy_synced": ("copy_synced", "save"), "load_over_copy": ("copy", "load")}
    ratios = {
        name: Spread.of([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])._asdict()
        for name, (slow, fast) in pairs.items()
    }
    return {"bytes": size, "seconds": spreads, "bandwidth_ratio": ratios}


def _copy(source: Path, target: Path, sync: bool) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        if sync:
            with (target / path.name).open("rb") as file:
                os.fsync(file.fileno())


def _pauses(folder: Path, config: RunConfig, optimizer: Any, step: Any, repeats: int) -> dict[str, Any]:
    """Seconds that the loop waits for a checkpoint, and what one costs in all, in steps."""
    from ttr_gpu.train.checkpoint_writer import CheckpointWriter

    writer = CheckpointWriter(folder, {"path": "", "fingerprint": ""})
    pauses: list[float] = []
    loops: dict[bool, list[float]] = {True: [], False: []}

    def loop(saving: bool, number: int) -> None:
        begin = time.perf_counter()
        for index in range(STEPS):
            step(Recompute())
            if saving and index == 0:
                before = time.perf_counter()
                writer.save(config, {"step": number}, optimizer, keep_last=2, best_step=None)
                pauses.append(time.perf_counter() - before)
        loops[saving].append(time.perf_counter() - begin)
        writer.wait()

    for number in range(1, 2 + repeats):
        loop(True, number)
        loop(False, number)
    # The first makes the copy's memory.
    first, later = pauses[0], pauses[1:]
    seconds = statistics.median(loops[False][1:]) / STEPS
    cost = [(a - b) / seconds for a, b in zip(loops[True][1:], loops[False][1:], strict=True)]
    return {
        "step_seconds": seconds, "pause_seconds": Spread.of(later)._asdict(), "first_pause_seconds": first,
        "pause_in_steps": statistics.median(later) / seconds, "longest_pause_in_steps": max(pauses) / seconds,
        "cost_in_steps": Spread.of(cost)._asdict(),
    }  # fmt: skip


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Threads; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=2, show_default=True, help="Turns of each step.")
@click.option("--calls", type=click.IntRange(min=1), default=2, show_default=True, help="Steps timed in each turn.")
@click.option("--repeats", type=click.IntRange(min=2), default=3, show_default=True, help="Checkpoints of each kind.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
def training(threads: int | None, turns: int, calls: int, repeats: int, output: Path | None) -> None:
    """Time and memory of a step by precision and policy of recomputation; saving and loading; what a save costs."""
    threads = threads or machine()["cores"]
    with contextlib.ExitStack() as stack:
        contenders: dict[tuple[str, Policy], Contender] = {}
        for precision, policy in itertools.product(PRECISIONS, POLICIES):
            contender = Contender(f"{precision}, {policy}", make_step, threads, precision, policy)
            contenders[precision, policy] = stack.enter_context(contender)
            contender.call(1)  # it compiles and loads kernels, before the next is there
        timed = dict(zip(contenders, take_turns(list(contenders.values()), turns=turns, calls=calls), strict=True))
    with Contender("checkpoints", make_checkpoints, threads, repeats) as contender:
        checkpoints = contender.call(1)[0].value
    result = {"threads": threads, "preset": PRESET, "steps": summarize(timed), "checkpoints": checkpoints}
    print_table(result)
    output = output or result_file("training")
    write_result(output, "training", result)
    draw(output.with_suffix(".png"), result)


def summarize(timed: dict[tuple[str, Policy], list[list[Call]]]) -> list[dict[str, Any]]:
    """A row for each precision and policy."""
    rows = []
    for (precision, policy), turns in timed.items():
        calls = [call for turn in turns for call in turn]
        rows.append({
            "precision": precision, "policy": policy, "seconds": Spread.of([call.seconds for call in calls])._asdict(),
            "over_float32_none": ratio(turns, timed["float32", "none"])._asdict(),
            "activation_bytes": max(call.value["activations"] for call in calls),
            "resident_bytes": max(call.value["resident"] for call in calls),
        })  # fmt: skip
    return rows


def print_table(result: dict[str, Any]) -> None:
    """The result as tables."""
    print(f"training step of {shape('reference').description}, {result['threads']} threads, {machine()['cpu']}")
    print(f"{'precision':<10} {'recompute':<14} {'median':>9} {'over float32':>13} {'activations':>12} {'process':>10}")
    for row in result["steps"]:
        print(
            f"{row['precision']:<10} {row['policy']:<14} {1e3 * row['seconds']['median']:>6.0f} ms "
            f"{row['over_float32_none']['median']:>13.2f} {row['activation_bytes'] / MIB:>8.1f} MiB "
            f"{row['resident_bytes'] / MIB:>6.0f} MiB"
        )
    saved = result["checkpoints"]
    print(f"checkpoint of {saved['bytes'] / MIB:,.0f} MiB ({result['preset']}):")
    for name, spread in saved["seconds"].items():
        print(f"  {name:<12} {spread['median']:>7.3f} s  {saved['bytes'] / spread['median'] / 1e9:>6.2f} GB/s")
    ratios = saved["bandwidth_ratio"]
    print(
        f"  saving has {100 * ratios['save_over_copy_synced']['median']:.0f} % of a synced copy's bandwidth, loading "
        f"{100 * ratios['load_over_copy']['median']:.0f} % of a copy's"
    )
    stops, longest, cost = saved["pause_in_steps"], saved["longest_pause_in_steps"], saved["cost_in_steps"]["median"]
    print(
        f"  a save stops training for {stops:.2f} steps (at most {longest:.2f}) and costs {cost:.2f} in all; a step "
        f"takes {saved['step_seconds']:.2f} s"
    )


def draw(path: Path, result: dict[str, Any]) -> None:
    """Step time and activations as bars, and bandwidths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    rows, saved = result["steps"], result["checkpoints"]
    places, width = np.arange(len(POLICIES)), 0.8 / len(PRECISIONS)
    for index, precision in enumerate(PRECISIONS):
        own = [row for row in rows if row["precision"] == precision]
        at = places + width * (index - 1)
        panels[0].bar(at, [1e3 * row["seconds"]["median"] for row in own], width, label=precision)
        panels[1].bar(at, [row["activation_bytes"] / MIB for row in own], width)
    for panel, label in zip(panels, ("milliseconds per step", "MiB of activations, at their peak"), strict=False):
        panel.set_xticks(places, [policy.replace("_", "-\n") for policy in POLICIES])
        panel.set_ylabel(label)
        panel.set_xlabel("recomputed")
    panels[0].legend(frameon=False, fontsize=8)
    names = {"save": "save", "copy_synced": "copy,\nsynced", "load": "load", "copy": "copy"}
    speeds = [saved["bytes"] / saved["seconds"][name]["median"] / 1e9 for name in names]
    panels[2].bar(list(names.values()), speeds, color=["tab:blue", "tab:gray"] * 2)
    panels[2].set_ylabel(f"GB/s, a checkpoint of {saved['bytes'] / MIB:,.0f} MiB")
    panels[2].set_title(f"a save stops training for {saved['pause_in_steps']:.2f} steps", fontsize=9)
    figure.suptitle(f"trainer, {result['threads']} threads, {machine()['cpu']}", fontsize=10)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
