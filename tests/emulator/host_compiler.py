"""Compiles a .cu for the host with g++, and keeps what it made under `~/.cache/ttr-gpu/emulator`.

A kernel becomes a shared library for each mode: `plain`, or `check`, in which g++ puts a call before each access of
memory. The emulator's runtime (host/*.cpp) is one more library, which they all load.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ttr_kernels.common.cache import cache_root

HOST = Path(__file__).resolve().parent / "host"
COMMON = HOST.parents[2] / "kernels" / "ttr_kernels" / "common" / "cuda"
# Line numbers alone. 16-bit types are read through pointers to other types, hence no strict aliasing.
BASE = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-g1",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
RUNTIME_FLAGS = [*BASE, "-O2", "-Wall", "-Wextra", "-shared"]
FLAGS = {"plain": ["-O1"], "check": ["-O1", "-fsanitize=thread,alignment,bounds-strict"]}
_KEPT_DAYS = 30


class CompileError(Exception):
    """g++ refused a kernel; the message holds what it said."""


@functools.cache
def missing() -> str | None:
    """What the emulator needs and does not find, in words for a skipped test; None if nothing is missing."""
    for program in (compiler(), "addr2line"):
        if shutil.which(program) is None:
            return f"{program} not found (install g++ and binutils)"
    if not _cuda_headers():
        return "CUDA headers not found (pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl)"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def _cuda_headers() -> tuple[Path, ...]:
    """Include folders of the CUDA wheels: nvidia/cu13/include, or one folder per wheel before CUDA 13."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    folders = sorted({folder for root in roots for folder in Path(root).glob("*/include")})
    has_bfloat16 = any((folder / "cuda_bf16.h").exists() for folder in folders)
    has_crt = any((folder / "crt" / "host_defines.h").exists() for folder in folders)
    has_target = any((folder / "nv" / "target").exists() for folder in folders)
    return tuple(folders) if has_bfloat16 and has_crt and has_target else ()


def runtime_library() -> Path:
    sources = sorted(HOST.glob("*.cpp"))
    headers = [HOST / "runtime.h", HOST / "fiber.h"]

    def build(target: Path) -> None:
        _run([compiler(), *RUNTIME_FLAGS, *map(str, sources), "-o", str(target), f"-Wl,-soname,{library.name}"])

    library = _cache() / f"runtime-{_digest([*sources, *headers], *RUNTIME_FLAGS)}.so"
    return _once(library, build)


def kernel_library(source: Path, name: str, defines: dict[str, int | str], mode: str) -> Path:
    """The library of the kernels in `source`, among them `name`, under these macros."""
    headers = sorted({*HOST.glob("*.h"), *COMMON.glob("*.cuh"), *COMMON.glob("*.h"), *source.parent.glob("*.cuh")})
    macros = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    runtime = runtime_library()
    prefix = _precompiled_header(mode)

    def build(names: list[str]) -> Path:
        text = f'#include "{source.resolve()}"\n' + "".join(f"TTR_EXPORT({each})\n" for each in names)
        command = [compiler(), *BASE, *FLAGS[mode], "-DTTR_HOST", *macros, "-include", str(prefix), *_includes()]
        command += [f"-I{COMMON}", f"-I{source.parent}", "-c", "-x", "c++", "-"]

        def compile_and_link(target: Path) -> None:
            # Two steps, because a linker told of the sanitizer would add its library.
            kernels = str(target.with_suffix(".o"))
            _run([*command, "-o", kernels], text)
            _run([compiler(), "-shared", kernels, str(runtime), "-Wl,-rpath,$ORIGIN", "-o", str(target)])

        library = _cache() / f"{source.stem}-{mode}-{_digest([source, *headers], mode, *macros, runtime.name, text)}.so"
        return _once(library, compile_and_link)

    # All kernels of the file in one library, since a forward is followed by its backward; unless some of them exist
    # only under other macros.
    names = re.findall(r"__global__\s+void\s*(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(", source.read_text())
    try:
        return build(sorted({*names, name}))
    except CompileError:
        return build([name])


def _precompiled_header(mode: str) -> Path:
    """A header that includes cuda_host.h, compiled: NVIDIA's headers take longer to read than any kernel."""
    headers = sorted(HOST.glob("*.h"))
    header = _cache() / f"prefix-{mode}-{_digest(headers, mode)}.h"

    _once(header, lambda target: target.write_text(f'#include "{HOST / "cuda_host.h"}"\n'))
    command = [compiler(), *BASE, *FLAGS[mode], *_includes(), "-x", "c++-header", str(header), "-o"]
    _once(Path(f"{header}.gch"), lambda target: _run([*command, str(target)]))
    return header


def _includes() -> list[str]:
    return [f"-I{HOST}", *(word for folder in _cuda_headers() for word in ("-isystem", str(folder)))]


def _run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout


def _digest(files: list[Path], *words: str) -> str:
    digest = hashlib.sha256(repr((_compiler_version(), _cuda_headers(), words)).encode())
    for file in [Path(__file__), *files]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


@functools.cache
def _cache() -> Path:
    folder = cache_root() / "emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="ttr-emulator-"))
    for old in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may tidy up too
            if old.is_file() and time.time() - old.stat().st_mtime > _KEPT_DAYS * 86400:
                old.unlink()
    return folder


def _once(target: Path, build: Callable[[Path], object]) -> Path:
    """`target`, built if it does not exist: under another name first, since another process may want it too."""
    if target.exists():
        os.utime(target)
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        made = Path(folder) / target.name
        build(made)
        made.replace(target)
    return target
