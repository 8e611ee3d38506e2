"""The rates on which `cluster_plan` rests, measured here: each kind of a step's work alone, at the model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ttr_kernels.attention import TimeBias, attention_backward, attention_forward
from ttr_kernels.cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from ttr_kernels.dropout_add import dropout_add_forward
from ttr_kernels.matmul import linear_backward, linear_forward

from ..backend import Backend
from ..distributed.communicator import LOCAL, Communicator
from ..errors import UserError
from ..model_size import attention_pairs
from ..precision import precision
from .cluster_plan import Constant
from .config import RunConfig
from .memory_plan import full_batch

# Bytes of the arrays that show the memory's bandwidth, larger than caches; of a sum; of a message.
_STREAM, _SUM, _MESSAGE = 64 << 20, 16 << 20, 4096


def measured_rates(
    config: RunConfig, backend: Backend, communicator: Communicator = LOCAL, calls: int = 5
) -> dict[str, Constant]:
    """`products`, `attention` and `memory_bandwidth` of `cluster_plan.Constants`, each the median of so many calls. All
    ranks measure at once, and share what the slowest finds.

    Raises UserError for performer attention.
    """
    if config.model.attention == "performer":
        raise UserError("plan: measures softmax attention alone; got model.attention=performer: give --attention")
    seconds = _Clock(backend, communicator, calls)
    found = {
        "products": _products(config, backend, seconds),
        "attention": _attention(config, backend, seconds),
        "memory_bandwidth": _memory(config, backend, seconds),
    }
    return {name: Constant(value, "measured here") for name, value in found.items()}


def measured_sums(
    backend: Backend, communicator: Communicator, calls: int = 5, size: int = _SUM
) -> dict[str, Constant]:
    """`local_bandwidth` and `local_latency`, which sums of `size` bytes in the background have between the ranks, as
    `step_time.Link` counts them. Two ranks at least."""
    seconds = _Clock(backend, communicator, calls)

    def summing(nbytes: int) -> Callable[[], None]:
        array = backend.xp.zeros(nbytes // 4, np.float32)

        def work() -> None:
            communicator.start_all_reduce(array)
            communicator.wait()

        return work

    p, message, large = communicator.size, seconds(summing(_MESSAGE)), seconds(summing(size))
    # Under noise a large sum may take no longer than a small one: then its own time is all that is known.
    difference = large - message if large > message else large
    source = f"measured here, {p} ranks"
    return {
        "local_bandwidth": Constant(2 * (p - 1) / p * (size - _MESSAGE) / difference, source),
        "local_latency": Constant(message / (2 * int(np.ceil(np.log2(p)))), source),
    }


class _Clock:
    """Median seconds of so many calls, of the slowest rank."""

    def __init__(self, backend: Backend, communicator: Communicator, calls: int) -> None:
        self._backend, self._communicator, self._calls = backend, communicator, calls

    def __call__(self, work: Callable[[], Any]) -> float:
        times = []
        for _ in range(self._calls + 1):
            self._communicator.barrier()
            self._backend.synchronize()
            begin = time.perf_counter()
            work()
            self._backend.synchronize()
            times.append(time.perf_counter() - begin)
        # The first call loads kernels.
        own = np.array([np.median(times[1:])])
        return float(self._communicator.all_gather(own).max())


def _products(config: RunConfig, backend: Backend, seconds: _Clock) -> float:
    """Operations per second of the four linear layers of every block and of the head with its loss."""
    model, tokens, compute = config.model, config.train.tokens_per_batch, precision(config.model.precision).compute
    c, f, xp = model.embed_dim, model.hidden_dim, backend.xp
    shapes = [(c + 2 * model.kv_heads * model.head_dim, c), (c, c), (2 * f, c), (c, f)]
    spent = operations = 0.0
    for rows, columns in shapes:
        x, weight = _random(backend, (tokens, columns), compute), _random(backend, (rows, columns), compute)
        dy, gradient = xp.ones((tokens, rows), compute), xp.zeros((rows, columns), np.float32)

        def both(x: Any = x, weight: Any = weight, dy: Any = dy, gradient: Any = gradient) -> None:
            _, saved = linear_forward(x, weight)
            linear_backward(dy, saved, dweight=gradient, accumulate=False)

        spent += model.num_layers * seconds(both)
        operations += model.num_layers * 6.0 * rows * columns * tokens
    v = model.vocabulary_size
    x, weight = _random(backend, (tokens, c), compute), _random(backend, (v, c), compute)
    targets, gradient = backend.put(np.arange(tokens, dtype=np.int32) % v), xp.zeros((v, c), np.float32)

    def head() -> None:
        _, saved = linear_cross_entropy_forward(x, weight, targets)
        linear_cross_entropy_backward(1.0, saved, dweight=gradient, accumulate=False)

    return (operations + 6.0 * v * c * tokens) / (spent + seconds(head))


def _attention(config: RunConfig, backend: Backend, seconds: _Clock) -> float:
    """Operations per second of attention, forward and backward."""
    model, batch = config.model, full_batch(config)
    compute, heads = precision(model.precision).compute, (model.num_heads, model.kv_heads, model.kv_heads)
    q, k, v = (_random(backend, (len(batch.tokens), count, model.head_dim), compute) for count in heads)
    bias = None
    if model.time_bias != "none":
        rate, tau = (backend.put(np.full(model.num_heads, value, np.float32)) for value in (0.1, model.time_scale))
        bias = TimeBias(rate, tau, model.time_bias)
    times, dout = backend.put(batch.times), _random(backend, q.shape, compute)

    def both() -> None:
        _, saved = attention_forward(
            q,
            k,
            v,
            window=model.window,
            cu_seqlens=batch.cu_seqlens,
            times=times,
            time_bias=bias,
            dropout=model.dropout.attention,
        )
        attention_backward(dout, saved)

    return 14.0 * attention_pairs(batch.cu_seqlens, model) * model.embed_dim / seconds(both)


def _memory(config: RunConfig, backend: Backend, seconds: _Clock) -> float:
    """Bytes per second that an addition of two large arrays reads and writes."""
    compute, width = precision(config.model.precision).compute, config.model.embed_dim
    shape = (_STREAM // (compute.itemsize * width), width)
    x, y = (_random(backend, shape, compute) for _ in "xy")
    out = backend.xp.empty(shape, compute)
    moved = 3.0 * int(out.nbytes)
    return moved / seconds(lambda: dropout_add_forward(x, y, rate=0.0, out=out))


def _random(backend: Backend, shape: tuple[int, ...], dtype: Any) -> Any:
    return backend.put(np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype))
