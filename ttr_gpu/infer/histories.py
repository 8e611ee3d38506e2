"""Histories of events to predict from, read like the inputs of `ttr-gpu preprocess`."""

from __future__ import annotations

import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array

from ..data.events import UNTYPED, EventReader, check_order
from ..data.guess import guess_layout
from ..data.options import PreprocessOptions
from ..data.rejects import Rejects
from ..data.sources import Source
from ..data.timestamps import TimestampParser
from ..errors import UserError
from .prompts import EventPrompts


@dataclass(frozen=True)
class History:
    """What is known of one sequence.

    Attributes:
        name: its `id` or sequence column, or the line it is on.
        types: (n,) int32 tokens of the model; times: (n,) float64, ascending, as in the input.
    """

    name: Any
    types: Array
    times: Array


def read_histories(options: PreprocessOptions, names: list[str], unit: float) -> list[History]:
    """The sequences of `options.inputs`, each with at least one event, in the order in which they begin.

    Args:
        options: inputs, columns, type_bins, assume_utc: as for preprocessing.
        names: of the event types that the model knows.
        unit: seconds in one unit of the model's time.

    Raises:
        UserError: what cannot be used, as file:line; an event type that is unknown.
    """
    prompts = EventPrompts(names)
    with tempfile.TemporaryDirectory(prefix="ttr-gpu-") as folder:
        reader = EventReader(options, TimestampParser(unit, options.assume_utc), Rejects(hint=""), Path(folder))
        for path in options.inputs:
            source = Source(path)
            try:
                wanted = tuple(name for name in astuple(options.columns) if name)
                layout = guess_layout(source, "events", options.header, wanted)
                reader.read(source, layout, None, lambda line: None)
            finally:
                source.close()
        grouped = reader.spool.grouped(len(reader.sequences))
        check_order(reader, grouped)
        known = _tokens(reader, grouped, prompts, names)
        result = []
        for index, (_, key) in enumerate(reader.sequences):
            part = slice(int(grouped.offsets[index]), int(grouped.offsets[index + 1]))
            # A record without an id is known by the line it is on; a file without sequences is one, the first.
            name = key[1] if isinstance(key, tuple) else key if isinstance(key, str) else 1
            result.append(History(name, known[np.asarray(grouped.types[part])], np.array(grouped.times[part])))
    if not result:
        raise UserError(f"{', '.join(options.inputs)}: no events; expected at least one history")
    return result


def _tokens(reader: EventReader, grouped: Any, prompts: EventPrompts, names: list[str]) -> Array:
    """The model's token of each type as numbered while reading."""
    tokens = []
    for number, kind in enumerate(reader.types):
        if kind == UNTYPED and len(names) == 1:
            # Of a model with one type, its name need not be said.
            tokens.append(0)
            continue
        try:
            tokens.append(prompts.token(kind))
        except UserError as error:
            place = reader.place(int(grouped.places[int(np.flatnonzero(np.asarray(grouped.types) == number)[0])]))
            untyped = ""
            if kind == UNTYPED:
                untyped = (
                    ", what events are called that have none: if a column has their types, say which with "
                    "--type-column (and --type-bins, if they are numbers that were put in bins)"
                )
            raise UserError(f"{place}: {error}{untyped}") from None
    return np.array(tokens, np.int32)
