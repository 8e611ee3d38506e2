"""`ttr-gpu info`: versions, devices, back ends, threads."""

from __future__ import annotations

import click

# By who multiplies, see ttr_kernels.matmul.cpu.
_FLOAT32 = {
    "split": "on the matrix unit (AMX), of three bfloat16 parts each", "own": "by own kernels", "blas": "by the BLAS"
}  # fmt: skip


@click.command()
@click.option("--keys", is_flag=True, help="List every key of `ttr-gpu train --set` with its default.")
@click.option("--distributed", is_flag=True, help="Say whether several processes could train together, and how.")
def info(keys: bool, distributed: bool) -> None:
    """Print versions, this machine, the device that would be used and why, and thread counts."""
    if keys:
        _print_keys()
        return
    if distributed:
        _print_distributed()
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from ttr_gpu.backend import choose_backend, gpu_facts
    from ttr_kernels.common.compilation import cache_directory
    from ttr_kernels.common.parallel import available_cores, blas_versions, get_threads
    from ttr_kernels.common.processor import processor
    from ttr_kernels.matmul.cpu import float32_products
    from ttr_kernels.matmul.onednn import why_not_bfloat16

    for name in ("ttr-gpu", "numpy", "numba", "ml_dtypes", "zarr", "tokenizers", "safetensors", "cupy-cuda13x",
                 "nvmath-python", "numba-cuda", "onednn-cpu-gomp"):  # fmt: skip
        try:
            click.echo(f"{name:<16} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name:<16} not installed")
    click.echo(f"{'python':<16} {platform.python_version()} on {platform.platform()}")
    click.echo(f"{'processor':<16} {processor()}, {available_cores()} cores usable")
    click.echo(f"{'threads':<16} {get_threads()} for kernels and matrix products (train --threads)")
    for line in blas_versions():
        click.echo(f"{'blas':<16} {line}")
    click.echo(f"{'float32':<16} matrix products {_FLOAT32[float32_products()]}")
    reason = why_not_bfloat16()
    multiplied = "in bfloat16, by oneDNN" if reason is None else f"in float32 ({reason})"
    click.echo(f"{'bfloat16':<16} matrix products {multiplied}")
    cache = cache_directory()
    compiled = "compiled" if cache is not None and any(cache.rglob("*.nbc")) else "not compiled yet"
    click.echo(f"{'kernel cache':<16} {cache or 'none: no folder can be written; set TTR_CACHE_DIR'} ({compiled})")
    backend = choose_backend()
    if backend.name == "gpu":
        for name, value in gpu_facts(backend).items():
            click.echo(f"{name:<16} {value}")
    click.echo(f"{'device':<16} {backend.device}")


def _print_distributed() -> None:
    from ttr_gpu.distributed.describe import describe

    for name, value in describe():
        click.echo(f"{name:<14} {value}")


def _print_keys() -> None:
    from ttr_gpu.train.config import key_table

    for key, default, description in key_table():
        click.echo(f"{key:<28} {default:<10} {description}")
