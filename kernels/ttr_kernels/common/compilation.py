"""Compilation of the CPU kernels: numba, without the GIL, cached on disk under a name that changes with the sources."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config, event
from numba.core.codegen import get_host_cpu_features

from .announcement import say_once
from .cache import cache_root

# Sums may be reordered into vector lanes and a*b+c fused; NaN and infinity keep their meaning: a run must see them.
REASSOCIATE = frozenset({"reassoc", "contract", "arcp", "nsz"})
# For arithmetic whose order is the algorithm (rounding tricks, compensated terms).
EXACT = frozenset({"contract"})
# Sources that no compiled CPU kernel depends on: editing them keeps the cache.
_NOT_COMPILED = (
    "reference.py", "cases.py", "gpu.py", "gpu_numba.py", "operations.py", "benchmark.py", "arena.py", "onednn.py",
    "processor.py",
)  # fmt: skip


def jit(function: Callable[..., Any]) -> Any:
    """Compile a kernel: no GIL, NumPy's division rules, reductions that vectorise, cached on disk."""
    return _compile(function, REASSOCIATE)


def jit_within(function: Callable[..., Any]) -> Any:
    """Like `jit`, for what kernels call on a row or a tile: it must not make arrays, and does not count references to
    those it is given. Counting is atomic: it waits for all stores before it, so that rows no longer overlap.

    Always inlined. Otherwise each kernel that calls it holds a copy, made for how it is called there, all of one name:
    whose copy then runs, and in which order it sums, depended on whether kernels were just compiled or read from disk.
    """
    return _compile(function, REASSOCIATE, _nrt=False, forceinline=True)


def jit_inline(function: Callable[..., Any]) -> Any:
    """Like `jit`, for formulas inside a loop: always inlined, since a loop with a call in it is no vector code."""
    return _compile(function, REASSOCIATE, forceinline=True)


def jit_exact(function: Callable[..., Any]) -> Any:
    """Like `jit_inline`, but floating-point operations keep the order in which they are written."""
    return _compile(function, EXACT, forceinline=True)


def _compile(function: Callable[..., Any], fastmath: frozenset[str], **options: Any) -> Any:
    # numba picks a function's cache folder when it is decorated; the setting is global, so it is put back at once.
    # The same holds for the processor's features, which it takes when the first function of the process is decorated.
    directory = cache_directory()
    before = config.CACHE_DIR, config.CPU_FEATURES
    config.CACHE_DIR, config.CPU_FEATURES = str(directory or ""), _features()
    try:
        dispatcher = numba.njit(
            nogil=True, cache=directory is not None, error_model="numpy", fastmath=set(fastmath), **options
        )(function)
        dispatcher._compiler._customize_flags = _arguments_do_not_overlap
        return dispatcher
    finally:
        config.CACHE_DIR, config.CPU_FEATURES = before


def _arguments_do_not_overlap(flags: Any) -> Any:
    """Arrays that a kernel is given do not overlap, unless they are the same one, element by element in place.

    Otherwise LLVM tests for it while the kernel runs, and where the test is not sure goes through a scalar loop, which
    adds and rounds in another way: the last bits of short rows then depended on where malloc had put the arrays. numba
    has this flag, but no option that sets it.
    """
    flags.noalias = True
    return flags


@functools.cache
def _features() -> str | None:
    """LLVM's features of this processor: where AVX-512 costs no clock (Ice Lake, Zen 4 and later), vectors of 512 bits,
    which LLVM avoids by default."""
    if config.CPU_FEATURES is not None:
        features: str = config.CPU_FEATURES  # of NUMBA_CPU_FEATURES
        return features
    host: str = get_host_cpu_features()
    return f"{host},-prefer-256-bit" if "+avx512vbmi2" in host else None


@functools.cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept: `TTR_CACHE_DIR`, else `~/.cache/ttr-gpu`; None if no folder can be written.

    The folder's name holds a hash of the sources that are compiled. numba itself notices only a change of the file that
    a function stands in, not of what it calls in other files, and would run stale code.

    Failing both, a folder in the shared temporary one, if it is this user's alone: what is read from it is executed.
    """
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(package.rglob("*.py")):
        if source.name not in _NOT_COMPILED and "cuda" not in source.relative_to(package).parts:
            digest.update(source.read_bytes())
    shared = Path(tempfile.gettempdir()) / f"ttr-gpu-{os.getuid()}"
    for root in (cache_root(), shared):
        directory = root / f"numba-{digest.hexdigest()[:16]}"
        try:
            root.mkdir(mode=0o700 if root == shared else 0o777, parents=True, exist_ok=True)
            if root == shared and not _is_private(root):
                continue
            new = not directory.exists()
            directory.mkdir(exist_ok=True)
            if not os.access(directory, os.W_OK):
                continue
            if new:
                _remove_stale(root)
        except OSError:
            continue
        return directory
    return None


def _is_private(directory: Path) -> bool:
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _remove_stale(root: Path, days: int = 30) -> None:
    for old in root.glob("numba-*"):
        if time.time() - old.stat().st_mtime > days * 86400:
            shutil.rmtree(old, ignore_errors=True)


class _Announcer(event.Listener):
    """Says that kernels are being compiled, since the first run takes noticeably longer."""

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"].py_func.__module__.startswith("ttr_kernels"):
            where = cache_directory()
            kept = f"kept in {where}" if where else "no folder to keep them in: set TTR_CACHE_DIR"
            say_once(f"compiling kernels for this CPU, once, up to a minute ({kept}) ...")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announcer())
