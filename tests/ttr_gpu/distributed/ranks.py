"""Python under mpirun, for tests: skipped where there is no MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A program whose ranks end in the way that its arguments ask for.
CHECK_ENDINGS = Path(__file__).with_name("check_endings.py")


def mpirun(*arguments: str | Path, ranks: int = 2, timeout: float = 120, **environment: str) -> tuple[int, str, str]:
    """`python arguments` on so many ranks of one thread: exit code, stdout, stderr."""
    done = subprocess.run(
        command(ranks, *arguments), capture_output=True, text=True, timeout=timeout, env=environ(**environment)
    )
    return done.returncode, done.stdout, done.stderr


def said_by_ranks(out: str, what: str) -> list[int]:
    """The ranks whose "rank N what" is in what mpirun put out, which may have joined lines of several."""
    return sorted(int(rank) for rank in re.findall(rf"rank (\d+) {what}", out))


def command(ranks: int, *arguments: str | Path) -> list[str]:
    """The command line of that."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("there is no mpirun")
    return [program, "-n", str(ranks), sys.executable, *map(str, arguments)]


def environ(**changes: str) -> dict[str, str]:
    """The environment of a rank: the modules that this process finds, and one thread.

    Buffered: without, `print` writes a line's end apart, and mpirun may put another rank's line before it.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", **changes}
