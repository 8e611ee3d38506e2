"""Grids in which a thread has a row (y) and a place in it (x)."""

from __future__ import annotations

import functools


@functools.lru_cache(maxsize=1024)
def grid_of_rows(rows: int, places: int, threads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((blocks down the rows, blocks across a row), (threads across, threads down)) for at most `threads` a block.

    Rows are grid.x, which may be larger than grid.y: a thread's row is blockIdx.x · blockDim.y + threadIdx.y, its place
    blockIdx.y · blockDim.x + threadIdx.x. Some threads of the last blocks have a row or place beyond the last.
    """
    blocks_across = -(-places // threads)
    across = -(-places // blocks_across)
    down = min(threads // across, rows)
    return (-(-rows // down), blocks_across), (across, down)
