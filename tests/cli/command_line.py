"""Calling the command line in a process of its own, what it answered, and rows to call it on."""

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass

# Printed on stderr by a long pass (here: on a slow machine) or a cold kernel cache, whatever happens afterwards.
PROGRESS = re.compile(
    r"^((reading|writing|tokenising|training the tokenizer)\b.*: [\d,]+|compiling kernels for this CPU, once)"
)
# A model of some thousand parameters: a step takes a millisecond.
TINY = (
    "--preset", "nano", "--set", "model.embed_dim=16", "--set", "model.hidden_dim=32", "--set", "model.num_heads=2",
    "--set", "model.num_layers=1", "--set", "train.max_length=16", "--set", "train.tokens_per_batch=64",
)  # fmt: skip


@dataclass
class Result:
    """How a command ended: exit code, stdout, and stderr without lines of progress."""

    code: int
    out: str
    err: str

    def error(self, *fragments: str) -> str:
        """The one line of an error that the user can mend; every fragment must be in it."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), lines[0]
        for fragment in fragments:
            assert fragment in lines[0], lines[0]
        return lines[0]

    def ok(self, *fragments: str) -> str:
        """stdout of a command that succeeded and had nothing to say on stderr."""
        assert (self.code, self.err) == (0, ""), (self.code, self.err)
        for fragment in fragments:
            assert fragment in self.out, self.out
        return self.out


def without_progress(text: str) -> str:
    """stderr as it is on a machine that is fast enough and has compiled its kernels."""
    return "".join(line for line in text.splitlines(keepends=True) if not PROGRESS.match(line))


def command(*arguments: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "ttr_cli.main", *(str(argument) for argument in arguments)]


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """A process of its own, with pipes."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command(*arguments), text=True, env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Result:
    """Wait for its end."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out or "", without_progress(err or ""))


def event_rows(sequences: int = 40, length: int = 20, types: int = 5) -> str:
    """CSV of events whose type is most often the one before plus one."""
    rng = random.Random(0)
    rows = ["sequence,time,type"]
    for s in range(sequences):
        time, kind = 1.7e9, rng.randrange(types)
        for _ in range(length):
            time += rng.expovariate(0.5)
            rows.append(f"user {s},{time:.3f},type-{kind}")
            kind = (kind + 1) % types if rng.random() < 0.9 else rng.randrange(types)
    return "\n".join(rows) + "\n"
