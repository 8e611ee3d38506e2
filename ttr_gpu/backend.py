"""Where a model computes: the CPU, or a CUDA GPU through CuPy.

Everything that differs between the two beyond the kind of array is here: choosing one, copying to and from it, waiting
for it, and its memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from ttr_kernels.common.arrays import Array, empty
from ttr_kernels.common.cuda.launch import modules_compiled

from .errors import UserError
from .memory import available_bytes, resident_bytes

# The target of a sequence's last event, where its survival until the end of observation counts.
CENSORED = -2


class PackedTokens(Protocol):
    """What a model reads of a batch (ttr_gpu.data.batches.Batch has it)."""

    @property
    def tokens(self) -> Array:
        """(total,) int32."""

    @property
    def times(self) -> Array:
        """(total,) float64."""

    @property
    def cu_seqlens(self) -> Array:
        """(N + 1,) int32, where sequences begin; always a NumPy array."""

    @property
    def targets(self) -> Array:
        """(total,) int32, −1 for none, CENSORED where nothing more happened until the target's time."""

    @property
    def target_times(self) -> Array:
        """(total,) float64, when the targets happened; read by models of time alone."""


class PlacedTokens(NamedTuple):
    """A batch whose arrays are where the model computes; `censored` is what `censored_positions` found on the host."""

    tokens: Array
    times: Array
    cu_seqlens: Array
    targets: Array
    target_times: Array
    censored: Array | None = None


def censored_positions(batch: PackedTokens) -> Array | None:
    """Positions after which nothing more happened, a NumPy array; None if there are none."""
    if isinstance(batch, PlacedTokens):
        return batch.censored
    found = np.flatnonzero(np.equal(batch.targets, CENSORED, out=empty(len(batch.targets), bool)))
    return found if len(found) else None


@dataclass(frozen=True)
class Backend:
    """A device and its arrays.

    Attributes:
        name: "cpu" or "gpu".
        xp: NumPy or CuPy.
        device: its own name, and why it was chosen.
    """

    name: str
    xp: ModuleType
    device: str

    def put(self, array: Array) -> Array:
        """A NumPy array as an array of this device (the same one on a CPU)."""
        placed: Array = self.xp.asarray(array)
        return placed

    def place(self, batch: PackedTokens) -> PackedTokens:
        """The batch as arrays of this device."""
        if self.name == "cpu" or isinstance(batch, PlacedTokens):
            return batch
        tokens, times, targets = self.put(batch.tokens), self.put(batch.times), self.put(batch.targets)
        later = self.put(batch.target_times)
        return PlacedTokens(tokens, times, batch.cu_seqlens, targets, later, censored_positions(batch))

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.name == "gpu":
            self.xp.cuda.get_current_stream().synchronize()

    def free_bytes(self) -> int:
        """Memory that the device can still give; 0 where that is not known."""
        return available_bytes() if self.name == "cpu" else int(self.xp.cuda.runtime.memGetInfo()[0])

    def used_bytes(self) -> int:
        """Memory that the process takes (on a GPU: that CuPy's pool holds)."""
        return resident_bytes() if self.name == "cpu" else int(self.xp.get_default_memory_pool().total_bytes())


CPU = Backend("cpu", np, "CPU")


def to_host(array: Any) -> Array:
    """A NumPy array (itself, or a copy from the GPU, which is waited for)."""
    if isinstance(array, np.ndarray):
        return array
    host: Array = sys.modules["cupy"].asnumpy(array)
    return host


def copy_to_host(target: Array, source: Array) -> None:
    """target[...] = source, where target is a NumPy array of its shape and dtype; waits for a GPU's."""
    if isinstance(source, np.ndarray):
        np.copyto(target, source)
    else:
        source.get(out=target)


def copy_into(target: Array, source: Array) -> None:
    """target[...] = source, a NumPy array of its shape; target may be on a GPU."""
    if isinstance(target, np.ndarray):
        target[...] = source
    else:
        target.set(np.ascontiguousarray(source, target.dtype))


def choose_backend(wanted: str = "auto", number: int = 0) -> Backend:
    """The device that is asked for: "cpu", "gpu", or "auto", a GPU if there is one. `TTR_BACKEND` stands in for "auto".

    Of several processes on a machine, each gives its `number` there, and so its GPU.

    Raises UserError naming what a GPU lacks (CuPy, driver, device) and what to do.
    """
    source = "--device"
    if wanted == "auto" and os.environ.get("TTR_BACKEND", "auto") != "auto":
        wanted, source = os.environ["TTR_BACKEND"], "TTR_BACKEND"
    if wanted not in ("auto", "cpu", "gpu"):
        raise UserError(f"{source}: got {wanted!r}, expected auto, cpu or gpu")
    if wanted == "cpu":
        return replace(CPU, device="CPU (asked for)")
    lacking = _lacking()
    if lacking is None:
        return _gpu("asked for" if wanted == "gpu" else "there is one", number)
    if wanted == "gpu":
        raise UserError(f"{source}: got gpu, but {lacking}; or use --device cpu")
    return replace(CPU, device=f"CPU ({lacking.partition(':')[0]})")


def gpu_facts(backend: Backend) -> dict[str, str]:
    """What `ttr-gpu info` prints of the GPU: name, driver, CUDA, memory, and the kernels compiled for it so far."""
    cupy = backend.xp
    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    capability = f"{device.compute_capability[:-1]}.{device.compute_capability[-1]}"
    free, total = runtime.memGetInfo()
    return {
        "gpu": f"{runtime.getDeviceProperties(device.id)['name'].decode()}, compute capability {capability}, "
        f"{device.attributes['MultiProcessorCount']} multiprocessors",
        "gpu memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free",
        "cuda": f"driver {_cuda(runtime.driverGetVersion())}, runtime {_cuda(runtime.runtimeGetVersion())}, "
        f"CuPy {cupy.__version__}",
        "gpu kernels": f"{len(modules_compiled())} compiled on this machine",
    }


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu(why: str, number: int) -> Backend:
    cupy = importlib.import_module("cupy")
    runtime = cupy.cuda.runtime
    if number > 0:
        # Slurm may show each process a GPU of its own, which is then the only one.
        cupy.cuda.Device(number % int(runtime.getDeviceCount())).use()
    device = int(runtime.getDevice())
    name = runtime.getDeviceProperties(device)["name"].decode()
    return Backend("gpu", cupy, f"GPU {device}, {name} ({why})")


def _lacking() -> str | None:
    """What a GPU lacks before anything can run on it, "what: remedy"; None if nothing does."""
    for package, wheel in (("cupy", "CuPy"), ("nvmath", "nvmath-python")):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            return f"{wheel} is not installed: pip install 'ttr-gpu[gpu]' (for CUDA 12: 'ttr-gpu[gpu-cuda12]')"
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # its shared libraries fail in ways of their own
        return f"CuPy cannot be imported ({_first_line(error)}): reinstall it with pip install 'ttr-gpu[gpu]'"
    try:
        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
        return "no CUDA device is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    except Exception as error:
        said = _first_line(error)
        if "InsufficientDriver" in said or "driver" in said.lower():
            return f"there is no NVIDIA driver, or one too old for this CuPy ({said}): see docs/BUILD_GPU.md"
        return f"no CUDA device can be used ({said}): look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
