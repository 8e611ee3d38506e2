"""Finding the columns of a data set in the names that its files use."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import UserError
from .guess import Layout
from .sources import Source

# Names of splits in a --split-column.
SPLIT_NAMES = {
    "train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2, "testing": 2
}  # fmt: skip


def find_column(
    wanted: str | None, usual: Sequence[str], layout: Layout, source: Source, option: str, required: bool
) -> str | None:
    """The name under which a record has this column; None if there is none and it is not required.

    Raises UserError for a name that is not there, with the nearest one that is.
    """
    names = list(layout.columns)
    if wanted is not None:
        if wanted in names or (not names and (layout.form != "csv" or wanted.isdigit())):
            return wanted
        if names and wanted.isdigit() and 1 <= int(wanted) <= len(names) and layout.form == "csv":
            return names[int(wanted) - 1]
        near = difflib.get_close_matches(wanted, names, 1)
        there = f"did you mean {near[0]!r}? " if near else ""
        have = f"it has {', '.join(names)}" if names else "it has no header: give a number from 1, or --header"
        raise UserError(f"{source.name}: {option}: no column {wanted!r}; {there}{have}")
    lower = {name.lower(): name for name in names}
    for name in usual:
        if name in lower:
            return lower[name]
    if required:
        have = ", ".join(names) if names else "no header"
        raise UserError(f"{source.name}: found no column named {' or '.join(usual)} ({have}); say which with {option}")
    return None
