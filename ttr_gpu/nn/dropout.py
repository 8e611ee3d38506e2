"""The key from which every dropout mask of a step follows."""

from __future__ import annotations

from dataclasses import dataclass

# Places in a model where dropout draws; a step leaves room for this many, and a part of a batch for 2^32 steps.
_SITES, _STEPS = 1 << 20, 1 << 32


@dataclass(frozen=True)
class DropoutKey:
    """Seed of a run, number of the forward pass, and which part of its batch this is: with a site's number, all that a
    mask depends on."""

    seed: int
    step: int
    part: int = 0

    def offset(self, site: int) -> int:
        """Philox offset of one place in the model (0 <= site < 2^20) in this step (< 2^32) and part (< 2^12)."""
        return (self.part * _STEPS + self.step) * _SITES + site
