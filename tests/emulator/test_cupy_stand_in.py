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


def test_what_is_imported_meanwhile_stays_imported():
    name = "this"  # of the standard library; nothing else imports it
    sys.modules.pop(name, None)
    with stand_in() as module, contextlib.redirect_stdout(io.StringIO()):
        assert importlib.import_module("cupy") is module
        importlib.import_module(name)
    assert name in sys.modules
    assert sys.modules.get("cupy") is not module
