"""Events per second in training on sequences of uneven length: packed, beside PyTorch with padded batches."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig

from .harness import Call, Contender, Spread, as_the_trainer_computes, machine, result_file, take_turns, write_result
from .step import check_agreement, find_packages
from .step_shapes import EVENTS
from .step_sides import EAGER, OURS, TRAIN, Side

# Bucketing: so many batches' sequences are sorted by length together, as loaders of text do.
POOL = 100
PACKED, PADDED, BUCKETED = "ttr-gpu, packed", "PyTorch, padded", "PyTorch, padded, bucketed"


@dataclass(frozen=True)
class Sequences:
    """Training sequences with at least two events, and the model for them."""

    tokens: list[np.ndarray[Any, Any]]
    times: list[np.ndarray[Any, Any]]
    model: ModelConfig

    def batches(self, size: int, bucketed: bool) -> list[np.ndarray[Any, Any]]:
        """Numbers of the sequences of each batch of an epoch; every side sees the same ones."""
        rng = np.random.default_rng(0)
        order = rng.permutation(len(self.tokens))
        if bucketed:
            lengths = np.array([len(each) for each in self.tokens])
            pools = [order[begin : begin + POOL * size] for begin in range(0, len(order), POOL * size)]
            order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        batches = [order[begin : begin + size] for begin in range(0, len(order) - size + 1, size)]
        return [batches[index] for index in rng.permutation(len(batches))] if bucketed else batches

    def padding(self, batches: list[np.ndarray[Any, Any]]) -> float:
        """Share of the positions of padded batches that are padding."""
        lengths = [np.array([len(self.tokens[number]) - 1 for number in batch]) for batch in batches]
        return 1 - sum(int(each.sum()) for each in lengths) / sum(len(each) * int(each.max()) for each in lengths)


def load(path: Path, preset: str) -> Sequences:
    """The training split of a raw file, through `ttr-gpu preprocess`."""
    from ttr_gpu.data.dataset import open_dataset
    from ttr_gpu.data.options import PreprocessOptions
    from ttr_gpu.data.preprocess import preprocess
    from ttr_gpu.data.splits import SplitOptions

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "data.zarr"
        preprocess(PreprocessOptions([str(path)], target, split=SplitOptions("0.6,0.2,0.2")), lambda line: None)
        dataset = open_dataset(target)
        train = dataset.split("train")
        tokens, times = train.read(0, train.token_count)
    inner = train.offsets[1:-1]
    pairs = [(k, t) for k, t in zip(np.split(tokens, inner), np.split(times, inner), strict=True) if len(k) > 1]
    gap = dataset.gap
    model = ModelConfig(
        vocabulary_size=dataset.vocabulary_size, time_scale=gap["median_nonzero"], time_span=float(times.max()),
        time_components=16, time_log_mean=gap["log_mean"], time_log_std=gap["log_std"], **PRESETS[preset],
    )  # fmt: skip
    return Sequences([k for k, _ in pairs], [t for _, t in pairs], model)


@dataclass(frozen=True)
class Packed:
    """Whole sequences end to end."""

    tokens: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]
    cu_seqlens: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    target_times: np.ndarray[Any, Any]


def pack(data: Sequences, batch: np.ndarray[Any, Any]) -> Packed:
    """A batch as the trainer's own batches are: without padding."""
    tokens, times = [data.tokens[number] for number in batch], [data.times[number] for number in batch]
    lengths = [len(each) - 1 for each in tokens]
    return Packed(
        np.concatenate([each[:-1] for each in tokens]), np.concatenate([each[:-1] for each in times]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), np.concatenate([each[1:] for each in tokens]),
        np.concatenate([each[1:] for each in times]),
    )  # fmt: skip


def make_ours(threads: int, path: Path, preset: str, size: int) -> Callable[[], tuple[float, int]]:
    """Our step on the next batch -> (loss, events)."""
    from ttr_gpu.model import TransformerModel
    from ttr_gpu.train.optimizer import Optimizer

    as_the_trainer_computes(threads)
    data = load(path, preset)
    model = TransformerModel(data.model)
    optimizer = Optimizer(model, TRAIN)
    batches = cycle(data.batches(size, False))
    steps = 0

    def step() -> tuple[float, int]:
        nonlocal steps
        steps += 1
        batch = pack(data, next(batches))
        with model.arena.step():
            loss, saved = model.loss_forward(batch)
            model.loss_backward(1.0, saved, accumulate=False)
            optimizer.update(steps, TRAIN.lr or 0.0, optimizer.gradient_norm())
            return float(loss), len(batch.tokens)

    return step


def make_peer(threads: int, path: Path, preset: str, size: int, bucketed: bool) -> Callable[[], tuple[float, int]]:
    """PyTorch's step on the next batch, from the same weights -> (loss, events without padding)."""
    import torch

    from ttr_gpu.memory import keep_freed_memory
    from ttr_gpu.model import TransformerModel

    from .peers import torch_events, torch_model

    torch.set_num_threads(threads)
    keep_freed_memory()
    data = load(path, preset)
    model = torch_events.TorchEventModel(data.model)
    torch_model.load_weights(model, TransformerModel(data.model))
    optimizer = torch_model.make_optimizer(
        model, lr=TRAIN.lr or 0.0, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps, weight_decay=TRAIN.weight_decay
    )
    batches: Iterator[np.ndarray[Any, Any]] = cycle(data.batches(size, bucketed))

    def step() -> tuple[float, int]:
        chosen = next(batches)
        given = torch_events.padded(
            [data.tokens[number] for number in chosen], [data.times[number] for number in chosen]
        )
        loss = torch_model.training_step(model, optimizer, given, TRAIN.clip_norm)
        return loss, int((given.batch.targets >= 0).sum())

    return step


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=EVENTS, help="Raw events."
)
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="nano", show_default=True)
@click.option(
    "--batch", "size", type=click.IntRange(min=1), default=28, show_default=True, help="Sequences of a batch."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=10, show_default=True, help="Turns of each side.")
@click.option("--calls", type=click.IntRange(min=1), default=8, show_default=True, help="Steps timed in each turn.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
def events(
    data: Path, preset: str, size: int, threads: int | None, turns: int, calls: int, output: Path | None
) -> None:  # fmt: skip
    """Train on whole sequences of uneven length, in turns: ours packed, PyTorch padded, PyTorch padded in buckets."""
    threads = threads or machine()["cores"]
    packages = find_packages()
    loaded = load(data, preset)
    padding = {
        PADDED: loaded.padding(loaded.batches(size, False)), BUCKETED: loaded.padding(loaded.batches(size, True)),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(Contender(PACKED, make_ours, threads, data, preset, size))]
        if packages:
            for name, bucketed in ((PADDED, False), (BUCKETED, True)):
                peer = Contender(name, make_peer, threads, data, preset, size, bucketed)
                contenders.append(stack.enter_context(peer))
        first = [contender.call(2)[0].value[0] for contender in contenders]
        # The bucketed side begins with another batch.
        compared = [Side(OURS, "float32"), Side(EAGER, "float32")]
        check_agreement(compared[: len(first)], first[:2])
        timed = take_turns(contenders, turns=turns, calls=calls)
    sides = {
        contender.name: rates(each) for contender, each in zip(contenders, timed, strict=True)
    }  # fmt: skip
    ours = sides[PACKED]
    ratios = {
        name: Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])._asdict()
        for name, theirs in sides.items() if name != PACKED
    }  # fmt: skip
    result = {
        "threads": threads, "preset": preset, "batch": size, "model": loaded.model.model_dump(), "padding": padding,
        "events_per_second": {name: Spread.of(values)._asdict() for name, values in sides.items()}, "ratio": ratios,
    }  # fmt: skip
    print_table(result)
    write_result(output or result_file("events"), "events", result, *packages)


def rates(turns: list[list[Call]]) -> list[float]:
    """Events per second of each turn."""
    return [sum(call.value[1] for call in turn) / sum(call.seconds for call in turn) for turn in turns]


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(
        f"training, {result['preset']}, {result['batch']} whole sequences a batch, {result['threads']} threads, float32"
    )
    print(f"{'':<28} {'events/s':>10} {'quartiles':>20} {'padding':>9} {'ours is':>9}")
    for name, rate in result["events_per_second"].items():
        quartiles = f"{rate['lower']:,.0f} – {rate['upper']:,.0f}"
        share = result["padding"].get(name)
        ratio = result["ratio"].get(name)
        padding = "-" if share is None else f"{100 * share:.1f} %"
        times = "" if ratio is None else f"{ratio['median']:.2f} x"
        print(f"{name:<28} {rate['median']:>10,.0f} {quartiles:>20} {padding:>9} {times:>9}")
    print(f"packing avoids {100 * result['padding'][PADDED]:.1f} % of the positions of a padded batch")
