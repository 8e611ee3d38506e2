"""The option --threads, the same for every command that computes."""

from __future__ import annotations

import click

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of kernels and matrix products; default: all cores.",
)


def use_threads(count: int | None) -> None:
    """Set the number of threads; UserError for more than there are cores, which would only slow each other down.

    Of several processes that were started together, each takes its share of the cores that none has for itself.
    """
    from ttr_gpu.distributed.launch import cores_of_process
    from ttr_gpu.errors import UserError
    from ttr_kernels.common.parallel import available_cores, limit_blas, set_threads

    if count is not None:
        if count > available_cores():
            raise UserError(f"--threads: got {count}, expected at most {available_cores()}, the cores usable here")
        set_threads(count)
    elif (share := cores_of_process(available_cores())) < available_cores():
        set_threads(share)
    limit_blas()
