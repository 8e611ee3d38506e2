"""The processor's name, and which of its instructions decide how fast matrices are multiplied."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

# As /proc/cpuinfo calls them, and we do; the first of the vectors that is there.
_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}
_MATRICES = {"avx512_bf16": "bfloat16", "amx_tile": "AMX"}


@functools.cache
def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """Such as "Intel(R) Xeon(R) Processor (AVX-512, bfloat16, AMX)": virtual machines hide instructions."""
    try:
        lines = information.read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    vectors = next((text for flag, text in _VECTORS.items() if flag in flags), None)
    found = [text for text in (vectors, *(text for flag, text in _MATRICES.items() if flag in flags)) if text]
    return f"{name} ({', '.join(found)})" if found else name
