"""Dynamic loss scaling (Micikevicius et al. 2018, *Mixed Precision Training*, §3.2), which float16 gradients need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """The factor of the loss, and so of every gradient until the optimizer divides by it.

    It doubles after `growth_steps` steps without overflow. A step whose gradients overflow changes no weight and halves
    it. Factors are powers of two, so that multiplying and dividing rounds nothing.

    Attributes:
        value: the factor of the next step.
        growth_steps: steps without overflow before it doubles; 0: it never changes (float32 and bfloat16, at 1).
        good_steps: steps since the last change.
        skipped: steps that overflowed.
    """

    value: float = 1.0
    growth_steps: int = 0
    good_steps: int = 0
    skipped: int = 0

    @property
    def dynamic(self) -> bool:
        """Whether it adapts: whether the run is in float16."""
        return self.growth_steps > 0

    def succeeded(self) -> None:
        """A step's gradients were finite."""
        if not self.dynamic:
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_steps:
            # Beyond this, float32 gradients would overflow before the factor is found too large.
            self.value, self.good_steps = min(2.0 * self.value, 2.0**24), 0

    def overflowed(self) -> bool:
        """A step's gradients were not; whether a smaller factor may help, so that the step is to be skipped."""
        if not self.dynamic or self.value <= 1.0:
            return False
        self.value, self.good_steps = self.value / 2.0, 0
        self.skipped += 1
        return True
