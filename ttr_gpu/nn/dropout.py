"""The key from which every dropout mask of a step follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ttr_kernels.common.arrays import Array

# Places in a model where dropout draws: a step leaves room for this many.
_SITES = 1 << 20


@dataclass(frozen=True)
class DropoutKey:
    """With a site's number, all that a mask depends on.

    Attributes:
        seed: of a run.
        step: number of the forward pass, below 2^44.
        first_row: of what is computed here, in the batch: a batch divided among processes has the masks of the whole.
        offset_at: on a GPU, a number there that is added to `at(site)["offset"]`: in a step that is captured once, and
            whose own number is 0.
    """

    seed: int
    step: int
    first_row: int = 0
    offset_at: Array | None = None

    def at(self, site: int) -> dict[str, Any]:
        """What an operation draws with at one place in the model, 0 <= site < 2^20: seed, offset, first_row and
        offset_at."""
        offset = self.step * _SITES + site
        return {"seed": self.seed, "offset": offset, "first_row": self.first_row, "offset_at": self.offset_at}
