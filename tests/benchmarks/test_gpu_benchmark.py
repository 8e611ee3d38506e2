"""`python -m benchmarks gpu`: without a GPU one clear line; its figures on the stand-in for CuPy, at small sizes."""

import sys

import pytest
from click.testing import CliRunner

from benchmarks import gpu as benchmark
from ttr_gpu import backend as backends

TINY = {"embed_dim": 16, "hidden_dim": 16, "num_layers": 1, "num_heads": 2}


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(backends, "_lacking", lambda: "no CUDA device is visible: look at nvidia-smi")
    ended = CliRunner().invoke(benchmark.gpu)
    assert ended.exit_code == 2
    assert ended.output == "Error: there is no GPU to run on: no CUDA device is visible: look at nvidia-smi\n"


def test_attention_is_measured(gpu):
    rows = benchmark.attention(gpu, 1, tokens=64, lengths=(32, 64), heads=1, dim=16)
    assert [(row["length"], row["bias"]) for row in rows] == [(s, b) for s in (32, 64) for b in benchmark.BIASES]
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in rows)


def test_steps_are_measured_launched_and_replayed(gpu):
    launched, replayed = benchmark.steps(gpu, 1, length=16, sequences=2, model=TINY)
    assert (launched["steps"], launched["replayed"]) == ("launched", 0)
    # The first is computed, the second captured.
    assert (replayed["steps"], replayed["replayed"]) == ("replayed", 2 + 2 * 3)
    assert all(row["tokens_per_second"] > 0 and row["flops_per_second"] > 0 for row in (launched, replayed))


def test_what_fails_is_written_down_and_the_rest_measured(gpu, monkeypatch, tmp_path):
    def failing(*_):
        raise MemoryError("all of it")

    monkeypatch.setattr(benchmark, "measure_gemm_peak", lambda *_: 1e12)
    monkeypatch.setattr(benchmark, "kernels", lambda picture: {"timings": []})
    monkeypatch.setattr(benchmark, "attention", failing)
    monkeypatch.setattr(benchmark, "steps", lambda *_: [])
    assert benchmark.figures(gpu, 1, tmp_path / "gpu.json") == {
        "matrix_product_flops_per_second": 1e12, "kernels": {"timings": []},
        "attention": {"failed": "MemoryError: all of it"}, "steps": [],
    }  # fmt: skip


def test_tests_are_run_and_their_end_is_kept(tmp_path):
    (tmp_path / "test_good.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_one(): pass\ndef test_two(): 1 / 0\n"
    )
    (tmp_path / "test_bad.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_bad(): assert 0\n")
    good, bad = ([str(tmp_path / name)] for name in ("test_good.py", "test_bad.py"))
    ended = benchmark.run_tests({"first": good, "second": bad, "third": good})
    assert [each["code"] for each in ended.values()] == [0, 1, 0]
    assert ended["first"]["said"].startswith("1 passed, 1 deselected")
    assert len(ended["second"]["failed"]) == 1
    assert list(benchmark.run_tests({"first": bad, "second": good})) == ["first"]


@pytest.mark.parametrize("paths", benchmark.TESTS.values())
def test_every_group_has_tests_for_gpus(paths):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only", "-p", "no:cacheprovider", *paths]
    done = benchmark.subprocess.run(command, cwd=benchmark.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
