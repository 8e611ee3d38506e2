"""`python -m benchmarks`: one sub-command for each comparison, in a file of its own."""

from __future__ import annotations

import click

from .attention_memory import attention_memory
from .data import data
from .decode import decode
from .distributed import distributed
from .event_training import events
from .gpu import gpu
from .kernels import kernels
from .netns import netns
from .point_processes import point_processes
from .prefill import prefill
from .scaling import scaling
from .serve import serve
from .startup import startup
from .step import step
from .time_ablation import time_ablation
from .training import training


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Comparisons that run on any machine; results are written to benchmarks/results."""


main.add_command(step)
main.add_command(attention_memory)
main.add_command(decode)
main.add_command(data)
main.add_command(time_ablation)
main.add_command(distributed)
main.add_command(netns)
main.add_command(point_processes)
main.add_command(events)
main.add_command(training)
main.add_command(prefill)
main.add_command(serve)
main.add_command(kernels)
main.add_command(scaling)
main.add_command(startup)
main.add_command(gpu)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
