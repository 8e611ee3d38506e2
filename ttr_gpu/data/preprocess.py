"""Raw files to `data.zarr`: read, check, group, split, write; each pass bounded in memory."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import UserError
from .events import EventReader, Say, check_order, require_events, write_events
from .guess import Layout, guess_layout
from .observation import Observation
from .options import PreprocessOptions, check_kind, check_options
from .rejects import Rejects
from .shards import SplitWriter, finish_dataset, note_leftovers, partial_folder
from .sources import Source
from .splits import SPLITS, SplitOptions
from .texts import TextReader, assign_splits, make_tokenizer, write_texts
from .timestamps import TimestampParser, unit_seconds


@dataclass(frozen=True)
class PreprocessResult:
    """What was written."""

    path: Path
    attributes: dict[str, Any]
    rejected: int
    rejects_path: Path | None


def preprocess(options: PreprocessOptions, say: Say) -> PreprocessResult:
    """Make a data set. `say` receives lines about what was guessed and found.

    Raises UserError for bad input; whatever happens, no partial data set is left behind.
    """
    unit = unit_seconds(options.time_unit)
    parser = TimestampParser(unit, options.assume_utc)
    check_options(options, parser)
    rejects_path = options.output.with_name(f"{options.output.name}.rejects.jsonl") if options.skip_errors else None
    with ExitStack() as stack:
        inputs = _open_inputs(options, stack)
        kind = inputs[0][1].kind
        check_kind(options, kind, inputs[0][0].name)
        note_leftovers(options.output, say)
        folder = stack.enter_context(partial_folder(options.output, options.overwrite))
        spool_folder = folder / "spool"
        spool_folder.mkdir()
        rejects = Rejects(rejects_path)
        stack.callback(rejects.close)
        make = EventReader if kind == "events" else TextReader
        reader: Any = make(options, parser, rejects, spool_folder)
        for source, layout, split in inputs:
            say(f"{source.name}: {layout}")
            reader.read(source, layout, split, say)
        import zarr

        root = zarr.create_group(folder, zarr_format=3)
        write = _write_events if kind == "events" else _write_texts
        attributes, vocabulary, writers = write(reader, root, folder, unit)
        _require_training(writers, options.split)
        shutil.rmtree(spool_folder)
        attributes["created_by"] = f"ttr-gpu {__version__}"
        attributes["rejected"] = rejects.count
        finish_dataset(folder, root, writers, attributes, vocabulary)
        result = dict(root.attrs)
    return PreprocessResult(options.output, result, rejects.count, rejects_path if rejects.count else None)


def _write_events(
    reader: EventReader, root: Any, folder: Path, unit: float
) -> tuple[dict[str, Any], str, list[SplitWriter]]:
    grouped = reader.spool.grouped(len(reader.sequences))
    good = check_order(reader, grouped)
    require_events(reader, good)
    names, tokens = reader.vocabulary()
    starts = np.asarray(grouped.offsets[:-1])[good]
    # Each sequence is in order: the earliest time is the earliest first event.
    origin = float(min(grouped.times[start] for start in starts))
    if reader.options.score_first and reader.observation.start is not None:
        origin = reader.observation.start
    writers = [SplitWriter(root, name, len(names), origin) for name in SPLITS]
    left_out = write_events(reader, grouped, good, tokens, writers)
    attributes = {
        "kind": "events", "vocabulary": names, "vocabulary_size": len(names), "time_unit_seconds": unit,
        "origin": origin, "terminators_appended": 0, "left_out": left_out,
    }  # fmt: skip
    window, described = reader.observation, json.dumps(names)
    if window != Observation():
        # Relative to the origin, as times are.
        attributes["observation"] = [None if t is None else t - origin for t in (window.start, window.end)]
        attributes["first_event_scored"] = reader.options.score_first
        described = json.dumps([names, attributes["observation"]])
    return attributes, described, writers


def _write_texts(
    reader: TextReader, root: Any, folder: Path, unit: float
) -> tuple[dict[str, Any], str, list[SplitWriter]]:
    reader.spool.finish()
    if not len(reader.spool):
        rejected = f" ({reader.rejects})" if reader.rejects.count else ""
        raise UserError(f"{', '.join(reader.sources)}: no documents{rejected}; expected at least one")
    split = assign_splits(reader)
    tokenizer = make_tokenizer(reader, split)
    origin = float(reader.spool.times.min()) if reader.timed else 0.0
    writers = [SplitWriter(root, name, tokenizer.vocabulary_size, origin) for name in SPLITS]
    write_texts(reader, split, tokenizer, writers, unit)
    reader.spool.close()
    tokenizer.save(folder / "tokenizer.json")
    attributes = {
        "kind": "text", "tokenizer": "tokenizer.json", "vocabulary_size": tokenizer.vocabulary_size,
        "time_unit_seconds": unit if reader.timed else None, "origin": origin,
        "terminators_appended": reader.terminators_appended, "left_out": int((split < 0).sum()),
    }  # fmt: skip
    return attributes, (folder / "tokenizer.json").read_text(), writers


def _open_inputs(options: PreprocessOptions, stack: ExitStack) -> list[tuple[Source, Layout, int | None]]:
    files = [(path, 0 if options.split.given and not options.columns.split else None) for path in options.inputs]
    files += [(path, 1) for path in options.validation] + [(path, 2) for path in options.test]
    opened = []
    for path, split in files:
        source = Source(path)
        stack.callback(source.close)
        wanted = tuple(name for name in astuple(options.columns) if name)
        opened.append((source, guess_layout(source, options.kind, options.header, wanted), split))
    kinds = {layout.kind for _, layout, _ in opened}
    if len(kinds) > 1:
        shown = ", ".join(f"{source.name} {layout.kind}" for source, layout, _ in opened)
        raise UserError(f"inputs of different kinds ({shown}); expected one kind: say which with --kind")
    return opened


def _require_training(writers: list[SplitWriter], split: SplitOptions) -> None:
    """UserError if nothing is left to train on."""
    if writers[0].sequences:
        return
    others = sum(writer.sequences for writer in writers)
    if split.times is not None:
        raise UserError(f"--split-time: got {split.times!r}, but nothing is before the first cut, to be trained on")
    if split.given:
        raise UserError("the input gives no sequence to the train split; expected at least one")
    raise UserError(
        f"--split: of {others} sequences none is left for train at {split.fractions}; try --split 1,0,0, or cut each "
        "sequence in time: --split-time 80%,90%"
    )
