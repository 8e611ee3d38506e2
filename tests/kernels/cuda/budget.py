"""Compiles every instantiation of every kernel with NVRTC, without a GPU, and prints what each takes.

    python tests/kernels/cuda/budget.py            the table
    python tests/kernels/cuda/budget.py --update   and write it to budget.json, which test_budget.py holds kernels to

Instantiations are those of the modules' INSTANTIATIONS: what a user with default settings meets. Cubins are kept under
`~/.cache/ttr-gpu/cubins` by their source, macros, architecture and compiler.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cubin import Resources, resources

import ttr_kernels
from ttr_kernels.common.cache import cache_root
from ttr_kernels.common.cuda.launch import Kernel

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
FILE = Path(__file__).with_name("budget.json")
# Of one multiprocessor: shared memory in KiB; registers, threads and blocks are the same on all three.
_SHARED_KIB = {"sm_80": 164, "sm_90a": 228, "sm_100a": 228}
_REGISTERS, _THREADS, _BLOCKS = 65536, 2048, 32
_COLUMNS = ("registers", "spills", "stack", "shared", "blocks")


@functools.cache
def missing() -> str | None:
    """What compiling needs and does not find; None if nothing is missing."""
    try:
        importlib.import_module("cuda.core")
    except ImportError as error:
        return f"{error} (pip install 'ttr-gpu[nvrtc]')"
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl"):
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed (pip install 'ttr-gpu[nvrtc]')"
    return None


def instantiations() -> list[Kernel]:
    """The kernels of every module of ttr_kernels that lists some."""
    root = Path(ttr_kernels.__path__[0])
    files = sorted([*root.glob("*/gpu.py"), *root.glob("common/cuda/*.py")])
    modules = (importlib.import_module(".".join(("ttr_kernels", *file.relative_to(root).with_suffix("").parts)))
               for file in files if "INSTANTIATIONS" in file.read_text())  # fmt: skip
    return [kernel for module in modules for kernel in module.INSTANTIATIONS]


def name_of(kernel: Kernel) -> str:
    """ "rms_norm/rms_norm_forward float 4 64 1": folder, kernel, values of its macros in order of their names."""
    values = (str(kernel.defines[name]) for name in sorted(kernel.defines))
    return " ".join((f"{kernel.source.parent.name}/{kernel.name}", *values))


def measure(kernels: Iterable[Kernel]) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: {column: value}}}, compiling what has not been compiled yet, two at a time."""
    kernels = list(kernels)
    # Kernels anew: one that has been launched holds on to what launches it, which does not go to another process.
    modules = {
        (kernel.source, kernel.options, arch): Kernel(kernel.source, kernel.name, kernel.defines)
        for kernel in kernels
        for arch in ARCHITECTURES
    }
    # Not forked from this process, which may be a test runner's, with threads.
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), multiprocessing.get_context("forkserver")) as pool:
        jobs = {key: pool.submit(_compiled, kernel, key[2]) for key, kernel in modules.items()}
        compiled = {key: job.result() for key, job in jobs.items()}
    table: dict[str, dict[str, dict[str, int]]] = {}
    for kernel in kernels:
        for arch in ARCHITECTURES:
            taken, spills = compiled[kernel.source, kernel.options, arch][kernel.name]
            values = (taken.registers, spills, taken.stack, taken.shared, _blocks(taken, kernel.shared_bytes, arch))
            table.setdefault(name_of(kernel), {})[arch] = dict(zip(_COLUMNS, values, strict=True))
    return table


def _compiled(kernel: Kernel, arch: str) -> dict[str, tuple[Resources, int]]:
    """Resources and bytes spilled, of each kernel in the module."""
    text = repr((kernel.code(), sorted(kernel.defines.items()), arch, version("nvidia-cuda-nvrtc")))
    stem = _cache() / f"{kernel.source.stem}-{arch}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    cubin, log = Path(f"{stem}.cubin"), Path(f"{stem}.log")
    if not (cubin.exists() and log.exists()):
        code, said = _compile(kernel, arch)
        for file, content in ((log, said.encode()), (cubin, code)):
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(content)
            part.replace(file)
    found = resources(cubin.read_bytes())
    compiled = {}
    for name, stores, loads in re.findall(
        r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log.read_text()
    ):
        compiled[name] = found[name], int(stores) + int(loads)
    return compiled


def _compile(kernel: Kernel, arch: str) -> tuple[bytes, str]:
    from cuda.core import Program, ProgramOptions

    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    wheels = [str(folder) for root in roots or () for folder in sorted(Path(root).glob("*/include"))]
    folders = [option[2:] for option in kernel.options if option.startswith("-I")]
    options = ProgramOptions(
        std="c++17", arch=arch, include_path=[*folders, *wheels], ptxas_options=["-v"],
        define_macro=[f"{name}={value}" for name, value in kernel.defines.items()],
    )  # fmt: skip
    said = io.StringIO()
    code = Program(kernel.code(), "c++", options).compile("cubin", logs=said).code
    return bytes(code), said.getvalue()


def _blocks(taken: Resources, dynamic_shared: int, arch: str) -> int:
    """Blocks that a multiprocessor holds at once, of as many threads as the kernel's bounds allow."""
    # Registers are given to warps 256 at a time; each block takes 1 KiB of shared memory besides its own.
    warps = -(-taken.threads // 32)
    by_registers = _REGISTERS // (-(-taken.registers * 32 // 256) * 256 * warps)
    by_shared = (_SHARED_KIB[arch] << 10) // (taken.shared + dynamic_shared + 1024)
    return min(by_registers, by_shared, _THREADS // (32 * warps), _BLOCKS)


def _cache() -> Path:
    folder = cache_root() / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def text_of(table: dict[str, dict[str, dict[str, int]]]) -> str:
    """A line for each kernel: registers, bytes spilled, shared memory and blocks per multiprocessor on each."""
    width = max(map(len, table), default=0)
    lines = [" " * width + "".join(f"{arch:>26}" for arch in ARCHITECTURES)]
    lines.append(" " * width + "   regs spills shared blocks" * len(ARCHITECTURES))
    for name, by_arch in table.items():
        cells = ("{registers:7}{spills:7}{shared:7}{blocks:7}".format(**by_arch[arch]) for arch in ARCHITECTURES)
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def budget() -> dict[str, dict[str, dict[str, int]]]:
    """What is allowed."""
    table: dict[str, dict[str, dict[str, int]]] = json.loads(FILE.read_text())["kernels"]
    return table


def write(table: dict[str, dict[str, dict[str, int]]]) -> None:
    """Replace budget.json, a line for each kernel and architecture."""
    kernels = [
        f"{json.dumps(name)}: {{\n  "
        + ",\n  ".join(f"{json.dumps(arch)}: {json.dumps(values)}" for arch, values in by_arch.items())
        + "}"
        for name, by_arch in sorted(table.items())
    ]
    compiler = json.dumps(f"nvidia-cuda-nvrtc {version('nvidia-cuda-nvrtc')}")
    FILE.write_text(f'{{"compiler": {compiler}, "kernels": {{\n' + ",\n".join(kernels) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="What every kernel takes of a GPU, compiled without one.")
    parser.add_argument("--update", action="store_true", help="write it to budget.json")
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    arguments = parser.parse_args()
    table = measure(instantiations())
    print(text_of(table))
    if arguments.update:
        write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
