"""A prediction as JSON: likeliest types, quantiles of the time, and for the dashboard its density."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..infer.next_event import NextEvent

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
# Points of a density, from `at` to beyond the last quantile.
_POINTS = 96


def described(next_event: NextEvent, names: list[str], top: int, *, density: bool = False) -> dict[str, Any]:
    """{"types": [{"type", "probability"}, …], "at", "time": {"quantiles": {"0.5": …}, …}}.

    "time" is null for a model that does not say when. "density": {"times": […], "values": […]} where it is asked for.
    """
    types = next_event.types
    order = np.argsort(-types, kind="stable")[:top]
    told: dict[str, Any] = {
        "types": [{"type": names[kind], "probability": float(types[kind])} for kind in order],
        "at": next_event.at,
        "time": None,
    }
    if next_event.gap is None:
        return told
    times = next_event.quantiles(list(QUANTILES))
    told["time"] = {"quantiles": {str(p): float(time) for p, time in zip(QUANTILES, times, strict=True)}}
    if density:
        grid = _grid(next_event, float(times[-1]))
        values = next_event.density(grid)
        told["time"]["density"] = {"times": grid.tolist(), "values": values.tolist()}
    return told


def _grid(next_event: NextEvent, end: float) -> np.ndarray[Any, Any]:
    """From `at` to the last quantile, finer near `at`, where densities of log-normals have their peaks."""
    return next_event.at + (end - next_event.at) * np.linspace(0.0, 1.0, _POINTS) ** 2
