"""Every operation's table of cases, for the tests and for `ttr-gpu bench kernels`."""

from __future__ import annotations

from .common.cases import Operation


def operations() -> list[Operation]:
    """All operations with a uniform forward/backward, in alphabetical order."""
    from .rms_norm.cases import OPERATION as rms_norm

    return [rms_norm]
