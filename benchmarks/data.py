"""Reading raw records and cutting training batches, beside the simplest code and PyTorch's DataLoader."""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from .harness import Contender, Spread, compare_option, machine, ratio, report, result_file, take_turns
from .step import find_packages
from .step_shapes import EVENTS

TEXTS = EVENTS.with_name("commits.jsonl.gz")
TOKENS, LENGTH, BATCHES = 2048, 256, 200
ROWS, TOKENIZE, READ = "events", "text", "batches"
OURS = "ttr-gpu"


def make_preprocess(source: Path, folder: Path, tokenizer: str) -> Callable[[], int]:
    """`ttr-gpu preprocess` of a raw file into shards with checksums: rows of events, or tokens of text."""
    from ttr_gpu.data.dataset import open_dataset
    from ttr_gpu.data.options import PreprocessOptions
    from ttr_gpu.data.preprocess import preprocess

    numbers = itertools.count()

    def run() -> int:
        target = folder / f"{source.name}-{next(numbers)}.zarr"
        preprocess(PreprocessOptions([str(source)], target, tokenizer=tokenizer), lambda line: None)
        dataset = open_dataset(target)
        return sum(dataset.split(name).token_count for name in dataset.splits)

    return run


def make_csv(source: Path) -> Callable[[], int]:
    """Python's csv module and a float for each time; nothing checked, sorted, split or written."""

    def run() -> int:
        with gzip.open(source, "rt", newline="") as file:
            rows = csv.reader(file)
            next(rows)
            sequences, times, types = zip(*((a, float(b), c) for a, b, c in rows), strict=True)
        return len(np.array(times)) if len(sequences) == len(types) else 0

    return run


def make_encode(source: Path, tokenizer: str) -> Callable[[], int]:
    """`json.loads` and the same tokenizer, all texts at once; nothing checked, split or written."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(tokenizer)

    def run() -> int:
        with gzip.open(source, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        # Two more each: where a text begins, and its terminator.
        return sum(len(encoding.ids) + 2 for encoding in encoder.encode_batch(texts))

    return run


def make_batches(data: Path) -> Callable[[], int]:
    """Our packed batches: tokens, times, targets, and where sequences begin."""
    from ttr_gpu.data.batches import TrainingBatches
    from ttr_gpu.data.dataset import open_dataset

    dataset = open_dataset(data)
    batches = TrainingBatches(
        dataset.split("train"), fingerprint=dataset.fingerprint, tokens_per_batch=TOKENS, max_length=LENGTH
    )
    return lambda: sum(len(next(batches).tokens) for _ in range(BATCHES))


def make_memmap(data: Path, folder: Path) -> Callable[[], int]:
    """Windows at random places of one memory-mapped array of 16-bit tokens, as nanoGPT's `get_batch` takes them:
    no times, no sequences' ends, no token exactly once."""
    from ttr_gpu.data.dataset import open_dataset

    split = open_dataset(data).split("train")
    path = folder / "train.bin"
    split.read(0, split.token_count)[0].astype(np.uint16).tofile(path)
    rng, count = np.random.default_rng(0), TOKENS // LENGTH

    def batch() -> int:
        tokens = np.memmap(path, np.uint16, "r")
        starts = rng.integers(0, len(tokens) - LENGTH, count)
        x = np.stack([tokens[i : i + LENGTH].astype(np.int64) for i in starts])
        y = np.stack([tokens[i + 1 : i + 1 + LENGTH].astype(np.int64) for i in starts])
        return x.size if x.shape == y.shape else 0

    return lambda: sum(batch() for _ in range(BATCHES))


def make_loader(data: Path) -> Callable[[], int]:
    """PyTorch's DataLoader with one worker over the same windows, padded to the longest of each batch."""
    import torch
    from torch.utils.data import DataLoader

    from ttr_gpu.data.batches import Windows
    from ttr_gpu.data.dataset import open_dataset

    split = open_dataset(data).split("train")
    tokens, times = (torch.from_numpy(array) for array in split.read(0, split.token_count))
    windows = Windows.of(split, LENGTH)
    pairs = list(zip(windows.first.tolist(), windows.length.tolist(), strict=True))
    pad = torch.nn.utils.rnn.pad_sequence

    def collate(chosen: list[tuple[int, int]]) -> tuple[Any, ...]:
        x = pad([tokens[begin : begin + n] for begin, n in chosen], batch_first=True)
        t = pad([times[begin : begin + n] for begin, n in chosen], batch_first=True)
        y = pad([tokens[begin + 1 : begin + n + 1] for begin, n in chosen], batch_first=True, padding_value=-1)
        return x, t, y

    # As many windows as our batches have on average.
    size = max(1, round(TOKENS / float(np.mean(windows.length))))
    loader: Any = DataLoader(
        pairs,
        batch_size=size,
        shuffle=True,
        num_workers=1,
        collate_fn=collate,
        persistent_workers=True,
        multiprocessing_context="fork",
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()
    return lambda: sum(int((next(batches)[2] >= 0).sum()) for _ in range(BATCHES))


@click.command()
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each side.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
@compare_option
def data(turns: int, output: Path | None, compare: Path | None) -> None:
    """Time preprocessing and the reading of batches, in turns with the simplest code that reads as much."""
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        made, tokenizer = _prepare(folder)
        parts: dict[str, list[tuple[Any, ...]]] = {
            ROWS: [(OURS, make_preprocess, EVENTS, folder, "bpe"), ("csv module alone", make_csv, EVENTS)],
            TOKENIZE: [(OURS, make_preprocess, TEXTS, folder, tokenizer),
                       ("json and tokenizers alone", make_encode, TEXTS, tokenizer)],
            READ: [(OURS, make_batches, made), ("memory-mapped windows", make_memmap, made, folder)],
        }  # fmt: skip
        if find_packages():
            parts[READ].append(("DataLoader, padded", make_loader, made))
        for part, contenders in parts.items():
            started = [stack.enter_context(Contender(*contender, children=True)) for contender in contenders]
            timed = take_turns(started, turns=turns, calls=1)
            for contender, taken in zip(started, timed, strict=True):
                counts = [call.value for turn in taken for call in turn]
                seconds = Spread.of([call.seconds for turn in taken for call in turn])
                sides[f"{part}, {contender.name}"] = {
                    "part": part, "side": contender.name, "seconds": seconds._asdict(), "count": counts[-1],
                    "per_second": Spread.of([c.value / c.seconds for turn in taken for c in turn])._asdict(),
                    "over_ours": ratio(taken, timed[0])._asdict(),
                }  # fmt: skip
    result = {"tokens": TOKENS, "length": LENGTH, "batches": BATCHES, "sides": sides}
    print_table(result)
    report(output or result_file("data"), "data", result, compare, "zarr", "tokenizers", "torch")


def _prepare(folder: Path) -> tuple[Path, str]:
    """The shipped events as a data set, and a tokenizer trained on the shipped texts."""
    from ttr_gpu.data.options import PreprocessOptions
    from ttr_gpu.data.preprocess import preprocess

    made, texts = folder / "events.zarr", folder / "texts.zarr"
    preprocess(PreprocessOptions([str(EVENTS)], made), lambda line: None)
    preprocess(PreprocessOptions([str(TEXTS)], texts), lambda line: None)
    return made, str(texts / "tokenizer.json")


def print_table(result: dict[str, Any]) -> None:
    """Seconds of each side, what it read each second, and its time over ours."""
    units = {ROWS: "rows", TOKENIZE: "tokens", READ: "tokens"}
    print(f"{machine()['cpu']}; a batch: {result['tokens']} tokens, {result['batches']} of them a call")
    for side in result["sides"].values():
        rate, over = side["per_second"], side["over_ours"]
        print(
            f"{side['part']:<8} {side['side']:<26} {side['seconds']['median']:>8.3f} s {rate['median']:>12,.0f} "
            f"{units[side['part']]}/s   {over['median']:.2f} ({over['lower']:.2f} – {over['upper']:.2f}) of our time"
        )
