"""The key from which every dropout mask of a step follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Places in a model where dropout draws: a step leaves room for this many.
_SITES = 1 << 20


@dataclass(frozen=True)
class DropoutKey:
    """With a site's number, all that a mask depends on.

    Attributes:
        seed: of a run.
        step: number of the forward pass, below 2^44.
        first_row: of what is computed here, in the batch: a batch divided among processes has the masks of the whole.
    """

    seed: int
    step: int
    first_row: int = 0

    def at(self, site: int) -> dict[str, Any]:
        """What an operation draws with at one place in the model, 0 <= site < 2^20: seed, offset and first_row."""
        return {"seed": self.seed, "offset": self.step * _SITES + site, "first_row": self.first_row}
