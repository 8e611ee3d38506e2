"""The step on paper against sums done by hand."""

from dataclasses import replace

import pytest

from ttr_gpu.distributed.step_time import Link, Network, Rates, Work, pipelined, step_time

ALONE = Link(1, 1.0, 1.0)
# 2 + 1 + 1 s of work, of which 40 % are the backward of 4 blocks; three pieces, the last one when all is done.
WORK = Work(
    products=200.0, attention=10.0, passes=5.0, blocks_backward=0.4, batches=1.0,
    pieces=[(2, 40.0), (4, 40.0), (4, 20.0)], layers=4, update=15.0, values=100.0,
)  # fmt: skip
RATES = Rates(products=100.0, attention=10.0, memory=5.0)


def between_two(bandwidth, latency=0.0, overlap=1.0):
    return Network(ALONE, Link(2, bandwidth, latency), overlap)


@pytest.mark.parametrize(
    ("members", "size", "expected"),
    [
        (1, 1e9, 0.0),
        (2, 100.0, 2 * 0.5 + 2 * (1 / 2) * 100 / 50),  # 3 s
        (3, 60.0, 2 * 2 * 0.5 + 2 * (2 / 3) * 60 / 50),  # 3.6 s
        (8, 80.0, 2 * 3 * 0.5 + 2 * (7 / 8) * 80 / 50),  # 5.8 s
    ],
)
def test_a_sum_is_a_reduce_scatter_and_an_all_gather(members, size, expected):
    assert Link(members, bandwidth=50.0, latency=0.5).sum_seconds(size) == pytest.approx(expected, rel=1e-12)


def test_ranks_of_a_machine_share_the_way_out():
    network = Network(Link(8, 100.0, 0.01), Link(4, 10.0, 0.1))
    # Inside 2·3·0.01 + 2·7/8·800/100 = 14.06; between 2·2·0.1 + 2·3/4·(800/8)/10 = 15.4.
    assert network.sum_seconds(800.0) == pytest.approx(29.46, rel=1e-12)
    # 32 broadcasts, 3 messages inside and 2 between each, and all bytes once over the narrower way.
    assert network.gather_seconds(800.0) == pytest.approx(32 * (3 * 0.01 + 2 * 0.1) + 80.0, rel=1e-12)
    assert network.ranks == 32


def test_one_rank_waits_for_nobody():
    time = step_time(WORK, RATES, Network(ALONE, ALONE))
    assert (time.compute, time.sums, time.exposed, time.update, time.gather) == (4.0, 0.0, 0.0, 3.0, 0.0)
    assert step_time(WORK, RATES, Network(ALONE, ALONE), sharded=True) == time


@pytest.mark.parametrize(
    ("bandwidth", "exposed"),
    [
        # Backward 1.6 s; pieces of 40, 40, 20 bytes ready at 0.8, 1.6, 1.6 s.
        (1e9, 0.0),
        (100.0, 0.6),  # 0.4, 0.4, 0.2 s: the first is done at 1.2, the others at 2.0 and 2.2
        (40.0, 1.7),  # 1, 1, 0.5 s: done at 1.8, 2.8, 3.3
        (1.0, 99.2),  # 40, 40, 20 s: one after the other from 0.8 on
    ],
)
def test_sums_hide_behind_the_backward(bandwidth, exposed):
    time = step_time(WORK, RATES, between_two(bandwidth))
    assert time.sums == pytest.approx(100.0 / bandwidth)
    assert time.exposed == pytest.approx(exposed, abs=1e-6)
    assert time.total == pytest.approx(4.0 + exposed + 3.0, abs=1e-6)


def test_without_overlap_every_sum_is_waited_for():
    time = step_time(WORK, RATES, between_two(40.0, overlap=0.0))
    assert time.exposed == pytest.approx(time.sums) == pytest.approx(2.5)
    # Half of each second is taken: ready at 0.8, 1.6 + 0.5, 1.6 + 1.0; done at 1.8, 3.1, 3.6.
    assert step_time(WORK, RATES, between_two(40.0, overlap=0.5)).exposed == pytest.approx(2.0)


def test_only_the_last_batch_hides_sums():
    once, thrice = (step_time(replace(WORK, batches=n), RATES, between_two(40.0)) for n in (1.0, 3.0))
    assert thrice.compute == 3 * once.compute
    assert thrice.exposed == once.exposed


def test_shared_moments():
    time = step_time(WORK, RATES, between_two(40.0, latency=0.25), sharded=True)
    assert time.update == 1.5
    # Two broadcasts of a message each, and 100 bytes.
    assert time.gather == pytest.approx(2 * 0.25 + 2.5)
    assert time.total == pytest.approx(time.compute + time.exposed + time.update + time.gather)


def test_a_pipeline_ends_with_the_backward_or_the_last_sum():
    assert pipelined([1.0, 5.0], [1.0, 0.0], 1.0) == 5.0
    assert pipelined([1.0, 1.0], [3.0, 2.0], 1.0) == 6.0
    assert pipelined([1.0, 1.0], [3.0, 2.0], 0.0) == 6.0
    assert pipelined([4.0, 6.0], [1.0, 1.0], 0.0) == 8.0
