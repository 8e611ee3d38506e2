"""Every operation's table of cases, for the tests and for `ttr-gpu bench kernels`."""

from __future__ import annotations

from .attention.cases import OPERATION as ATTENTION
from .common.cases import Operation
from .dropout_add.cases import OPERATION as DROPOUT_ADD
from .geglu.cases import OPERATION as GEGLU
from .matmul.cases import OPERATION as MATMUL
from .rms_norm.cases import OPERATION as RMS_NORM
from .rope.cases import OPERATION as ROPE

# In alphabetical order; an operation is listed by adding its two lines here.
OPERATIONS: list[Operation] = [
    ATTENTION,
    DROPOUT_ADD,
    GEGLU,
    MATMUL,
    RMS_NORM,
    ROPE,
]
