"""The stand-in for CuPy is as strict as CuPy, and has no function that CuPy lacks."""

import contextlib
import importlib
import io
import sys

import cupy_stand_in
import numpy as np
import pytest
from cupy_at_hand import stand_in


@pytest.fixture
def cupy():
    with stand_in() as module:
        yield module


def test_cupy_has_every_function_of_the_stand_in():
    real = pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'ttr-gpu[gpu]'")
    assert [name for name in cupy_stand_in.FUNCTIONS if not hasattr(real, name)] == []
    assert [name for name in cupy_stand_in.METHODS if not hasattr(real.ndarray, name)] == []


@pytest.mark.parametrize(
    "mix",
    [
        lambda device, host: np.exp(device),
        lambda device, host: np.asarray(device),
        lambda device, host: np.concatenate([device, device]),
        lambda device, host: device + host,
        lambda device, host: host + device,
        lambda device, host: device[host.astype(int)],
    ],
)
def test_host_and_device_do_not_mix(cupy, mix):
    host = np.ones(3, np.float32)
    with pytest.raises(TypeError):
        mix(cupy.asarray(host), host)


def test_numpy_function_refuses(cupy):
    with pytest.raises(TypeError):
        cupy.exp(np.ones(3))


def test_views_share_memory(cupy):
    x = cupy.zeros((2, 3), np.float32)
    x[1] += 2
    x.reshape(-1)[0] = 5
    assert x.get().tolist() == [[5, 0, 0], [2, 2, 2]]


def test_waits_are_counted(cupy):
    x = cupy.arange(4)
    before = cupy_stand_in.waits
    y = np.float32(2) * x + 1
    assert cupy_stand_in.waits == before
    assert float(y.sum()) == 16
    assert cupy_stand_in.waits == before + 1


def test_copies_on_a_stream_are_late(cupy):
    host, device, stream = np.ones(2), cupy.zeros(2), cupy.cuda.Stream(non_blocking=True)
    before = cupy_stand_in.waits
    device.set(host, stream=stream)
    first = stream.record()
    device[:1].set(np.full(1, 3.0), stream=stream)
    assert (first.done, device.host.tolist()) == (False, [0, 0])
    cupy.cuda.get_current_stream().wait_event(first)
    assert (first.done, device.host.tolist()) == (True, [1, 1])
    assert cupy_stand_in.waits == before
    stream.synchronize()
    assert device.host.tolist() == [3, 1]
    assert cupy_stand_in.waits == before + 1


def captured(cupy, work):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            work()
        finally:
            graph = stream.end_capture()
    return graph


def test_captured_work_is_done_when_it_is_launched_with_arrays_by_address_and_numbers_by_value(cupy):
    x, y, factor = cupy.arange(3.0), cupy.zeros(3), [2.0]
    graph = captured(cupy, lambda: (cupy.multiply(x, factor[0], out=y), y.__iadd__(1)))
    assert y.get().tolist() == [0, 0, 0]
    graph.launch()
    assert y.get().tolist() == [1, 3, 5]
    x[...], factor[0] = 10.0, 3.0
    graph.launch()
    assert y.get().tolist() == [21, 21, 21]


def test_results_of_captured_work_come_from_the_allocator_and_are_written_when_it_is_launched(cupy):
    x, kept = cupy.arange(4.0), []
    pool = cupy.get_default_memory_pool()
    memory = [pool.malloc(32) for _ in range(2)]

    def work():
        with cupy.cuda.using_allocator(lambda size: memory[len(kept)]):
            kept.append(x + 1)
            kept.append(kept[0].reshape(2, 2) * x[2:])

    graph = captured(cupy, work)
    x[0] = 7
    graph.launch()
    assert [each.get().tolist() for each in kept] == [[8, 2, 3, 4], [[16, 6], [6, 12]]]


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda cupy, x: x + 1, "memory is allocated"),
        (lambda cupy, x: cupy.empty(3), "memory is allocated"),
        (lambda cupy, x: cupy.cuda.alloc(3), "memory is allocated"),
        (lambda cupy, x: x.get(), "the host waits for the GPU"),
        (lambda cupy, x: float(x[0]), "the host waits for the GPU"),
        (lambda cupy, x: cupy.asarray(np.ones(3)), "memory of the host is copied"),
        (lambda cupy, x: x.set(np.arange(4.0)), "memory of the host is copied"),
        (lambda cupy, x: cupy.concatenate([x, x]), "memory of the host is copied"),
        (lambda cupy, x: cupy.cuda.get_current_stream().record(), "an event is recorded"),
    ],
)
def test_what_cannot_be_captured_is_refused(cupy, work, what):
    x = cupy.arange(4.0)
    with pytest.raises(RuntimeError, match=what):
        captured(cupy, lambda: work(cupy, x))
    assert x.get().tolist() == [0, 1, 2, 3]  # and after it all goes on


def test_a_graph_whose_memory_is_gone_is_not_launched(cupy):
    arrays = [cupy.zeros(3)]
    graph = captured(cupy, lambda: arrays[0].fill(1))
    graph.launch()
    arrays.clear()
    with pytest.raises(RuntimeError, match="memory that has been freed"):
        graph.launch()


def test_the_default_stream_is_not_captured(cupy):
    with pytest.raises(RuntimeError, match="default stream"):
        cupy.cuda.get_current_stream().begin_capture()


def test_what_is_imported_meanwhile_stays_imported():
    name = "this"  # of the standard library; nothing else imports it
    sys.modules.pop(name, None)
    with stand_in() as module, contextlib.redirect_stdout(io.StringIO()):
        assert importlib.import_module("cupy") is module
        importlib.import_module(name)
    assert name in sys.modules
    assert sys.modules.get("cupy") is not module
