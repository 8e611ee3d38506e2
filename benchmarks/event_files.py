"""Event sequences in .npz files, their random splits, and data sets made of them.

A file has `times` (float64, all sequences end to end) and `offsets` (int64, sequences + 1); `marks` where there are
event types.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.data.splits import SplitOptions

Array = np.ndarray[Any, Any]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class EventFile:
    """Sequences of one file: arrival times (float64) of each, and types (int32) or None."""

    name: str
    times: list[Array]
    types: list[Array] | None

    def split(self, seed: int) -> dict[str, Array]:
        """Numbers of the sequences of each split: the first 60 %, the next 20 % and the rest of a permutation."""
        n = len(self.times)
        order = np.random.default_rng(seed).permutation(n)
        first, second = int(0.6 * n), int(0.8 * n)
        return dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))


def read_events(path: Path) -> EventFile:
    """Read a file; ClickException naming it if it is missing or no file of sequences."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            times, offsets = arrays["times"], arrays["offsets"]
            marks = arrays.get("marks")
    except (OSError, ValueError, KeyError) as error:
        raise click.ClickException(f"{path}: cannot be read as event sequences (times, offsets): {error}") from None
    inner = offsets[1:-1]
    return EventFile(path.stem, np.split(times, inner), None if marks is None else np.split(marks, inner))


def cut(sequence: Array, gaps: int) -> list[Array]:
    """Consecutive chunks of at most so many gaps, each with the event that its first gap begins at; none is lost."""
    return [sequence[begin : begin + gaps + 1] for begin in range(0, len(sequence) - 1, gaps)]


def write_dataset(
    folder: Path, events: EventFile, parts: dict[str, Array], *, chunk: int | None = None, typed: bool = False
) -> Path:
    """The data set of one split, made through `ttr-gpu preprocess` from a JSONL file per part.

    Args:
        folder: it and the raw files are written here.
        parts: from `EventFile.split`.
        chunk: training sequences are cut into chunks of so many gaps; None: they stay whole.
        typed: events keep their types; otherwise all are of one type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, chosen in parts.items():
        files[part] = folder / f"{part}.jsonl"
        with files[part].open("w") as file:
            for number in chosen:
                pieces = [events.times[number]]
                kinds = [events.types[number]] if typed and events.types is not None else None
                if part == "train" and chunk is not None:
                    pieces = cut(pieces[0], chunk)
                    kinds = None if kinds is None else cut(kinds[0], chunk)
                for index, times in enumerate(pieces):
                    record = {"times": times.tolist()}
                    if kinds is not None:
                        record["types"] = kinds[index].tolist()
                    file.write(json.dumps(record) + "\n")
    target = folder / "data.zarr"
    options = PreprocessOptions(
        [str(files["train"])], target, validation=[str(files["validation"])], test=[str(files["test"])], kind="events",
        split=SplitOptions(given=True), overwrite=True,
    )  # fmt: skip
    preprocess(options, lambda line: None)
    return target
