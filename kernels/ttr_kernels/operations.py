"""Every operation's table of cases, for the tests and for `ttr-gpu bench kernels`."""

from __future__ import annotations

from .attention.cases import OPERATION as ATTENTION
from .common.cases import Operation
from .rms_norm.cases import OPERATION as RMS_NORM

# In alphabetical order; an operation is listed by adding its two lines here.
OPERATIONS: list[Operation] = [
    ATTENTION,
    RMS_NORM,
]
