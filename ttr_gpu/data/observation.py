"""The window of time in which events were observed: when nothing has happened yet, and until when nothing more did."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .timestamps import TimestampParser

# The type of the event that stands for the start of observation, where a sequence's first event is to be scored.
BEGIN = "<s>"


@dataclass(frozen=True)
class Observation:
    """Start and end, the same for all sequences, in the data's unit (origin included); None: not known."""

    start: float | None = None
    end: float | None = None


def parse_observation(text: str | None, parser: TimestampParser) -> Observation:
    """ "START,END", either of which may be left out: "2012-01-01T00:00Z," or ",1388534400".

    Raises UserError for anything else, or an end that is not after the start.
    """
    if text is None:
        return Observation()
    expected = "expected START,END in ascending order, of which one may be left out, such as ,2014-01-01T00:00Z"
    parts = [part.strip() for part in text.split(",")]
    try:
        start, end = (parser.parse(part) if part else None for part in parts)
    except ValueError as error:
        reason = "" if len(parts) != 2 else f" ({error})"
        raise UserError(f"--observation: got {text!r}; {expected}{reason}") from None
    if (start is None and end is None) or (start is not None and end is not None and start >= end):
        raise UserError(f"--observation: got {text!r}; {expected}")
    return Observation(start, end)
