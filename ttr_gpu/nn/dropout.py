"""The key from which every dropout mask of a step follows."""

from __future__ import annotations

from dataclasses import dataclass

# Places in a model where dropout draws; a step leaves room for this many.
_SITES = 1 << 20


@dataclass(frozen=True)
class DropoutKey:
    """Seed of a run and number of the forward pass: with a site's number, all that a mask depends on."""

    seed: int
    step: int

    def offset(self, site: int) -> int:
        """Philox offset of one place in the model (0 <= site < 2^20) in this step."""
        return self.step * _SITES + site
