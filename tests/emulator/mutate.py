"""Are the kernels' tests able to fail? Breaks the CUDA kernels of an operation in many small ways and counts how many
of the broken ones the operation's emulated tests find.

    python tests/emulator/mutate.py rms_norm                    # every mutant of rms_norm/*.cu and *.cuh
    python tests/emulator/mutate.py attention --sample 100      # 100 of them, drawn with --seed
    python tests/emulator/mutate.py common --tests rms_norm     # common/cuda, found by the tests of rms_norm
    python tests/emulator/mutate.py rms_norm --list             # show them, run nothing
    python tests/emulator/mutate.py rms_norm --only rms_norm.cu:42
    python tests/emulator/mutate.py attention --select float32 --json some.json   # some tests, and then
    python tests/emulator/mutate.py attention --survivors some.json               # all for what they did not find

A mutant changes one place: a barrier or a wait for copies is removed, a wait made one group laxer, a comparison shifted
or reversed, `+` and `-` exchanged, `min` and `max` too, a correction (`fmaxf`, `*=`, `+=`) dropped, a small constant of
index arithmetic moved by one. Tests are those of tests/kernels/cuda that concern the operation, the quickest first.

The score is killed / (killed + survived). Not counted: mutants that g++ refuses. Survivors are listed with their line:
each is a test to write, or a change that makes no difference to explain.

All mutants are compiled at once, and chosen when a kernel runs (schemata.py); those of constants and declarations are
compiled one by one. Nothing in the tree is touched: mutants live in a temporary folder, and each runs in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemata import PRELUDE, Change, schema

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "ttr_kernels"
TESTS = ROOT / "tests" / "kernels" / "cuda"
# Tests that inject faults of their own, into the kernels as they stand in the tree.
NOT_RUN = ("faults_are_found",)
# CPU seconds for one launch, and for all tests of a mutant: more is an endless loop.
LAUNCH_LIMIT = 6.0
FACTOR, LEAST = 4, 60


@dataclass(frozen=True)
class Mutant:
    file: Path  # relative to PACKAGE
    line: int
    rule: str
    before: str
    begin: int  # in the file
    end: int
    new: str

    @property
    def place(self) -> str:
        return f"{self.file.name}:{self.line}"

    def text(self, original: str) -> str:
        """The file with the change."""
        return original[: self.begin] + self.new + original[self.end :]

    @property
    def after(self) -> str:
        return self.text((PACKAGE / self.file).read_text()).splitlines()[self.line - 1].strip()

    def __str__(self) -> str:
        return f"{self.place}  {self.rule}\n      {self.before.strip()}\n      {self.after or '(removed)'}"


def _argument_end(text: str, start: int) -> tuple[list[int], int]:
    """From just inside a parenthesis: where its commas are, and where it closes."""
    depth, commas = 0, []
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            if depth == 0:
                return commas, i
            depth -= 1
        elif text[i] == "," and depth == 0:
            commas.append(i)
    return commas, len(text)


def _drop_maximum(code: str, match: re.Match[str]) -> Iterator[str]:
    commas, end = _argument_end(code, match.end())
    if len(commas) == 1:
        yield f"({code[match.end() : commas[0]]})" + code[end + 1 :]
        yield f"({code[commas[0] + 1 : end].strip()})" + code[end + 1 :]


def _swap(*pairs: tuple[str, str]) -> Callable[[str, re.Match[str]], Iterator[str]]:
    table = dict(pairs)

    def change(code: str, match: re.Match[str]) -> Iterator[str]:
        yield table[match.group()] + code[match.end() :]

    return change


def _remove(code: str, match: re.Match[str]) -> Iterator[str]:
    yield ";" + code[match.end() :]


def _next(code: str, match: re.Match[str]) -> Iterator[str]:
    yield f"{match.group(1)}{int(match.group(2)) + 1}" + code[match.end() :]


def _laxer(code: str, match: re.Match[str]) -> Iterator[str]:
    yield f"cp_async_wait<({match.group(1)}) + 1>()" + code[match.end() :]


# (name, what is looked for, what may stand there instead with the rest of the line). The project writes binary
# operators with a space on either side, and template brackets with none.
RULES: list[tuple[str, str, Callable[[str, re.Match[str]], Iterator[str]]]] = [
    ("barrier removed", r"__syncthreads\(\);|__syncwarp\(\w*\);|ttr_bar_\w+\([^)]*\);", _remove),
    ("wait or commit removed", r"cp_async_wait<[^;]*>\(\);|cp_async_commit\(\);", _remove),
    ("wait one group laxer", r"cp_async_wait<([^;]*)>\(\)", _laxer),
    ("comparison shifted", r" (<=|>=|<|>) ", _swap((" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "))),
    ("comparison reversed", r" (==|!=) ", _swap((" == ", " != "), (" != ", " == "))),
    ("and/or exchanged", r" (&&|\|\|) ", _swap((" && ", " || "), (" || ", " && "))),
    ("sign exchanged", r" [-+] ", _swap((" + ", " - "), (" - ", " + "))),
    ("sign exchanged", r" [-+]= ", _swap((" += ", " -= "), (" -= ", " += "))),
    ("update dropped", r"(?:(?<=^)\s*|(?<=\) ))[\w.\[\]()>]+ [-+*]= [^;]*;", _remove),
    ("minimum/maximum exchanged", r"\b(min|max|fminf|fmaxf)\(",
     _swap(("min(", "max("), ("max(", "min("), ("fminf(", "fmaxf("), ("fmaxf(", "fminf("))),
    ("correction dropped", r"\b(?:fmaxf|fminf|min|max)\(", _drop_maximum),
    ("constant moved", r"((?:&|>>|<<|%|\^|/|\*) )(\d+)\b(?![.\w])", _next),
    ("choice reversed", r"\b(true|false)\b", _swap(("true", "false"), ("false", "true"))),
]  # fmt: skip


def mutants_of(path: Path) -> Iterator[Mutant]:
    for line, rule, before, change in changes_of(path.read_text()):
        yield Mutant(path.relative_to(PACKAGE), line, rule, before, change.begin, change.end, change.new)


def changes_of(text: str) -> Iterator[tuple[int, str, str, Change]]:
    """(number of the line, rule, the line, what is changed) of each mutant of a text, which are numbered from 1."""
    in_macro, start, count = False, 0, 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        begin_of_line, start = start, start + len(line)
        is_directive = in_macro or line.lstrip().startswith("#")
        in_macro = is_directive and line.rstrip().endswith("\\")
        code = line.split("//")[0].rstrip()
        if is_directive or not code or code.lstrip().startswith("static_assert"):
            continue
        for rule, pattern, change in RULES:
            for match in re.finditer(pattern, code):
                for rest in change(code, match):
                    old = code[match.start() :]
                    if rest == old:
                        continue
                    same, count = _common_end(old, rest), count + 1
                    begin = begin_of_line + match.start()
                    new = rest[: len(rest) - same]
                    yield number, rule, line, Change(count, begin, begin + len(old) - same, new)


def _common_end(old: str, new: str) -> int:
    """How many characters both end in; what is left of either has as many opening as closing brackets."""
    count = 0
    while count < min(len(old), len(new)) and old[-count - 1] == new[-count - 1]:
        count += 1
    while count and any(_is_cut(text[: len(text) - count]) for text in (old, new)):
        count -= 1
    return count


def _is_cut(text: str) -> bool:
    return any(text.count(opening) != text.count(closing) for opening, closing in ("()", "[]", "{}"))


class _Selection:
    """A pytest plugin: keeps the operations' tests, has `work` done in place of running them all, and runs some of them
    for it."""

    def __init__(self, folders: list[str], work: Callable[[_Selection], None]) -> None:
        self.folders = folders
        self._work = work
        self.items: list[Any] = []
        self.times: dict[str, float] = {}
        self.failure = self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if self._concerns(item) and not any(n in item.name for n in NOT_RUN)]
        self.items = items

    def _concerns(self, item: Any) -> bool:
        operation = item.callspec.params.get("operation") if hasattr(item, "callspec") else None
        if operation is None:
            return bool({*item.path.relative_to(TESTS).with_suffix("").parts} & {*self.folders})
        return any(f".{folder}" in f"{operation.forward.__module__}." for folder in self.folders)

    def pytest_runtestloop(self, session: Any) -> bool:
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failure = f"{report.nodeid.rpartition('::')[2]}: {crash.message if crash else report.longrepr}"
            self.failed = report.nodeid

    def run(self, order: Callable[[Any], Any]) -> None:
        """Run the tests until one fails."""
        items = sorted(self.items, key=order)
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failure:
                return


def _in_child(work: Callable[[], Any], seconds: float) -> tuple[Any, str]:
    """What `work` returns in a process of its own, or why that ended without an answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    if answer:
        return pickle.loads(answer), ""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return None, "time limit" if number == signal.SIGXCPU else f"the process ended by signal {number}"


class Laboratory:
    """A copy of all CUDA sources, in which mutants take the place of what they change, and the tests that run on it."""

    def __init__(self, folder: Path, mutants: Sequence[Mutant], tests: _Selection) -> None:
        import emulator
        import host_compiler

        self.tree, self.cache = folder / "sources", folder / "cache"
        self.tests, self.mutants = tests, mutants
        self.durations: dict[str, float] = {}
        self.kills: Counter[str] = Counter()
        for path in PACKAGE.rglob("*.cu*"):
            (self.tree / path.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
            (self.tree / path.relative_to(PACKAGE)).write_text(path.read_text())
        device = self.tree / "common" / "cuda" / "device.cuh"
        device.write_text(device.read_text().replace("#pragma once\n", f"#pragma once\n{PRELUDE}", 1))
        # The emulator's own libraries are those of the user's cache; kernels go to the temporary folder.
        self.cache.mkdir()
        shared = [host_compiler.runtime_library()]
        for mode in host_compiler.FLAGS:
            header = host_compiler._precompiled_header(mode)
            shared += [header, Path(f"{header}.gch")]
        for path in shared:
            (self.cache / path.name).symlink_to(path)
        host_compiler._cache = lambda: self.cache
        host_compiler.COMMON = self.tree / "common" / "cuda"
        emulator.TIME_LIMIT = LAUNCH_LIMIT
        compile_original = host_compiler.kernel_library

        def compile_copy(source: Path, name: str, defines: dict[str, Any], mode: str) -> Path:
            copy = self.tree / source.resolve().relative_to(PACKAGE)
            return compile_original(copy, name, defines, mode)

        host_compiler.kernel_library = compile_copy
        self.refused = host_compiler.CompileError.__name__
        # Numbers of the mutants that are compiled one by one.
        self.alone: set[int] = set()
        self._write_schemata()

    def _write_schemata(self) -> None:
        by_file: dict[Path, list[Change]] = {}
        for number, m in enumerate(self.mutants, 1):
            if number not in self.alone:
                by_file.setdefault(m.file, []).append(Change(number, m.begin, m.end, m.new))
        for file, changes in by_file.items():
            text, left_out = schema((PACKAGE / file).read_text(), changes)
            self.alone |= {change.number for change in left_out}
            (self.tree / file).write_text(text)

    def _run(self, number: int) -> tuple[str, str, dict[str, float]]:
        os.environ["TTR_MUTANT"] = str(number)
        times, kills = self.durations, self.kills
        # What is quick and has found others comes first.
        self.tests.run(lambda item: times.get(item.nodeid, 1.0) / (1 + kills[item.nodeid]))
        return self.tests.failure, self.tests.failed, self.tests.times

    def baseline(self) -> float:
        """Run the tests on the kernels as they are: the seconds it took. The kernels stay compiled."""
        failure = self.refused
        while failure:
            began = time.monotonic()
            answer, why = _in_child(lambda: self._run(0), 36000)
            failure = answer[0] if answer else why
            if failure and not (self.refused in failure and self._take_out(failure)):
                raise SystemExit(f"the tests fail on the unchanged kernels: {failure}")
        self.seconds = time.monotonic() - began
        self.kept = {*self.cache.iterdir()}
        return self.seconds

    def _take_out(self, message: str) -> bool:
        """Compile mutants by themselves that stand where g++ found an error; whether there were any."""
        places = {(Path(name).name, int(line)) for name, line in re.findall(r"([\w/.-]+\.cuh?):(\d+)", message)}
        named = {int(number) for number in re.findall(r"ttr_mutant == (\d+)", message)}
        found = {
            number for number, m in enumerate(self.mutants, 1)
            if ((m.file.name, m.line) in places or number in named) and number not in self.alone
        }  # fmt: skip
        self.alone |= found
        self._write_schemata()
        return bool(found)

    def verdict(self, number: int) -> tuple[str, str]:
        """("killed" | "survived" | "refused", by what)."""
        mutant, limit = self.mutants[number - 1], max(LEAST, FACTOR * self.seconds)
        if number not in self.alone:
            answer, why = _in_child(lambda: self._run(number), limit)
        else:
            path = self.tree / mutant.file
            before = path.read_text()
            path.write_text(mutant.text((PACKAGE / mutant.file).read_text()))
            try:
                answer, why = _in_child(lambda: self._run(0), limit)
            finally:
                path.write_text(before)
                for made in {*self.cache.iterdir()} - self.kept:
                    made.unlink(missing_ok=True) if made.is_file() else None
        if answer is None:
            return "killed", why
        failure, by, times = answer
        self.durations |= times  # without compilation, unlike those of the first run
        if self.refused in failure:
            return "refused", failure
        if failure:
            self.kills[by] += 1
            return "killed", failure
        return "survived", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("operation", help="a folder of ttr_kernels with .cu files, or `common`")
    parser.add_argument("--tests", help="operations (and modules) whose tests run, by commas (default: itself)")
    parser.add_argument("--select", default="", help="run only these of the tests (pytest's -k): a lower bound, sooner")
    parser.add_argument("--sample", type=int, help="try that many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", help="mutants of places that begin so, in this order: forward.cu,tile.cuh:42")
    parser.add_argument("--survivors", type=Path, help="mutants that survived in the run that wrote this --json")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--json", type=Path, help="write the result of each mutant here")
    options = parser.parse_args()

    folder = PACKAGE / ("common/cuda" if options.operation == "common" else options.operation)
    files = sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")])
    # device.cuh is PTX on a GPU and a call into the emulator here: nothing of it can be tried on the host.
    mutants = [mutant for file in files if file.name != "device.cuh" for mutant in mutants_of(file)]
    if options.only:
        mutants = [m for place in options.only.split(",") for m in mutants if f"{m.place}:".startswith(place)]
    if options.survivors:
        rows = json.loads(options.survivors.read_text())["mutants"]
        wanted = {(row["before"], row["after"]) for row in rows if row["verdict"] == "survived"}
        mutants = [mutant for mutant in mutants if (mutant.before.strip(), mutant.after) in wanted]
    if options.sample is not None and options.sample < len(mutants):
        chosen = random.Random(options.seed).sample(range(len(mutants)), options.sample)
        mutants = [mutants[i] for i in sorted(chosen)]
    if not mutants:
        parser.error(f"no mutants of {folder.relative_to(ROOT)}")
    if options.list:
        print(*mutants, sep="\n")
        return 0

    sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests" / "kernels"), str(ROOT / "tests" / "emulator")]
    import pytest

    results: list[tuple[Mutant, str, str]] = []

    def experiment(tests: _Selection) -> None:
        with tempfile.TemporaryDirectory(prefix="ttr-mutants-") as temporary:
            laboratory = Laboratory(Path(temporary), mutants, tests)
            seconds = laboratory.baseline()
            print(f"{seconds:.0f} s for {len(tests.items)} tests of the unchanged kernels; {len(mutants)} mutants, of "
                  f"which {len(laboratory.alone)} are compiled one by one", flush=True)  # fmt: skip
            for number, mutant in enumerate(mutants, 1):
                began = time.monotonic()
                verdict, by = laboratory.verdict(number)
                results.append((mutant, verdict, by))
                summary = f"{time.monotonic() - began:5.1f} s  {' '.join(by.split())[:100]}"
                print(f"{number:4d}  {verdict:9s}  {mutant.place:28s}  {mutant.rule:26s}  {summary}", flush=True)

    quiet = ("-q", "-x", "--no-header", "--capture=no", "-p", "no:cacheprovider", "-p", "no:xdist")
    tests = _Selection((options.tests or options.operation).split(","), experiment)
    code = pytest.main([str(TESTS), *quiet, "-k", options.select], plugins=[tests])
    if not results:
        return int(code) or 1
    if len(results) < len(mutants):
        print(f"\ninterrupted after {len(results)} of {len(mutants)} mutants")

    counts = Counter(verdict for _, verdict, _ in results)
    survivors = [mutant for mutant, verdict, _ in results if verdict == "survived"]
    tried = counts["killed"] + counts["survived"]
    print(f"\nkilled {counts['killed']} of {tried} ({counts['killed'] / max(tried, 1):.1%}); not counted: "
          f"{counts['refused']} refused by g++")  # fmt: skip
    if survivors:
        print("survivors:", *survivors, sep="\n  ")
    if options.json:
        rows = [
            {"place": m.place, "rule": m.rule, "before": m.before.strip(), "after": m.after, "verdict": v, "by": b}
            for m, v, b in results
        ]
        options.json.write_text(json.dumps({"counts": counts, "mutants": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
