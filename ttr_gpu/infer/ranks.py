"""Where the right answer stands among all, by score."""

from __future__ import annotations

from typing import Any

import numpy as np

# Of the likeliest so many, the share that has the right one among them is reported.
TOP = (1, 3, 5, 10)


def ranks(scores: Any, targets: Any) -> Any:
    """(rows,) how many classes of scores (rows, V) stand before the target: 0 if it is the likeliest.

    Of equal scores the lower class stands first, as in argmax.
    """
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    equal_before = (scores == own) & (np.arange(scores.shape[1]) < targets[:, None])
    return (scores > own).sum(axis=1) + equal_before.sum(axis=1)


def top_shares(counts: Any) -> dict[int, float]:
    """k -> share of targets of rank below k, for every k of TOP; counts[r] targets have rank r."""
    return {k: float(counts[:k].sum() / max(1, counts.sum())) for k in TOP}
