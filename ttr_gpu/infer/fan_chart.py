"""A picture of a prediction: how many events until when, and of which types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.timestamps import date_text, is_date
from ..figures import save, subplots
from .prediction import Prediction

_BANDS = ((0.025, 0.975, "95 %"), (0.1, 0.9, "80 %"), (0.25, 0.75, "50 %"))
_SHADES = ("#deebf7", "#9ecae1", "#4292c6")
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_PAST_SHARE, _PATHS, _MOST_TYPES = 0.5, 8, 8


def draw_fan_chart(path: Path, prediction: Prediction, names: Sequence[str], unit_seconds: float | None) -> Path:
    """Draw what has happened and bands of what may come, a few futures, and expected numbers by type, to a PNG."""
    scale, unit = _axis_unit(prediction.end - prediction.now, unit_seconds)
    expected = prediction.expected_counts()
    shown = [int(token) for token in np.argsort(-expected, kind="stable")[:_MOST_TYPES] if expected[token] > 0]
    by_type = len(names) > 1 and bool(shown)
    if by_type:
        figure, parts = subplots(1, 2, figsize=(10, 4.2), dpi=150, width_ratios=(2.2, 1))
    else:
        figure, only = subplots(1, 1, figsize=(7.5, 4.2), dpi=150)
        parts = (only,)
    axes, *bars = parts
    _draw_fan(axes, prediction, scale)
    moment = None
    if unit_seconds is not None and is_date(prediction.now, unit_seconds):
        moment = date_text(prediction.now, unit_seconds, "%Y-%m-%d %H:%M UTC")
    since = f"{prediction.now:g}" if moment is None else moment
    axes.set(xlabel=f"{unit} after {since}", ylabel="events since then")
    axes.set_title(f"{len(prediction.futures)} sampled futures of {prediction.history.name}", fontsize=11)
    for by_type_axes in bars:
        labels = [names[token] for token in shown]
        drawn = by_type_axes.barh(labels, expected[shown], color="#4292c6")
        by_type_axes.bar_label(drawn, fmt="%.2g", padding=3)
        by_type_axes.invert_yaxis()
        by_type_axes.margins(x=0.15)
        by_type_axes.set_xlabel("expected events until the horizon")
    return save(figure, tuple(parts), path)


def _draw_fan(axes: Any, prediction: Prediction, scale: float) -> None:
    """Counts relative to `now`: negative for what is past."""
    now, end, past = prediction.now, prediction.end, prediction.history.times
    moments = np.linspace(now, end, 200)
    counts = prediction.counts(moments)
    begin = now - _PAST_SHARE * (end - now)
    recent = past[past > begin]
    x = np.concatenate(([begin], recent, [now]))
    y = np.concatenate(([-len(recent)], np.arange(1 - len(recent), 1), [0]))
    axes.step((x - now) / scale, y, where="post", color="black", linewidth=1.5)
    at = (moments - now) / scale
    for (low, high, label), color in zip(_BANDS, _SHADES, strict=True):
        lower, upper = np.quantile(counts, (low, high), axis=0, method="inverted_cdf")
        axes.fill_between(at, lower, upper, step="post", color=color, linewidth=0, label=label)
    for future in prediction.futures[:_PATHS]:
        steps = np.concatenate(([now], future.times, [end]))
        heights = np.concatenate((np.arange(len(future.times) + 1), [len(future.times)]))
        axes.step((steps - now) / scale, heights, where="post", color="#636363", linewidth=0.5, alpha=0.7)
    axes.step(at, np.median(counts, axis=0), where="post", color="#08306b", linewidth=2, label="median")
    axes.axvline(0.0, color="#969696", linewidth=0.8, linestyle=":")
    axes.set_xlim((begin - now) / scale, (end - now) / scale)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _axis_unit(span: float, unit_seconds: float | None) -> tuple[float, str]:
    """What to divide times by, and the name of the unit that they are in then."""
    if unit_seconds is None:
        return 1.0, "positions"
    for seconds, name in _UNITS:
        if span * unit_seconds >= 2 * seconds:
            return seconds / unit_seconds, name
    return 1.0, f"units of {unit_seconds:g} s"
