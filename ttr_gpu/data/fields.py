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
    headless = layout.form == "csv" and not names
    if wanted is not None:
        if wanted in names or (not names and not headless):
            return wanted
        if headless and wanted.isdigit():
            if 1 <= int(wanted) <= layout.width:
                return wanted
            raise UserError(f"{source.name}: {option}: no column {wanted}; it has {layout.width}")
        if names and wanted.isdigit() and 1 <= int(wanted) <= len(names) and layout.form == "csv":
            return names[int(wanted) - 1]
        near = difflib.get_close_matches(wanted, names, 1)
        there = f"did you mean {near[0]!r}? " if near else ""
        if names and wanted.isdigit() and layout.form == "csv":
            there = f"columns are numbered from 1 to {len(names)}; "
        have = f"it has {', '.join(names)}" if names else "it has no header: give a number from 1, or --header"
        raise UserError(f"{source.name}: {option}: no column {wanted!r}; {there}{have}")
    lower = {name.lower(): name for name in names}
    for name in usual:
        if name in lower:
            return lower[name]
    if required and headless:
        raise UserError(
            f"{source.name}: its columns have no names; say which of the {layout.width} with {option} NUMBER, or add "
            "--header if the first line names them"
        )
    if required:
        closest = next((name for name in names if difflib.get_close_matches(name.lower(), usual, 1, 0.7)), None)
        hint = "" if closest is None else f", such as {option} {closest}"
        raise UserError(
            f"{source.name}: found no column named {' or '.join(usual)}; say which of {', '.join(names)} with "
            f"{option}{hint}"
        )
    return None
