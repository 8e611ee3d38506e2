"""The first minutes with a GPU: what every kernel stands on, then all tests for GPUs, then figures, into one file."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.backend import Backend, choose_backend, gpu_facts
from ttr_gpu.config import PRESETS, ModelConfig
from ttr_gpu.data.batches import Batch
from ttr_gpu.errors import UserError
from ttr_gpu.model import TransformerModel
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.optimizer import Optimizer
from ttr_gpu.train.plan import measure_gemm_peak
from ttr_gpu.train.step_graph import StepGraphs
from ttr_kernels.attention import TimeBias, attention_backward, attention_forward
from ttr_kernels.common.arrays import BFLOAT16

from .harness import RESULTS, write_result

ROOT = Path(__file__).parents[1]
# In this order: layouts of fragments come first, since all kernels stand on them.
TESTS = {
    "layouts of mma, ldmatrix and cp.async": ["tests/emulator/test_semantics.py"],
    "kernels": ["tests/kernels"],
    "model and training": ["tests/ttr_gpu", "tests/cli/test_bench_on_a_gpu.py"],
}
BIASES = ("none", "linear", "log")


class NoGpu(click.ClickException):
    """As for a wrong argument, which another run would not mend."""

    exit_code = 2


@click.command()
@click.option("--only", type=click.Choice(["tests", "figures"]), help="Default: both.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="The median counts.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; pictures are put beside it."
)
def gpu(only: str | None, repeats: int, output: Path | None) -> None:
    """Run the tests for GPUs, the kernels' fragment layouts first, and measure kernels, attention and training."""
    try:
        backend = choose_backend("gpu")
    except UserError as error:
        what = str(error).removeprefix("--device: got gpu, but ").removesuffix("; or use --device cpu")
        raise NoGpu(f"there is no GPU to run on: {what}") from None
    facts = gpu_facts(backend)
    for name, value in facts.items():
        print(f"{name:<11} {value}")
    name = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].partition(",")[0].lower()).strip("-")
    output = output or RESULTS / f"gpu-{name}-{time.strftime('%Y-%m-%d')}.json"
    result: dict[str, Any] = {"gpu": facts}
    if only != "figures":
        result["tests"] = run_tests()
    if only != "tests":
        result |= figures(backend, repeats, output)
    write_result(output, "gpu", result, "cupy-cuda13x", "cupy-cuda12x", "nvmath-python")
    failed = [name for name, ended in result.get("tests", {}).items() if ended["code"] != 0]
    if failed:
        raise click.ClickException(f"tests failed: {', '.join(failed)}")


def run_tests(tests: dict[str, list[str]] = TESTS) -> dict[str, Any]:
    """What pytest said of each group; nothing further where the first fails."""
    ended: dict[str, Any] = {}
    for name, paths in tests.items():
        print(f"-- {name}: pytest -m gpu {' '.join(paths)}", flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", *paths]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = done.stdout.strip().splitlines() or [""]
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        ended[name] = {"code": done.returncode, "said": lines[-1], "failed": failures,
                       "seconds": time.monotonic() - begin}  # fmt: skip
        print(*(lines if done.returncode else lines[-1:]), sep="\n", flush=True)
        if done.returncode and len(ended) == 1:
            print("nothing else can be right while these fail: see docs/BUILD_GPU.md")
            break
    return ended


def figures(backend: Backend, repeats: int, output: Path) -> dict[str, Any]:
    """Each part's figures, or what kept it from them."""
    parts: dict[str, Callable[[], Any]] = {
        "matrix_product_flops_per_second": lambda: measure_gemm_peak(backend, BFLOAT16),
        "kernels": lambda: kernels(output.with_name(f"{output.stem}-kernels.png")),
        "attention": lambda: attention(backend, repeats),
        "steps": lambda: steps(backend, repeats),
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        print(f"-- {name}", flush=True)
        try:
            found[name] = part()
        except Exception as error:  # what comes after it may still be measured
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(found[name]["failed"])
    return found


def kernels(picture: Path) -> Any:
    """`ttr-gpu bench kernels --device gpu`."""
    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder) / "kernels.json"
        command = [sys.executable, "-c", "import sys; from ttr_cli.main import main; sys.exit(main())"]
        subprocess.run([*command, "bench", "kernels", "--device", "gpu", "--output", timings], cwd=ROOT, check=True)
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(timings.with_suffix(".png").read_bytes())
        return json.loads(timings.read_text())


def attention(
    backend: Backend, repeats: int, *, tokens: int = 16384, lengths: tuple[int, ...] = (2048, 4096, 8192),
    heads: int = 16, dim: int = 128,
) -> list[dict[str, Any]]:  # fmt: skip
    """bfloat16, causal: floating-point operations per second, counted as in the FlashAttention papers: 4 B H S² D / 2
    forward, 2.5 times that backward."""
    rows = []
    for length in lengths:
        for bias in BIASES:
            forward, backward = _attention_calls(backend, (tokens // length, length, heads, dim), bias)
            flops = 4.0 * (tokens // length) * heads * length**2 * dim / 2
            rate = flops / seconds_of(backend, forward, repeats)
            rate_backward = 2.5 * flops / seconds_of(backend, backward, repeats)
            rows.append({"length": length, "bias": bias, "forward": rate, "backward": rate_backward})
            print(f"S={length:<6} bias {bias:<7} forward {rate / 1e12:6.1f} TFLOP/s   "
                  f"backward {rate_backward / 1e12:6.1f}", flush=True)  # fmt: skip
    return rows


def _attention_calls(
    backend: Backend, shape: tuple[int, int, int, int], bias: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward into given arrays."""
    rng, put, heads = np.random.default_rng(0), backend.put, shape[2]
    q, k, v, dout = (put(rng.standard_normal(shape, np.float32)).astype(BFLOAT16) for _ in range(4))
    options: dict[str, Any] = {}
    if bias != "none":
        rate, tau = put(np.full(heads, 0.3, np.float32)), put(np.full(heads, 50.0, np.float32))
        times = put(np.cumsum(rng.exponential(1.0, shape[:2]), axis=1))
        options = {"times": times, "time_bias": TimeBias(rate, tau, bias)}
    out, saved = attention_forward(q, k, v, **options)
    dq, dk, dv, _ = attention_backward(dout, saved)
    return (
        lambda: attention_forward(q, k, v, out=out, **options),
        lambda: attention_backward(dout, saved, dq=dq, dk=dk, dv=dv),
    )


def steps(
    backend: Backend, repeats: int, *, length: int = 1024, sequences: int = 16, model: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A training step of a model of GPT-2's size in bfloat16: tokens per second, launched kernel by kernel and replayed
    as a graph."""
    shape: Any = PRESETS["gpt2"] if model is None else model
    config = ModelConfig(vocabulary_size=50257, precision="bfloat16", **shape)
    rows, tokens = [], length * sequences
    for way in ("launched", "replayed"):
        graphs, trained, step = _steps(backend, config, length, sequences, capture=way == "replayed")
        for _ in range(3):  # compiled, captured, replayed
            step()
        seconds = seconds_of(backend, step, repeats, calls=3)
        rate, memory = trained.flops(_batch(config.vocabulary_size, length, sequences)) / seconds, backend.used_bytes()
        rows.append({"steps": way, "tokens_per_second": tokens / seconds, "flops_per_second": rate, "bytes": memory,
                     "replayed": graphs.replayed})  # fmt: skip
        print(f"{way:<9} {tokens / seconds:12,.0f} tokens/s   {rate / 1e12:6.1f} TFLOP/s   {memory / 2**30:.1f} GiB",
              flush=True)  # fmt: skip
        del graphs, trained, step
    return rows


def _steps(
    backend: Backend, config: ModelConfig, length: int, sequences: int, *, capture: bool
) -> tuple[StepGraphs, TransformerModel, Callable[[], None]]:
    tokens = length * sequences
    run = RunConfig(model=config, train=TrainConfig(tokens_per_batch=tokens, max_length=length))
    model = TransformerModel(config, backend=backend)
    graphs = StepGraphs(
        model, Optimizer(model, run.train), run, run.recompute, joint=False, dynamic=False, say=print, capture=capture
    )
    batch, updates = _batch(config.vocabulary_size, length, sequences), itertools.count(1)
    return graphs, model, lambda: _step(graphs, batch, next(updates))


def _step(graphs: StepGraphs, batch: Batch, update: int) -> None:
    tokens = len(batch.tokens)
    graphs.step([(batch, tokens)], tokens, 1.0, update, 1e-4)


def _batch(vocabulary: int, length: int, sequences: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, length * sequences + 1).astype(np.int32)
    times = np.cumsum(rng.exponential(1.0, (sequences, length)), axis=1).reshape(-1)
    starts = np.arange(sequences + 1, dtype=np.int32) * np.int32(length)
    return Batch(tokens[:-1], times, starts, tokens[1:], times + 1.0, np.arange(sequences), starts[:-1], 0, 0)


def seconds_of(backend: Backend, call: Callable[[], Any], repeats: int, calls: int = 10) -> float:
    """The median of some calls together, divided by how many they were."""
    taken = []
    for _ in range(1 + repeats):
        backend.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        backend.synchronize()
        taken.append((time.perf_counter() - begin) / calls)
    return statistics.median(taken[1:])
