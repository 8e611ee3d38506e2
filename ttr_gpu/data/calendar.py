"""Whether the types of events follow the calendar that all sequences share, so that absolute time tells what comes
next."""

from __future__ import annotations

from typing import Any

import numpy as np

from .dataset import Split

# Stretches of time with as many training events each; tokens that are looked at.
_STRETCHES, _TOKENS = 16, 1 << 22
# Share of the validation events that must lie within the training split's time, and nats per event that it must tell.
_INSIDE, _NATS = 0.9, 0.01


def types_follow_calendar(train: Split, validation: Split, types: int) -> bool:
    """Whether when the event before happened, and nothing else, predicts types of the validation split better than
    their frequencies do, by 0.01 nats per event and by two standard errors.

    The training split's time is divided into 16 stretches b with as many events each; of type k

        p(k | b) = (n_bk + d_b p_k) / (n_b + d_b)        p_k = (n_k + ½) / Σ (n + ½)

    with n_b events of d_b different types (Witten & Bell 1991). False also where validation lies elsewhere in time, as
    after a split by date: what is learned of a time that will not come again is of no use.

    Args:
        train, validation: splits of events.
        types: size of the vocabulary.
    """
    if types < 2:
        return False
    known, times = _after_another(train)
    asked, moments = _after_another(validation)
    if not len(known) or not len(asked):
        return False
    if ((moments >= times.min()) & (moments <= times.max())).mean() < _INSIDE:
        return False
    edges = np.quantile(times, np.arange(1, _STRETCHES) / _STRETCHES)
    counts = np.zeros((_STRETCHES, types))
    np.add.at(counts, (np.searchsorted(edges, times, "right"), known), 1.0)
    overall = counts.sum(axis=0) + 0.5
    overall /= overall.sum()
    different = (counts > 0).sum(axis=1, keepdims=True)
    shares = (counts + different * overall) / np.maximum(counts.sum(axis=1, keepdims=True) + different, 1)
    stretch = np.searchsorted(edges, moments, "right")
    # A stretch without a training event, where times repeat, tells nothing.
    told = counts.sum(axis=1)[stretch] > 0
    gain = np.log(shares[stretch[told], asked[told]]) - np.log(overall[asked[told]])
    return bool(gain.sum() / len(asked) >= _NATS and gain.mean() >= 2 * gain.std() / len(gain) ** 0.5)


def _after_another(split: Split) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Types of the events that follow another one in their sequence, and the time of that one."""
    count = min(split.token_count, _TOKENS)
    tokens, times = split.read(0, count)
    follows = np.ones(count, bool)
    follows[split.offsets[split.offsets < count]] = False
    rows = np.flatnonzero(follows)
    return tokens[rows], times[rows - 1]
