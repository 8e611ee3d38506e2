"""Run by test_communicators.py on every rank of MPI: each collective beside what NumPy gives for all ranks' arrays."""

import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from ttr_gpu.distributed.communicator import exchange
from ttr_gpu.distributed.mpi import MpiCommunicator

communicator = MpiCommunicator()
rank, size = communicator.rank, communicator.size
assert size == int(sys.argv[1])
assert communicator.local_size == size
assert "MPI" in communicator.name
# A killed rank leaves nothing in memory that a later run could take for its own.
maps = Path("/proc/self/maps")
assert not maps.exists() or not re.search(r"/dev/shm/mpich_shm_\w+$", maps.read_text(), re.MULTILINE)


def of_rank(number: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    values = np.random.default_rng(number).standard_normal(shape)
    return (100 * values).astype(dtype)


for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint16):
    for shape in ((1,), (1001,), (size, 37)):
        everyone = [of_rank(number, shape, dtype) for number in range(size)]
        mine = everyone[rank].copy()
        communicator.all_reduce(mine)
        wide = [a.astype(np.float32) if np.dtype(dtype).itemsize == 2 and dtype != np.uint16 else a for a in everyone]
        expected = np.sum(wide, axis=0, dtype=wide[0].dtype).astype(dtype)
        kind = "exact" if size == 2 or np.dtype(dtype).kind in "iu" else "rounded"
        if kind == "exact":
            np.testing.assert_array_equal(mine, expected)
        else:
            np.testing.assert_allclose(mine.astype(float), expected.astype(float), rtol=1e-2, atol=1e-3)
        again = everyone[rank].copy()
        communicator.start_all_reduce(again)
        (span,) = communicator.wait()
        np.testing.assert_array_equal(again, mine)
        assert span.end > span.begin
        assert span.bytes == mine.nbytes
        for root in range(size):
            sent = everyone[rank].copy()
            communicator.broadcast(sent, root)
            np.testing.assert_array_equal(sent, everyone[root])
        np.testing.assert_array_equal(communicator.all_gather(everyone[rank]), np.stack(everyone))
        if shape[0] == size:
            np.testing.assert_array_equal(communicator.reduce_scatter(everyone[rank]), mine[rank])

values = np.array([rank, -rank], np.float64)
communicator.all_reduce(values, "max")
np.testing.assert_array_equal(values, [size - 1, 0])
communicator.all_reduce(values, "min")

# Many sums at once, of different sizes, come back each to its array and in order.
arrays = [np.full(1 + 4099 * n, rank + n, np.float32) for n in range(12)]
for array in arrays:
    communicator.start_all_reduce(array)
spans = communicator.wait()
assert [span.bytes for span in spans] == [array.nbytes for array in arrays]
for n, array in enumerate(arrays):
    np.testing.assert_array_equal(array, np.full_like(array, sum(r + n for r in range(size))))

said = exchange(communicator, {"rank": rank, "text": "é" * rank})
assert said == [{"rank": r, "text": "é" * r} for r in range(size)]
communicator.barrier()
communicator.close()
print(f"rank {rank} agrees")
