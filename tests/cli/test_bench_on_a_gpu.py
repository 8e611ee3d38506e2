"""`ttr-gpu bench kernels --device gpu` from the command to its files, on the stand-in for CuPy (`-m gpu`: on a GPU),
with small cases in place of those that are timed."""

import dataclasses
import functools
import importlib.util
import json
import sys
from types import ModuleType

import pytest

from ttr_gpu.train import plan
from ttr_kernels import benchmark
from ttr_kernels.operations import OPERATIONS


def small(operation):
    """The operation with its last case of those that are not timed, which has the most inputs, as the one that is."""
    case = [case for case in operation.cases if not case.timed][-1]
    return dataclasses.replace(operation, cases=[dataclasses.replace(case, timed=True, flops=1e4)])


@pytest.fixture
def tiny(monkeypatch):
    has_kernels = [
        operation for operation in OPERATIONS
        if importlib.util.find_spec(f"{operation.forward.__module__.removesuffix('.cases')}.gpu")
    ]  # fmt: skip
    monkeypatch.setattr(benchmark, "OPERATIONS", [small(operation) for operation in has_kernels])
    monkeypatch.setattr(benchmark, "_PARAMETERS", 3000)
    of_gpu = benchmark.gpu
    monkeypatch.setattr(benchmark, "gpu", lambda cupy: of_gpu(cupy)._replace(calls=2))
    monkeypatch.setattr(plan, "measure_gemm_peak", functools.partial(plan.measure_gemm_peak, size=64, repeats=1))
    # The bindings of cuBLAS, which the stand-in does without.
    monkeypatch.setitem(sys.modules, "nvmath", sys.modules.get("nvmath", ModuleType("nvmath")))
    return has_kernels


def test_every_operation_is_timed_and_written_down(ttr, cupy, tiny, tmp_path):
    result = ttr("bench", "kernels", "--device", "gpu", "--repeats", "1", "--output", tmp_path / "on" / "gpu.json")
    assert result.code == 0, result.err
    header, *lines, last = result.out.splitlines()
    assert header.split() == ["operation", "case", "part", "ms", "GB/s", "GFLOP/s", "of", "limit"]
    expected = [
        (operation.name, part)
        for operation in tiny
        for part in (["forward"] if operation.backward is None else ["forward", "backward"])
    ]
    expected += [(name, "update") for name in benchmark.UPDATES]
    assert {"attention", "linear_cross_entropy", "rms_norm"} <= {name for name, _ in expected}
    timings = json.loads((tmp_path / "on" / "gpu.json").read_text())
    assert [(timing["operation"], timing["part"]) for timing in timings["timings"]] == expected
    assert [line.split()[0] for line in lines] == [name for name, _ in expected]
    assert all(line.endswith(" %") for line in lines)
    assert all(timing["seconds"] > 0 and timing["copy_seconds"] > 0 for timing in timings["timings"])
    assert timings["device"] == "gpu"
    assert timings["device_name"].startswith("GPU 0, ")
    assert timings["matrix_product_flops_per_second"] > 0
    assert (tmp_path / "on" / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert last == f"written: {tmp_path / 'on' / 'gpu.json'}, {tmp_path / 'on' / 'gpu.png'}"
    assert "a copy of the bytes of activations and results" in result.err
    again = ttr("bench", "--device", "gpu", "--repeats", "1", "--only", "rope", "--compare", tmp_path / "on/gpu.json")
    assert again.code == 0, again.err
    assert again.out.splitlines()[0].endswith("over earlier")
