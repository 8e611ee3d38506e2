"""Every operation beside PyTorch's, eager and compiled: forward, and forward with backward, in float32."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from .harness import Call, Contender, Spread, compare_option, machine, report, result_file, take_turns
from .step import find_packages
from .step_sides import COMPILED, EAGER, OURS

# Attention over more positions than the tests' table: (sequences, length).
ATTENTION = ((8, 256), (2, 1024), (1, 4096))
PEERS = ("attention", "cross_entropy", "linear_cross_entropy", "geglu", "rms_norm", "layer_norm", "rope", "time2vec",
         "matmul")  # fmt: skip
# What the results may differ by, as a share of the largest.
AGREEMENT = 1e-4


def cases(only: tuple[str, ...]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, operation, inputs): the timed cases of operations that have a peer, in float32."""
    from ttr_kernels.operations import OPERATIONS

    for operation in OPERATIONS:
        if operation.name not in PEERS or (only and operation.name not in only):
            continue
        made = [(case.name, case.make(np.random.default_rng(0))) for case in operation.cases if case.timed]
        if operation.name == "attention":
            made = [(f"{b}x{t}, log bias", _attention(b, t)) for b, t in ATTENTION]
        for case, inputs in made:
            for name in (*operation.activations, *operation.parameters):
                if isinstance(inputs.get(name), np.ndarray):
                    inputs[name] = inputs[name].astype(np.float32)
            yield f"{operation.name} {case}", operation, inputs


def _attention(sequences: int, length: int, heads: int = 8, dim: int = 32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((sequences, length, heads, dim)) for _ in range(3))
    times = np.cumsum(rng.exponential(1.0, (sequences, length)), axis=1)
    rate, tau = 2.0 ** -np.arange(1.0, heads + 1), np.ones(heads)
    return {"q": q, "k": k, "v": v, "times": times, "key_times": times, "rate": rate, "tau": tau, "kind": "log"}


def make_ours(only: tuple[str, ...], threads: int) -> Callable[[], dict[str, Any]]:
    """Times every case once a call."""
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    pairs = {}
    for name, operation, inputs in cases(only):
        y, _ = operation.forward(**inputs)
        dy: Any = np.ones(np.shape(y), np.float32) if np.ndim(y) else 1.0
        # Results are there, as in a training step.
        given = {"out": np.empty_like(y)} if np.ndim(y) else {}

        def both(operation: Any = operation, inputs: Any = inputs, dy: Any = dy, given: Any = given) -> Any:
            y, saved = operation.forward(**inputs, **given)
            operation.backward(dy, saved)
            return y

        def forward(operation: Any = operation, inputs: Any = inputs, given: Any = given) -> Any:
            return operation.forward(**inputs, **given)[0]

        pairs[name] = forward, both
    return lambda: _timings(pairs, np.asarray)


def make_peer(only: tuple[str, ...], threads: int, compiled: bool) -> Callable[[], dict[str, Any]]:
    """The same by PyTorch."""
    import torch

    from .peers.torch_operations import OPERATIONS

    torch.set_num_threads(threads)
    pairs = {}
    for name, operation, inputs in cases(only):
        given: dict[str, Any] = {}
        for key, value in inputs.items():
            if key == "table":
                given["cos"], given["sin"] = torch.from_numpy(value.cos), torch.from_numpy(value.sin)
            elif isinstance(value, np.ndarray):
                given[key] = torch.from_numpy(value)
                if key in operation.gradients:
                    given[key].requires_grad_()
                if key == "targets":
                    given[key] = given[key].long()
            elif value is not None:
                given[key] = value
        function: Any = OPERATIONS[operation.name]
        function = torch.compile(function, dynamic=False) if compiled else function
        dy = torch.ones_like(function(**given))

        def both(function: Any = function, given: Any = given, dy: Any = dy) -> Any:
            for value in given.values():
                if isinstance(value, torch.Tensor):
                    value.grad = None
            y = function(**given)
            y.backward(dy)
            return y

        def forward(function: Any = function, given: Any = given) -> Any:
            return function(**given)

        pairs[name] = forward, both
    return lambda: _timings(pairs, lambda y: y.detach().numpy())


def _timings(pairs: dict[str, Any], to_numpy: Callable[[Any], Any], repeats: int = 3) -> dict[str, Any]:
    """Seconds of the forward and of both, the best of some; and a few numbers of the result, to compare."""
    found = {}
    for name, (forward, both) in pairs.items():
        seconds = []
        for function in (forward, both):
            best = float("inf")
            for _ in range(repeats):
                begin = time.perf_counter()
                y = function()
                best = min(best, time.perf_counter() - begin)
            seconds.append(best)
        found[name] = (*seconds, to_numpy(y).reshape(-1)[:64].astype(float).tolist())
    return found


@click.command()
@click.option("--only", type=click.Choice(PEERS), multiple=True, help="Only this operation; may be repeated.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=7, show_default=True, help="Turns of each side.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a PNG is put beside it.")
@compare_option
def kernels(only: tuple[str, ...], threads: int | None, turns: int, output: Path | None, compare: Path | None) -> None:
    """Time operations beside PyTorch's, in turns."""
    threads = threads or machine()["cores"]
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(Contender(OURS, make_ours, only, threads))]
        if find_packages():
            for name, compiled in ((EAGER, False), (COMPILED, True)):
                contenders.append(stack.enter_context(Contender(name, make_peer, only, threads, compiled)))
        first = {contender.name: contender.call(2)[0].value for contender in contenders}
        check_agreement(first)
        timed = take_turns(contenders, turns=turns, calls=1)
    result = {"threads": threads, "sides": summarize([c.name for c in contenders], timed)}
    print_table(result)
    output = output or result_file("kernels")
    report(output, "kernels", result, compare, "torch")
    draw(output.with_suffix(".png"), result)


def check_agreement(first: dict[str, dict[str, Any]]) -> None:
    """All sides must compute the same: otherwise their times say nothing."""
    for case, (_, _, ours) in first[OURS].items():
        for side, found in first.items():
            difference = np.abs(np.subtract(found[case][2], ours)).max()
            if not difference <= AGREEMENT * max(np.abs(ours).max(), 1.0):
                raise click.ClickException(f"{case}: the results of {OURS} and {side} differ by {difference:.1e}")


def summarize(names: list[str], timed: list[list[list[Call]]]) -> dict[str, Any]:
    """By "<case>, <part>, <side>": the spread of its seconds, and that of its time over ours, turn by turn."""
    sides = {}
    for case in timed[0][0][0].value:
        for index, part in enumerate(("forward", "forward and backward")):
            seconds = [[turn[0].value[case][index] for turn in turns] for turns in timed]
            for name, values in zip(names, seconds, strict=True):
                over = Spread.of([a / b for a, b in zip(values, seconds[0], strict=True)])
                sides[f"{case}, {part}, {name}"] = {
                    "case": case, "part": part, "side": name, "seconds": Spread.of(values)._asdict(),
                    "over_ours": over._asdict(),
                }  # fmt: skip
    return sides


def print_table(result: dict[str, Any]) -> None:
    """A line for each case and part: our time, and the peers' over it."""
    print(f"float32, {result['threads']} threads, {machine()['cpu']}; PyTorch's time over ours (quartiles)")
    print(f"{'':<46} {'':<21} {'ours':>10} {'eager':>20} {'compiled':>20}")
    for row, sides in _rows(result).items():
        ours, *peers = sides
        beside = [f"{s['median']:.2f} ({s['lower']:.2f} – {s['upper']:.2f})" for s in (p["over_ours"] for p in peers)]
        print(f"{row[0]:<46} {row[1]:<21} {1e3 * ours['seconds']['median']:>7.3f} ms "
              + " ".join(f"{text:>20}" for text in beside))  # fmt: skip


def _rows(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for side in result["sides"].values():
        rows.setdefault((side["case"], side["part"]), []).append(side)
    return rows


def draw(path: Path, result: dict[str, Any]) -> None:
    """How many times as long the faster of PyTorch's two takes, for each case, with its backward."""
    from matplotlib.figure import Figure

    bars = {}
    for (case, part), (_, *peers) in _rows(result).items():
        if part == "forward and backward" and peers:
            bars[case] = min((peer["over_ours"] for peer in peers), key=lambda spread: spread["median"])
    if not bars:
        return
    medians = [spread["median"] for spread in bars.values()]
    errors = [[abs(s["median"] - s[end]) for s in bars.values()] for end in ("lower", "upper")]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(bars), medians, xerr=errors, color="tab:blue", capsize=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvline(statistics.geometric_mean(medians), color="tab:orange", linestyle="--", label="geometric mean")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("PyTorch's time over ours: eager or compiled, the faster")
    axes.set_title(f"forward and backward, float32, {result['threads']} threads, {machine()['cpu']}", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
