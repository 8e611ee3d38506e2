"""The numba.cuda versions, in numba's simulator: asked for before numba is imported, hence another process."""

import os
import subprocess
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest

from ttr_kernels.common.cuda.choice import numba_kernels_chosen, use_numba_kernels

CASES = Path(__file__).with_name("in_simulator.py")


# Sums for the gradient of a bias are CUDA C++ either way.
@pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))
def test_in_the_simulator():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["NUMBA_ENABLE_CUDASIM"] = "1"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = next(line for line in run.stdout.splitlines() if " passed" in line)
    assert "skipped" not in passed, run.stdout
    print(passed)


def test_the_choice_ends_with_its_block():
    assert not numba_kernels_chosen()
    with use_numba_kernels():
        assert numba_kernels_chosen()
        with use_numba_kernels(False):
            assert not numba_kernels_chosen()
        assert numba_kernels_chosen()
    with pytest.raises(KeyError), use_numba_kernels():
        raise KeyError
    assert not numba_kernels_chosen()


def test_importing_operations_does_not_import_numba_cuda():
    code = "import sys, ttr_kernels.rope.gpu, ttr_kernels.geglu.gpu; print('numba.cuda' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.gpu
def test_on_a_gpu_both_versions_agree():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("no GPU that numba.cuda can use")
    import operation_checks as checks

    from ttr_kernels.geglu import geglu_backward, geglu_forward
    from ttr_kernels.rope import rope_backward, rope_cos_sin, rope_forward

    rng = np.random.default_rng(0)
    for dtype in checks.DTYPES.values():
        x = cupy.asarray(rng.standard_normal((33, 4, 64)).astype(dtype))
        wide = cupy.asarray(rng.standard_normal((33, 512)).astype(dtype))
        bias = cupy.asarray(rng.standard_normal(512).astype(np.float32))
        table = rope_cos_sin(cupy.arange(33) * 7919, 64)

        def results(x=x, wide=wide, bias=bias, table=table):
            turned, rope_saved = rope_forward(x, table)
            y, saved = geglu_forward(wide, bias)
            return turned, rope_backward(x, rope_saved), y, *geglu_backward(y, saved)

        with use_numba_kernels():
            from_numba = results()
        for got, want in zip(from_numba, results(), strict=True):
            checks.assert_close("result", cupy.asnumpy(got), cupy.asnumpy(want), 2 * checks.ERROR[dtype])
