"""What is said of the processor."""

import pytest

from ttr_kernels.common.processor import processor


@pytest.mark.parametrize(("flags", "said"), [
    ("fpu avx2 avx512f avx512_bf16 amx_tile", "Xeon (AVX-512, bfloat16, AMX)"),
    ("fpu avx2 avx512f avx512_bf16", "Xeon (AVX-512, bfloat16)"),
    ("fpu avx2", "Xeon (AVX2)"),
    ("fpu", "Xeon"),
])  # fmt: skip
def test_instructions_that_decide_how_matrices_are_multiplied(flags, said, tmp_path):
    information = tmp_path / "cpuinfo"
    information.write_text(f"processor\t: 0\nmodel name\t: Xeon\nflags\t\t: {flags}\n\n")
    assert processor(information) == said


def test_no_description(tmp_path):
    assert processor(tmp_path / "missing")
