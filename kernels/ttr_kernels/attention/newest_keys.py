"""The times that stand for the queries' under a linear bias, on either kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array, array_module

if TYPE_CHECKING:
    from . import Visibility


def newest_key_times(times: Array, key_times: Array, visibility: Visibility) -> Array:
    """The time of the newest key that each query sees, or its own if it sees none.

    A softmax does not see what is added to a whole row, and a linear bias adds −rate · (t_i − t_newest) / tau to it.
    Left in, and far from all keys, that would dwarf the logits' differences in float32.
    """
    lengths = np.diff(visibility.query_offsets)
    newest = np.arange(len(times)) + np.repeat(visibility.key_offsets[1:] - visibility.query_offsets[1:], lengths)
    sees = newest >= np.repeat(visibility.key_offsets[:-1], lengths)
    if not sees.any():
        return times
    xp = array_module(times)
    moved: Array = xp.where(xp.asarray(sees), key_times[xp.asarray(np.where(sees, newest, 0))], times)
    return moved
