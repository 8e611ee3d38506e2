"""Peak memory of attention over a long sequence, forward and backward, beside the T×S matrix that it never makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from .harness import Contender, machine, peak_memory, reset_peak_memory, result_file, write_result

HEADS, DIM = 8, 32
MIB = 1 << 20


def make_measurement(length: int, threads: int) -> Callable[[], dict[str, Any]]:
    """Inputs made, kernels compiled on a short sequence: what is left is to run and to look at the peak."""
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    _run(_inputs(64))
    inputs = _inputs(length)

    def measure() -> dict[str, Any]:
        before, method = reset_peak_memory()
        results = _run(inputs)
        return {
            "peak_bytes": peak_memory(method) - before, "result_bytes": sum(array.nbytes for array in results),
            "method": method,
        }  # fmt: skip

    return measure


def _inputs(length: int) -> dict[str, Any]:
    from ttr_kernels.attention import TimeBias

    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, length, HEADS, DIM), np.float32) for _ in range(4))
    rate, tau = np.full(HEADS, 0.5, np.float32), np.ones(HEADS, np.float32)
    times = np.cumsum(rng.exponential(1.0, (1, length)), axis=1)
    return {"q": q, "k": k, "v": v, "times": times, "time_bias": TimeBias(rate, tau, "log"), "dout": dout}


def _run(inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    from ttr_kernels.attention import attention_backward, attention_forward

    forward = {name: value for name, value in inputs.items() if name != "dout"}
    out, saved = attention_forward(**forward)
    dq, dk, dv, _ = attention_backward(inputs["dout"], saved)
    return [out, saved.log_normalizer, dq, dk, dv]


@click.command("attention-memory")
@click.option("--length", type=click.IntRange(min=64), default=8192, show_default=True, help="Positions T = S.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; default: all cores.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
def attention_memory(length: int, threads: int | None, output: Path | None) -> None:
    """Peak memory of attention, forward and backward, with a log time bias and 8 heads of 32."""
    threads = threads or machine()["cores"]
    with Contender("attention", make_measurement, length, threads) as contender:
        measured = contender.call(1)[0].value
    matrices = 4 * HEADS * length * length
    result = {
        "length": length, "heads": HEADS, "head_dim": DIM, "threads": threads, **measured, "matrix_bytes": matrices,
        "matrix_over_peak": matrices / measured["peak_bytes"],
    }  # fmt: skip
    peak, results, weights = (size / MIB for size in (measured["peak_bytes"], measured["result_bytes"], matrices))
    print(f"attention of {length} positions, {HEADS} heads of {DIM}, log time bias, forward and backward:")
    print(f"  peak beyond the inputs   {peak:8.1f} MiB, of which results {results:.1f} MiB ({measured['method']})")
    print(f"  float32 T×S of all heads {weights:8.1f} MiB, {weights / peak:.0f} times the peak")
    write_result(output or result_file("attention-memory"), "attention-memory", result)
