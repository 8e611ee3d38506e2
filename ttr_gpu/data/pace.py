"""Whether sequences of events make up for what they missed, so that how far one is behind tells what comes next."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .dataset import Split

# Neighbouring gaps that are summed; sums from which on their variance is believed; tokens that are looked at.
_GAPS, _LEAST, _TOKENS = 16, 64, 1 << 20
# Sums of independent gaps have a share of 1, those of clustered events more.
_STEADY = 0.5


def steady_pace(split: Split) -> float | None:
    """The mean gap, if sequences keep to it: sums of 16 neighbouring gaps vary less than half as much as sums of
    independent ones would. None if they do not, or if there are too few to tell.

    Such counts are under-dispersed (Cox & Lewis 1966, ch. 4): of a self-correcting process the share is about 0.1, of a
    renewal process 1, of events in bursts more than that.
    """
    ends = split.offsets[: int(np.searchsorted(split.offsets, _TOKENS, "right"))]
    if len(ends) < 2:
        ends = np.array([0, min(_TOKENS, split.token_count)])
    times = split.read(0, int(ends[-1]))[1]
    pieces = [np.diff(times[begin:end]) for begin, end in pairwise(ends)]
    gaps = np.concatenate(pieces)
    sums = np.concatenate([piece[: len(piece) // _GAPS * _GAPS].reshape(-1, _GAPS).sum(axis=1) for piece in pieces])
    if len(sums) < _LEAST or not gaps.var() > 0:
        return None
    share = ((sums - _GAPS * gaps.mean()) ** 2).mean() / (_GAPS * gaps.var())
    return float(gaps.mean()) if share < _STEADY else None
