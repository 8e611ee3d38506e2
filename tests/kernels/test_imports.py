"""What an import costs: nothing of the model, no other framework, and no compiler before a kernel is called."""

import subprocess
import sys
from pathlib import Path

import pytest

import ttr_kernels

OPERATIONS = sorted(path.parent.name for path in Path(ttr_kernels.__file__).parent.glob("*/reference.py"))


def loaded_by(statement):
    script = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stdout.split())


def test_the_package_alone_loads_nothing():
    assert not loaded_by("import ttr_kernels") & {"numpy", "ml_dtypes", "numba", "ttr_gpu", "ttr_cli", "torch", "cupy"}


def test_operations_are_found():
    assert {"attention", "rope", "cross_entropy"} <= set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_loads_numpy_alone(operation):
    loaded = loaded_by(f"import ttr_kernels.{operation}")
    assert "numpy" in loaded
    assert not loaded & {"numba", "llvmlite", "ttr_gpu", "ttr_cli", "torch", "cupy", "jax", "threadpoolctl"}


def test_float64_needs_no_compiler():
    call = "import numpy as np; from ttr_kernels.rms_norm import rms_norm; rms_norm(np.ones((2, 3)), np.ones(3))"
    assert "numba" not in loaded_by(call)
