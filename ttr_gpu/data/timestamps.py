"""Timestamps: numbers in a stated unit, or ISO 8601 in UTC, to float64 in that unit (since 1970-01-01 for dates)."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from ..errors import UserError
from .wording import shown

UNITS = {
    "nanoseconds": 1e-9, "microseconds": 1e-6, "milliseconds": 1e-3, "seconds": 1.0, "minutes": 60.0, "hours": 3600.0,
    "days": 86400.0, "weeks": 604800.0,
}  # fmt: skip
_SHORT = {
    "ns": "nanoseconds", "us": "microseconds", "µs": "microseconds", "ms": "milliseconds", "s": "seconds",
    "min": "minutes", "h": "hours", "d": "days", "w": "weeks",
}  # fmt: skip
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def unit_seconds(unit: str) -> float:
    """Seconds in a unit: a name of UNITS (also singular or short: "day", "ms"), or a positive number as text."""
    for name in (unit, _SHORT.get(unit, ""), f"{unit}s"):
        if name in UNITS:
            return UNITS[name]
    try:
        seconds = float(unit)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"--time-unit: got {unit!r}, expected {', '.join(UNITS)} or a number of seconds")
    return seconds


class TimestampParser:
    """Parses the timestamps of one data set.

    Args:
        unit: of numbers, in seconds; dates are converted to it.
        assume_utc: read dates without a zone as UTC; otherwise they are refused. None: refused, where there is no
            --assume-utc that a message could point to.
    """

    def __init__(self, unit: float = 1.0, assume_utc: bool | None = False) -> None:
        self.unit, self.assume_utc = unit, assume_utc

    def parse(self, value: Any) -> float:
        """A finite float64; ValueError saying what was got and what was expected."""
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"time: got {shown(value)}; expected a number or an ISO 8601 date")
        try:
            time = float(value)
        except ValueError:
            return self._date(str(value))
        except OverflowError:
            time = math.inf
        if not math.isfinite(time):
            raise ValueError(f"time: got {shown(value)}; expected a finite number")
        return time

    def _date(self, text: str) -> float:
        try:
            date = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(f"time: got {shown(text)}; expected a number or an ISO 8601 date") from None
        if date.tzinfo is None:
            if not self.assume_utc:
                way_out = "" if self.assume_utc is None else ", or the option --assume-utc"
                raise ValueError(
                    f"time: got {shown(text)}, a date without a zone; expected one such as "
                    f"2024-05-01T12:00:00Z{way_out}"
                )
            date = date.replace(tzinfo=UTC)
        seconds = (date - _EPOCH) / timedelta(microseconds=1) / 1e6
        return seconds if self.unit == 1.0 else seconds / self.unit


def parse_span(text: str, unit: float, option: str) -> float:
    """A positive span of time, "7d", "90 minutes" or a number of units, in units of `unit` seconds.

    Raises UserError naming the option.
    """
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzµ")
    name = text.strip()[len(number) :]
    try:
        value = float(number)
        seconds = unit_seconds(name) if name else unit
    except (ValueError, UserError):
        value = seconds = math.nan
    if not (value > 0 and math.isfinite(value * seconds)):
        short = ", ".join(f"{name} ({short})" for short, name in _SHORT.items() if short != "us")
        raise UserError(f"{option}: got {text!r}, expected a span such as 7d, 12h or 30min; units: {short}")
    return value * seconds / unit


def is_date(time: float, unit: float) -> bool:
    """Whether a time in `unit` seconds is taken for a date: times near zero count from the start of something, not from
    1970."""
    return abs(time) * unit > 365 * 86400


def date_text(
    time: float, unit: float, form: str = "%Y-%m-%d %H:%M:%S", milliseconds: bool = False
) -> str | None:  # fmt: skip
    """A time (in `unit` seconds since 1970) as a UTC date; None where it is outside the calendar."""
    try:
        date = _EPOCH + timedelta(seconds=time * unit)
        return date.strftime(form) + (f".{date.microsecond // 1000:03d}" if milliseconds else "")
    except (OverflowError, ValueError):
        return None
