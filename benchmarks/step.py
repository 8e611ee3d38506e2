"""One training step of the reference model (forward, backward, clipping, AdamW) beside PyTorch's."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig
from ttr_gpu.train.config import TrainConfig

from .harness import Call, Contender, Spread, machine, ratio, result_file, take_turns, write_result

SEQUENCES, LENGTH = 8, 256
MODEL = ModelConfig(vocabulary_size=4096, **PRESETS["tiny"])
TRAIN = TrainConfig(lr=1e-3)
# What the first losses may differ by, as a share of the loss.
AGREEMENT = 1e-4
OURS, PEER = "ttr-gpu", "PyTorch"


@dataclass(frozen=True)
class Batch:
    """Packed tokens of equally long sequences."""

    tokens: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]
    cu_seqlens: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]


def make_batch() -> Batch:
    """Random tokens and times; every position has a target, the token that follows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocabulary_size, (SEQUENCES, LENGTH + 1)).astype(np.int32)
    times = np.cumsum(rng.exponential(MODEL.time_scale, (SEQUENCES, LENGTH)), axis=1)
    starts = LENGTH * np.arange(SEQUENCES + 1, dtype=np.int32)
    return Batch(tokens[:, :-1].reshape(-1), times.reshape(-1), starts, tokens[:, 1:].reshape(-1))


def make_ours(threads: int) -> Callable[[], float]:
    """Our step, set up as the trainer sets it up."""
    from ttr_gpu.memory import keep_freed_memory
    from ttr_gpu.model import TransformerModel
    from ttr_gpu.train.optimizer import Optimizer
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    keep_freed_memory()
    model, batch = TransformerModel(MODEL), make_batch()
    optimizer = Optimizer(model, TRAIN)
    steps = 0

    def step() -> float:
        nonlocal steps
        steps += 1
        model.zero_gradients()
        loss, saved = model.loss_forward(batch)
        model.loss_backward(1.0, saved)
        optimizer.update(steps, TRAIN.lr or 0.0, optimizer.gradient_norm())
        return float(loss)

    return step


def make_peer(threads: int) -> Callable[[], float]:
    """PyTorch's step, from the same weights and on the same batch."""
    import torch

    from ttr_gpu.memory import keep_freed_memory
    from ttr_gpu.model import TransformerModel

    from .peers import torch_model

    torch.set_num_threads(threads)
    # Its allocator is malloc too, and gains by this as ours does.
    keep_freed_memory()
    model = torch_model.TorchModel(MODEL)
    torch_model.load_weights(model, TransformerModel(MODEL))
    optimizer = torch_model.make_optimizer(
        model, lr=TRAIN.lr, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps, weight_decay=TRAIN.weight_decay
    )
    batch = torch_model.to_torch(make_batch())
    return lambda: torch_model.training_step(model, optimizer, batch, TRAIN.clip_norm)


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=10, show_default=True, help="Turns of each side.")
@click.option("--calls", type=click.IntRange(min=1), default=5, show_default=True, help="Steps timed in each turn.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
def step(threads: int | None, turns: int, calls: int, output: Path | None) -> None:
    """Time a training step of the reference model beside PyTorch's, in turns."""
    threads = threads or machine()["cores"]
    packages = find_packages()
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(Contender(OURS, make_ours, threads))]
        if packages:
            contenders.append(stack.enter_context(Contender(PEER, make_peer, threads)))
        # One after the other: the first calls compile kernels and fill memory.
        first = [contender.call(2)[0].value for contender in contenders]
        check_agreement(first)
        timed = take_turns(contenders, turns=turns, calls=calls)
    result = summarize(contenders, first, timed, threads)
    print_table(result)
    output = output or result_file("step")
    write_result(output, "step", result, *packages)
    draw(output.with_suffix(".png"), result)


def find_packages() -> list[str]:
    """["torch"] if it is installed; otherwise says that the peer is missing."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return ["torch"]
    print("PyTorch is not installed, so our step is timed alone; for the comparison: pip install torch")
    return []


def check_agreement(losses: list[float]) -> None:
    """Both sides must compute the same: otherwise their times say nothing."""
    ours, others = losses[0], losses[1:]
    # A NaN compares as false: it must not pass for agreement.
    if not (math.isfinite(ours) and all(abs(ours - other) <= AGREEMENT * abs(other) for other in others)):
        raise click.ClickException(f"the losses of the first step differ: {OURS} {ours}, {PEER} {others}")


def summarize(
    contenders: list[Contender], first: list[float], timed: list[list[list[Call]]], threads: int
) -> dict[str, Any]:
    """What the result file says beyond machine and versions."""
    tokens = SEQUENCES * LENGTH
    sides = {}
    for contender, loss, turns in zip(contenders, first, timed, strict=True):
        calls = [call for turn in turns for call in turn]
        seconds = Spread.of([call.seconds for call in calls])
        sides[contender.name] = {
            "seconds": seconds._asdict(),
            "cpu_seconds": Spread.of([call.cpu_seconds for call in calls])._asdict(),
            "tokens_per_second": tokens / seconds.median,
            "first_loss": loss,
            "last_loss": calls[-1].value,
            "turns": [[round(call.seconds, 5) for call in turn] for turn in turns],
        }
    compared = ratio(timed[1], timed[0])._asdict() if len(timed) > 1 else None
    return {
        "threads": threads, "tokens": tokens, "sequences": SEQUENCES, "length": LENGTH, "model": MODEL.model_dump(),
        "sides": sides, "ratio": compared,
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(f"training step of {result['tokens']} tokens, float32, {result['threads']} threads, {machine()['cpu']}")
    print(f"{'':<10} {'median':>10} {'quartiles':>18} {'tokens/s':>10} {'CPU time':>10} {'first loss':>12}")
    for name, side in result["sides"].items():
        seconds = side["seconds"]
        quartiles = f"{1e3 * seconds['lower']:.1f} – {1e3 * seconds['upper']:.1f}"
        print(
            f"{name:<10} {1e3 * seconds['median']:>7.1f} ms {quartiles:>15} ms {side['tokens_per_second']:>10.0f} "
            f"{1e3 * side['cpu_seconds']['median']:>7.1f} ms {side['first_loss']:>12.6f}"
        )
    compared = result["ratio"]
    if compared:
        quartiles = f"quartiles {compared['lower']:.2f} – {compared['upper']:.2f}"
        print(f"{PEER} takes {compared['median']:.2f} times as long as {OURS} ({quartiles})")


def draw(path: Path, result: dict[str, Any]) -> None:
    """A bar for each side, with its quartiles."""
    from matplotlib.figure import Figure

    names = list(result["sides"])
    spreads = [result["sides"][name]["seconds"] for name in names]
    medians = [1e3 * spread["median"] for spread in spreads]
    below = [1e3 * (spread["median"] - spread["lower"]) for spread in spreads]
    above = [1e3 * (spread["upper"] - spread["median"]) for spread in spreads]
    figure = Figure(figsize=(6, 1.4 + 0.6 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names, medians, xerr=[below, above], color=["tab:blue", "tab:gray"][: len(names)], capsize=3)
    axes.bar_label(bars, labels=[f"{median:.0f} ms" for median in medians], label_type="center", color="white")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per training step (median, quartiles)")
    axes.set_title(f"{result['tokens']} tokens, float32, {result['threads']} threads, {machine()['cpu']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
