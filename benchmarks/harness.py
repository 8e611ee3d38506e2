"""Contenders in processes of their own, called in turns; and what a result file says of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import click

RESULTS = Path(__file__).with_name("results")


class Call(NamedTuple):
    """One call of a contender."""

    seconds: float
    cpu_seconds: float  # of all threads of its process
    value: Any  # what it returned


class Contender:
    """A process that makes a function and then calls it on command.

    Args:
        name: for messages and results.
        make: a function of a module, `make(*arguments) -> function to be timed`; it runs in the new process.
        children: whether that starts processes of its own. It must then be left as a context, or nobody ends it.

    A process each, because OpenMP's threads spin for a while after their last loop, and would take the cores from
    whoever runs next in the same process. Between commands a contender sleeps in a read from its pipe, and every turn
    begins with a call that does not count (see `take_turns`), which outlasts the spinning of the other's threads. How
    OpenMP waits is left at its default, which is the fastest for a library that runs alone.
    """

    def __init__(
        self, name: str, make: Callable[..., Callable[[], Any]], *arguments: Any, children: bool = False
    ) -> None:
        for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            os.environ.pop(variable, None)
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=not children)
        self._process.start()
        theirs.close()

    def call(self, count: int) -> list[Call]:
        """Call it so many times. RuntimeError with the contender's traceback if it fails."""
        try:
            self._pipe.send(count)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            why = ", as if memory had run out: choose fewer sides, which are all there at once" if code == -9 else ""
            raise RuntimeError(f"{self.name}: its process ended with code {code}{why}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}:\n{answer}")
        return [Call(*call) for call in answer]

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> None:
    try:
        function = make(*arguments)
        while True:
            calls = []
            for _ in range(pipe.recv()):
                begin, cpu_begin = time.perf_counter(), time.process_time()
                value = function()
                calls.append((time.perf_counter() - begin, time.process_time() - cpu_begin, value))
            pipe.send(calls)
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send(traceback.format_exc())


def as_the_trainer_computes(threads: int) -> None:
    """One pool of so many threads, BLAS with one each, freed memory kept."""
    from ttr_gpu.memory import keep_freed_memory
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    keep_freed_memory()


def take_turns(
    contenders: Sequence[Contender], *, turns: int, calls: int, uncounted: int = 1
) -> list[list[list[Call]]]:  # fmt: skip
    """A, B, A, B, ...: whatever else slows the machine down for a while slows both. -> [contender][turn][call]

    The first calls of each turn, so many, find the caches full of the other's data and do not count.
    """
    results: list[list[list[Call]]] = [[] for _ in contenders]
    for _ in range(turns):
        for contender, result in zip(contenders, results, strict=True):
            result.append(contender.call(uncounted + calls)[uncounted:])
    return results


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, lower, upper)


def ratio(slower: Sequence[Sequence[Call]], faster: Sequence[Sequence[Call]]) -> Spread:
    """Time over time, turn by turn: each turn's median beside that of the turn next to it."""
    medians = [[statistics.median(call.seconds for call in turn) for turn in turns] for turns in (slower, faster)]
    return Spread.of([a / b for a, b in zip(*medians, strict=True)])


def reset_peak_memory() -> tuple[int, str]:
    """Resident memory of this process now, from which the peak counts, and where the peak is read."""
    with contextlib.suppress(OSError, AttributeError):
        # What the compiler has freed goes back to the system; otherwise the arrays would hide in it.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # Sets VmHWM to what is resident now (Linux, Documentation/filesystems/proc.rst).
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS"), "VmHWM"
    except OSError:
        # The peak since the process began: too small a difference if compiling took more than is resident now.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "ru_maxrss"


def peak_memory(method: str) -> int:
    """Bytes that were resident at the most since, by the method that `reset_peak_memory` found."""
    return _status("VmHWM") if method == "VmHWM" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


def machine() -> dict[str, Any]:
    """The processor, and how much of it this process may use."""
    from ttr_kernels.common.parallel import available_cores
    from ttr_kernels.common.processor import processor

    return {"cpu": processor(), "cores": available_cores(), "system": f"{platform.system()} {platform.machine()}"}


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of this project, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in ("ttr-gpu", "numpy", "numba", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def result_file(name: str) -> Path:
    """results/<name>-<processor>-<date>.json; processors of one name differ in their instructions."""
    from ttr_kernels.common.processor import processor

    where = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    return RESULTS / f"{name}-{where}-{time.strftime('%Y-%m-%d')}.json"


def compare_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--compare old.json`, for a benchmark whose result has `sides`."""
    return click.option(
        "--compare", type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="An earlier result of the same benchmark: what has become slower or faster since.",
    )(command)  # fmt: skip


def report(path: Path, name: str, result: dict[str, Any], compare: Path | None, *packages: str) -> None:
    """`write_result`, and the changes since an earlier one if that is given."""
    earlier = None if compare is None else json.loads(compare.read_text())
    write_result(path, name, result, *packages)
    if earlier is None:
        return
    if earlier.get("benchmark") != name or "sides" not in earlier:
        raise click.ClickException(f"--compare {compare}: got a result of {earlier.get('benchmark')!r}, not {name!r}")
    for key in ("shape", "threads", "tokens"):
        if earlier.get(key) != result.get(key):
            message = f"--compare {compare}: got a result with {key} {earlier.get(key)!r}, expected {result.get(key)!r}"
            raise click.ClickException(message)
    print(f"since {earlier['date']} ({earlier['machine']['cpu']}):")
    for line in changes(earlier["sides"], result["sides"]):
        print(f"  {line}")


def changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each side that both have: the ratio of its medians, and whether their quartiles lie apart."""
    lines = []
    for name in sorted(earlier.keys() & now.keys()):
        old, new = (Spread(**sides[name]["seconds"]) for sides in (earlier, now))
        verdict = "slower" if new.lower > old.upper else "faster" if new.upper < old.lower else "within the spread"
        lines.append(f"{name:<40} {1e3 * old.median:9.3f} -> {1e3 * new.median:9.3f} ms  "
                     f"{new.median / old.median:5.2f}  {verdict}")  # fmt: skip
    return lines


def write_result(path: Path, name: str, result: dict[str, Any], *packages: str) -> None:
    """Write a result with what it was measured on, and say where."""
    described = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**described, "versions": versions(*packages), **result}, indent=2) + "\n")
    print(f"written: {os.path.relpath(path)}")
