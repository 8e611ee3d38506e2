"""Where a run stands: with weights and moments, all that resuming needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .loss_scale import LossScale


@dataclass
class Progress:
    """Saved as a checkpoint's state.json.

    Attributes:
        stale: evaluations since the best one.
        evaluated_step: the last step after which the validation split was evaluated to its end.
        computed_on: "device", "processes" and "threads": where others compute, results are the same to rounding alone.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    evaluated_step: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    computed_on: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """As a checkpoint records it."""
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> Progress:
        """From a checkpoint; what one of an earlier release lacks keeps its default."""
        known = {name: state[name] for name in Progress.__dataclass_fields__ if name in state}
        known["loss_scale"] = LossScale(**state.get("loss_scale", {}))
        return Progress(**known)
