"""What `benchmarks kernels` times: the cases, and who computes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypedDict

import numpy as np

from .harness import as_the_trainer_computes


class AdamWRates(TypedDict):
    """What every side's AdamW is given."""

    learning_rate: float
    weight_decay: float


NUMPY, COPY = "NumPy", "copy"
# Attention over more positions than the tests' table: (sequences, length).
ATTENTION = ((8, 256), (2, 1024), (1, 4096), (1, 8192))
# The longest that NumPy's, which makes several matrices of T x T for every head, is timed on.
NUMPY_LENGTH = 4096
PEERS = ("attention", "cross_entropy", "linear_cross_entropy", "geglu", "rms_norm", "layer_norm", "rope", "time2vec",
         "embedding", "matmul", "adamw")  # fmt: skip
# Parameters of an AdamW step: those of the preset `tiny`.
PARAMETERS = 6_300_000
ADAMW: AdamWRates = {"learning_rate": 1e-3, "weight_decay": 0.1}
# Turns in which everything is timed, however long it takes.
LEAST = 3
# A part's name, and what does it.
Parts = dict[str, Callable[[], Any]]


class Item(NamedTuple):
    """One timed case."""

    name: str
    operation: Any
    inputs: dict[str, Any]


def cases(only: tuple[str, ...]) -> Iterator[Item]:
    """The timed cases of operations that have a peer and a backward, in float32."""
    from ttr_kernels.benchmark import float32_inputs
    from ttr_kernels.common.cases import Case
    from ttr_kernels.operations import OPERATIONS

    for operation in OPERATIONS:
        if operation.name not in PEERS or (only and operation.name not in only):
            continue
        timed = [case for case in operation.cases if case.timed]
        if operation.name == "attention":
            timed = [Case(f"{b}x{t}, log bias", _attention(b, t)) for b, t in ATTENTION]
        for case in timed:
            yield Item(f"{operation.name} {case.name}", operation, float32_inputs(operation, case))


def _attention(sequences: int, length: int, heads: int = 8, dim: int = 32) -> Callable[..., dict[str, Any]]:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        q, k, v = (rng.standard_normal((sequences, length, heads, dim)) for _ in range(3))
        times = np.cumsum(rng.exponential(1.0, (sequences, length)), axis=1)
        rate, tau = 2.0 ** -np.arange(1.0, heads + 1), np.ones(heads)
        return {"q": q, "k": k, "v": v, "times": times, "key_times": times, "rate": rate, "tau": tau, "kind": "log"}

    return make


def _adamw_arrays(only: tuple[str, ...]) -> list[np.ndarray[Any, Any]]:
    """Parameter, gradient and both moments, or none of them if AdamW is not timed."""
    if only and "adamw" not in only:
        return []
    rng = np.random.default_rng(0)
    parameter, gradient = rng.standard_normal((2, PARAMETERS), np.float32)
    return [parameter, gradient, np.zeros_like(parameter), np.zeros_like(parameter)]


ADAMW_CASE = f"adamw {PARAMETERS / 1e6:.1f} M parameters"


def make_ours(only: tuple[str, ...], threads: int, seconds: float) -> Callable[[], dict[str, Any]]:
    """Times every case once a call; see `_timings`."""
    from ttr_kernels.adamw import adamw

    as_the_trainer_computes(threads)
    timed: dict[str, Parts] = {}
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

        timed[name] = {"forward": forward, "forward and backward": both}
    if arrays := _adamw_arrays(only):
        timed[ADAMW_CASE] = {"update": _stepping(lambda step: adamw(*arrays, step=step, **ADAMW), arrays[0])}
    return _timings(timed, np.asarray, seconds)


def _stepping(update: Callable[[int], Any], parameter: Any) -> Callable[[], Any]:
    """`update` with the numbers 1, 2, ...; -> the parameter."""
    step = 0

    def call() -> Any:
        nonlocal step
        step += 1
        update(step)
        return parameter

    return call


def make_numpy(only: tuple[str, ...], threads: int, seconds: float) -> Callable[[], dict[str, Any]]:
    """The same in NumPy, whose BLAS has all threads."""
    from threadpoolctl import threadpool_limits

    from .peers.numpy_operations import OPERATIONS, adamw

    threadpool_limits(threads)
    timed: dict[str, Parts] = {}
    for name, operation, inputs in cases(only):
        if operation.name == "attention" and inputs["q"].shape[1] > NUMPY_LENGTH:
            continue
        function: Any = OPERATIONS[operation.name]
        dy: Any = np.ones(np.shape(function(**inputs)[0]), np.float32)

        def both(function: Any = function, inputs: Any = inputs, dy: Any = dy) -> Any:
            y, backward = function(**inputs)
            backward(dy)
            return y

        def forward(function: Any = function, inputs: Any = inputs) -> Any:
            return function(**inputs)[0]

        timed[name] = {"forward": forward, "forward and backward": both}
    if arrays := _adamw_arrays(only):
        timed[ADAMW_CASE] = {"update": _stepping(lambda step: adamw(*arrays, step=step, **ADAMW), arrays[0])}
    return _timings(timed, np.asarray, seconds)


def make_copy(only: tuple[str, ...], threads: int, seconds: float) -> Callable[[], dict[str, Any]]:
    """Copies as many bytes as activations and results of each part have."""
    from ttr_kernels.benchmark import moved_bytes
    from ttr_kernels.common.conversion import copy_converted

    as_the_trainer_computes(threads)
    sizes = {}
    for name, operation, inputs in cases(only):
        forward, backward = moved_bytes(operation, inputs, operation.forward(**inputs)[0])
        sizes[name] = {"forward": forward, "forward and backward": forward + backward}
    if arrays := _adamw_arrays(only):
        # Four are read and three written.
        sizes[ADAMW_CASE] = {"update": 7 * arrays[0].nbytes}

    def copying(size: int) -> Callable[[], Any]:
        source = np.ones((max(1, size // 2 // 4096), 1024), np.float32)
        target = np.zeros_like(source)

        def call() -> Any:
            copy_converted(source, target)
            return target

        return call

    timed = {case: {part: copying(size) for part, size in parts.items()} for case, parts in sizes.items()}
    return _timings(timed, np.asarray, seconds)


def make_torch(
    only: tuple[str, ...], threads: int, seconds: float, compiled: bool
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """The same by PyTorch."""
    import torch

    from .peers.torch_operations import OPERATIONS

    torch.set_num_threads(threads)
    timed: dict[str, Parts] = {}
    for name, operation, inputs in cases(only):
        given: dict[str, Any] = {}
        for key, value in inputs.items():
            if key == "table" and operation.name == "rope":
                given["cos"], given["sin"] = torch.from_numpy(value.cos), torch.from_numpy(value.sin)
            elif isinstance(value, np.ndarray):
                given[key] = torch.from_numpy(value)
                if key in operation.gradients:
                    given[key].requires_grad_()
                if key in ("targets", "indices"):
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

        timed[name] = {"forward": forward, "forward and backward": both}
    if arrays := _adamw_arrays(only):
        parameter = torch.nn.Parameter(torch.from_numpy(arrays[0]))
        parameter.grad = torch.from_numpy(arrays[1])
        rates = {"lr": ADAMW["learning_rate"], "weight_decay": ADAMW["weight_decay"]}
        optimizer = torch.optim.AdamW([parameter], fused=True, **rates)
        timed[ADAMW_CASE] = {"update": _stepping(lambda step: optimizer.step(), parameter)}
    return _timings(timed, lambda y: y.detach().numpy(), seconds)


def _timings(
    timed: dict[str, Parts], to_numpy: Callable[[Any], Any], budget: float, repeats: int = 3
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """A function that times every part: by case, seconds of each, the best of some (of one that takes seconds, one),
    and a few numbers of the result, to compare.

    All calls together take about `budget` seconds, of which each part has the same share. One that has used up its own
    is still timed in the first LEAST calls after the one that compiles it, then no more: its seconds are None.
    """
    share = budget / max(sum(map(len, timed.values())), 1)
    spent = {(name, part): 0.0 for name, parts in timed.items() for part in parts}
    results: dict[str, list[float]] = {}
    calls = 0

    def time_all() -> dict[str, Any]:
        nonlocal calls
        found: dict[str, Any] = {}
        for name, parts in timed.items():
            seconds: dict[str, float | None] = {}
            for part, function in parts.items():
                if calls > LEAST and spent[name, part] > share:
                    seconds[part] = None
                    continue
                best = total = float("inf")
                for repeat in range(repeats):
                    begin = time.perf_counter()
                    y = function()
                    last = time.perf_counter() - begin
                    best, total = min(best, last), last if repeat == 0 else total + last
                    # Updates go on from each other: their results can be compared only after as many.
                    if total > share / 4 and part != "update":
                        break
                seconds[part] = best
                spent[name, part] += total if calls else 0.0
                results[name] = to_numpy(y).reshape(-1)[:64].astype(float).tolist()
            found[name] = seconds, results[name]
        calls += 1
        return found

    return time_all
