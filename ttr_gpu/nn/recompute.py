"""Activation checkpointing (Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*): part of what a block's
forward saved is dropped, and computed again, to the same bits, when its backward needs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ttr_kernels.common.arrays import Array
from ttr_kernels.rope import RopeTable

from .dropout import DropoutKey
from .sequences import Sequences
from .transformer_block import TransformerBlock, TransformerBlockSaved

Policy = Literal["none", "block", "attention", "feed_forward"]


@dataclass(frozen=True)
class Recompute:
    """What is computed again: `policy` says what of a block, `every` that it is so in blocks 0, every, 2·every, …"""

    policy: Policy = "none"
    every: int = 1

    def of_block(self, index: int) -> Policy:
        """The policy of one block."""
        return self.policy if index % self.every == 0 else "none"


@dataclass(frozen=True)
class Dropped:
    """What is kept of a block whose forward is, in part, to be run again.

    Attributes:
        policy: which part was dropped.
        x: what entered that part.
        rest: what the other parts saved; None if the whole block was dropped.
        sequences, rope, dropout: as the forward was given them; every mask follows from `dropout`.
    """

    policy: Policy
    x: Array
    rest: TransformerBlockSaved | None
    sequences: Sequences
    rope: RopeTable
    dropout: DropoutKey | None


def drop(
    policy: Policy, x: Array, saved: TransformerBlockSaved, sequences: Sequences, rope: RopeTable,
    dropout: DropoutKey | None,
) -> TransformerBlockSaved | Dropped:  # fmt: skip
    """What to keep of the block's forward of these arguments under a policy."""
    if policy == "none":
        return saved
    if policy == "block":
        return Dropped(policy, x, None, sequences, rope, dropout)
    # A part's own field holds nothing until `restore` fills it.
    if policy == "attention":
        rest = replace(saved, attention=None)  # type: ignore[arg-type]
        return Dropped(policy, saved.attention.project.x, rest, sequences, rope, dropout)
    rest = replace(saved, feed_forward=None)  # type: ignore[arg-type]
    return Dropped(policy, saved.feed_forward.up.x, rest, sequences, rope, dropout)


def restore(block: TransformerBlock, kept: TransformerBlockSaved | Dropped) -> TransformerBlockSaved:
    """All that the block's forward saved, what was dropped being computed again."""
    if not isinstance(kept, Dropped):
        return kept
    if kept.rest is None:
        return block.recompute(kept.x, kept.sequences, kept.rope, kept.dropout)
    if kept.policy == "attention":
        attention = block.attention.recompute(kept.x, kept.sequences, kept.rope, kept.dropout)
        return replace(kept.rest, attention=attention)
    return replace(kept.rest, feed_forward=block.feed_forward.recompute(kept.x, kept.dropout))
