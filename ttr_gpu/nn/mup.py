"""Sizes and learning rates that follow the width, so that what was tuned on a narrow model holds for a wide one.

Maximal update parametrization (Yang et al. 2022, *Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
Hyperparameter Transfer*, Table 3, for Adam).

With s = base width / width, and the widths of heads (C / H) and the ratio F / C the same at every width:

matrices between activations   initial deviation 1/√fan-in (as without),   rate · s
heads                          initial deviation · s,                      rate · s
embeddings, gains, biases      as without

A step then changes every activation, and the logits, by the same amount at any width.
"""

from __future__ import annotations

from collections.abc import Iterable

from .parameter import Parameter


def scale_with_width(hidden: Iterable[Parameter], heads: Iterable[Parameter], share: float) -> None:
    """Set the relative rates of these matrices, and the initial sizes of the heads'.

    Args:
        share: base width over width.
    """
    for p in hidden:
        p.rate = share
    for p in heads:
        p.rate = share
        p.value *= p.value.dtype.type(share)
