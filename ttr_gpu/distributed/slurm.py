"""Batch scripts for Slurm: resources, the environment printed, and a run that goes on after it was pre-empted."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..train.sweep import read_trials

Kind = Literal["preprocess", "train", "sweep"]

# Options of `ttr-gpu train` that are the script's own.
_OWN = {"--resume", "--continue", "--sweep", "--plan"}

# Seconds before the end of its time at which a job is told, so that it can save.
_NOTICE = 120


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm, and what is to be run.

    Attributes:
        kind: preprocess (an array, a task for each input), train, or sweep (an array, a task for each trial of
            `ttr-gpu train --sweep`).
        arguments: inputs; or the data set and options of train; or the sweep's TOML file, the data set, and options.
        nodes: machines; gpus: of each, 0 for none; ranks: processes on each, by default one for each GPU.
        cpus: cores of each process; time: as Slurm writes it.
    """

    kind: Kind
    arguments: tuple[str, ...]
    nodes: int = 1
    gpus: int = 0
    ranks: int | None = None
    cpus: int = 4
    memory: str | None = None
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    name: str = "ttr-gpu"

    @property
    def per_node(self) -> int:
        """Processes on each machine."""
        return self.ranks or max(1, self.gpus)


def script(job: Job) -> str:
    """The text of the batch script. UserError for what Slurm would not take."""
    _check(job)
    body = {"preprocess": _preprocess, "train": _train, "sweep": _sweep}[job.kind](job)
    return "\n".join([*_header(job), "", *_ENVIRONMENT, "", *body, ""])


def _check(job: Job) -> None:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", job.time):
        raise UserError(f"--time: got {job.time!r}, expected minutes, hours:minutes:seconds or days-hours, as Slurm's")
    if job.memory is not None and not re.fullmatch(r"\d+[KMGT]?", job.memory):
        raise UserError(f"--memory: got {job.memory!r}, expected such as 64G")
    for option, value in (("--name", job.name), ("--partition", job.partition), ("--account", job.account)):
        if value is not None and not re.fullmatch(r"[\w.,-]+", value):
            raise UserError(f"{option}: got {value!r}, expected letters, digits, dots and dashes")
    if not job.arguments:
        expected = {"preprocess": "input files", "train": "a data set", "sweep": "a TOML file of trials and a data set"}
        raise UserError(f"{job.kind}: got no argument, expected {expected[job.kind]}")
    if job.kind == "sweep" and len(job.arguments) < 2:
        raise UserError("sweep: got one argument, expected a TOML file (see docs/training.md) and a data set")
    options = {argument.split("=")[0] for argument in job.arguments}
    if job.kind == "train" and (given := options & {"--name", "--out", *_OWN}):
        raise UserError(f"train: got {min(given)}, expected none: the script names the run, and resumes it by name")
    if job.kind == "sweep" and (given := options & _OWN):
        raise UserError(f"sweep: got {min(given)}, expected none: the script says it, and goes on with what it began")
    if job.kind == "sweep" and job.nodes * job.per_node > 1:
        raise UserError("sweep: each trial runs as one process; leave out --nodes and --ranks, at most --gpus 1")
    if job.kind == "preprocess":
        names = [Path(path).name.split(".")[0] for path in job.arguments]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"preprocess: several inputs would become {twice}.zarr, expected one; rename them")
    if job.kind == "preprocess" and job.nodes * job.per_node > 1:
        raise UserError("preprocess: runs as one process per input; leave out --nodes, --gpus and --ranks")


def _header(job: Job) -> list[str]:
    options = {
        "job-name": job.name, "partition": job.partition, "account": job.account, "nodes": job.nodes,
        "ntasks-per-node": job.per_node, "gpus-per-node": job.gpus or None, "cpus-per-task": job.cpus,
        "mem": job.memory, "time": job.time, "output": "%x-%j.log" if job.kind == "train" else "%x-%A_%a.log",
    }  # fmt: skip
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)]
    if job.kind == "preprocess":
        return [*lines, f"#SBATCH --array=0-{len(job.arguments) - 1}"]
    if job.kind == "sweep":
        lines.append(f"#SBATCH --array=0-{len(read_trials(Path(job.arguments[0]))) - 1}")
    return [
        *lines,
        f"# {_NOTICE} s before its time is over, processes are told, save and stop; the job then goes on in the queue.",
        f"#SBATCH --signal=USR1@{_NOTICE}", "#SBATCH --requeue", "#SBATCH --open-mode=append",
    ]  # fmt: skip


_ENVIRONMENT = [
    "set -euo pipefail",
    'echo "job ${SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+ task $SLURM_ARRAY_TASK_ID} on ${SLURM_JOB_NODELIST}, '
    'start ${SLURM_RESTART_COUNT:-0}, $(date -Is)"',
    "env | grep -E '^(SLURM|CUDA|NCCL|TTR)_' | sort",
    "ttr-gpu info",
]


def _preprocess(job: Job) -> list[str]:
    inputs = " ".join(shlex.quote(path) for path in job.arguments)
    return [
        f"inputs=({inputs})",
        "input=${inputs[$SLURM_ARRAY_TASK_ID]}",
        'name=$(basename "$input")',
        'ttr-gpu preprocess "$input" --output "${name%%.*}.zarr" --overwrite',
    ]


def _train(job: Job) -> list[str]:
    data, *options = job.arguments
    run = f'{shlex.quote(data)} --name "$run" --continue {shlex.join(options)}'.rstrip()
    return ["run=${SLURM_JOB_NAME}-${SLURM_JOB_ID}", *_run(job, run)]


def _sweep(job: Job) -> list[str]:
    trials, data, *options = job.arguments
    return _run(job, shlex.join([data, "--sweep", trials, *options]))


def _run(job: Job, arguments: str) -> list[str]:
    """Train, or go on where the job's earlier start has saved, and back into the queue if time is over."""
    several = job.nodes * job.per_node > 1
    lines = []
    if several:
        lines += [
            "# MPI's processes find each other through Slurm (pmi2 is MPICH's way, pmix Open MPI's); GPUs can do",
            "# without MPI, through this address.",
            'TTR_MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))',
            "export TTR_MASTER",
        ]
    mpi = " --mpi=pmi2" if several else ""
    return [
        *lines,
        "code=0",
        f'srun{mpi} --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\',
        f"  ttr-gpu train {arguments} || code=$?",
        "# 138: stopped by USR1, and saved.",
        "if [[ $code -eq 138 ]]; then",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "  exit 0",
        "fi",
        'exit "$code"',
    ]
