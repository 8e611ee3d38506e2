"""Every operation's table of cases, for the tests and for `ttr-gpu bench kernels`."""

from __future__ import annotations

from .attention.cases import OPERATION as ATTENTION
from .common.cases import Operation
from .cross_entropy.cases import LINEAR_OPERATION as LINEAR_CROSS_ENTROPY
from .cross_entropy.cases import OPERATION as CROSS_ENTROPY
from .decode_attention.cases import OPERATION as DECODE_ATTENTION
from .dropout_add.cases import OPERATION as DROPOUT_ADD
from .embedding.cases import OPERATION as EMBEDDING
from .geglu.cases import OPERATION as GEGLU
from .layer_norm.cases import OPERATION as LAYER_NORM
from .linear_attention.cases import OPERATION as LINEAR_ATTENTION
from .log_normal_mixture.cases import OPERATION as LOG_NORMAL_MIXTURE
from .matmul.cases import OPERATION as MATMUL
from .rms_norm.cases import OPERATION as RMS_NORM
from .rope.cases import OPERATION as ROPE
from .time2vec.cases import OPERATION as TIME2VEC

# In alphabetical order; an operation is listed by adding its two lines here.
OPERATIONS: list[Operation] = [
    ATTENTION,
    CROSS_ENTROPY,
    DECODE_ATTENTION,
    DROPOUT_ADD,
    EMBEDDING,
    GEGLU,
    LAYER_NORM,
    LINEAR_ATTENTION,
    LINEAR_CROSS_ENTROPY,
    LOG_NORMAL_MIXTURE,
    MATMUL,
    RMS_NORM,
    ROPE,
    TIME2VEC,
]
