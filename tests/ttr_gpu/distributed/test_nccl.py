"""The NCCL communicator, on a stand-in: what is asked of NCCL and CuPy, and in which order of streams."""

import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from nccl_stand_in import NcclStandIn, Ndarray

from ttr_gpu.distributed.communicator import exchange
from ttr_gpu.distributed.nccl import NcclCommunicator, new_identifier
from ttr_gpu.errors import UserError

RANKS = 3


def on_ranks(work):
    """What `work(communicator, cupy)` returns on each of the ranks, which are threads."""
    shared = NcclStandIn(RANKS)
    results, problems = [None] * RANKS, []

    def run(rank):
        try:
            cupy = shared.cupy()
            communicator = NcclCommunicator(cupy, rank, RANKS, rank, RANKS, new_identifier(cupy))
            results[rank] = work(communicator, cupy)
            communicator.close()
        except BaseException as error:
            problems.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if problems:
        raise problems[0]
    assert shared.destroyed == set(range(RANKS))
    return results


def of_rank(rank, dtype, shape=(RANKS, 41)):
    return (100 * np.random.default_rng(rank).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8])
@pytest.mark.parametrize("place", ["gpu", "host"])
def test_collectives(dtype, place):
    everyone = [of_rank(rank, dtype) for rank in range(RANKS)]
    total = everyone[0] + everyone[1] + everyone[2]

    def work(communicator, cupy):
        def placed(array):
            return Ndarray(array.copy()) if place == "gpu" else array.copy()

        def values(array):
            return cupy.asnumpy(array) if place == "gpu" else array

        mine = everyone[communicator.rank]
        summed, largest, sent = placed(mine), placed(mine), placed(mine)
        communicator.all_reduce(summed)
        communicator.all_reduce(largest, "max")
        communicator.broadcast(sent, 1)
        communicator.barrier()
        gathered, row = communicator.all_gather(placed(mine)), communicator.reduce_scatter(placed(mine))
        assert isinstance(gathered, Ndarray if place == "gpu" else np.ndarray)
        return [values(array) for array in (summed, largest, sent, gathered, row)]

    for rank, (summed, largest, sent, gathered, row) in enumerate(on_ranks(work)):
        np.testing.assert_array_equal(summed, total)
        np.testing.assert_array_equal(largest, np.max(everyone, axis=0))
        np.testing.assert_array_equal(sent, everyone[1])
        np.testing.assert_array_equal(gathered, np.stack(everyone))
        np.testing.assert_array_equal(row, total[rank])


def test_background_sums_come_after_what_was_computed_and_before_what_follows():
    def work(communicator, cupy):
        arrays = [Ndarray(np.zeros(7, np.float32)) for _ in range(4)]
        computing, seen = cupy.cuda.get_current_stream(), []

        def write(array, value):
            array.host[...] = value

        for n, array in enumerate(arrays):
            computing.submit(lambda array=array, n=n: write(array, communicator.rank + n))
            communicator.start_all_reduce(array)
        assert communicator.wait() == []
        computing.submit(lambda: seen.extend(float(array.host[0]) for array in arrays))
        computing.synchronize()
        return seen

    assert on_ranks(work) == [[float(3 + 3 * n) for n in range(4)]] * RANKS


def test_small_messages_travel_as_arrays():
    assert (
        on_ranks(lambda communicator, cupy: exchange(communicator, {"r": communicator.rank}))
        == [[{"r": rank} for rank in range(RANKS)]] * RANKS
    )


def test_a_cupy_without_nccl_is_named():
    cupy = SimpleNamespace(cuda=SimpleNamespace(nccl=SimpleNamespace(available=False)))
    with pytest.raises(UserError, match="NCCL: this CuPy was built without it"):
        new_identifier(cupy)


def test_complex_numbers_are_no_gradients():
    def work(communicator, cupy):
        communicator.all_reduce(Ndarray(np.zeros(2, complex)))

    with pytest.raises(TypeError, match="complex128"):
        on_ranks(work)
