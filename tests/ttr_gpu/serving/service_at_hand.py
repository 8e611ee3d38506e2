"""A small model as a service inside the test's own process, called through ASGI."""

import asyncio
import contextlib
import functools

import numpy as np

from ttr_gpu.config import ModelConfig
from ttr_gpu.infer.event_stream import EventStreams
from ttr_gpu.model import TransformerModel

NAMES = ["login", "click", "buy", "logout"]


def make_model(seed=0, **changes):
    fields = {
        "vocabulary_size": 4, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 2, "window": 6,
        "time_features_dim": 6, "time_scale": 3.0, "time_span": 500.0, "time_components": 3,
    }  # fmt: skip
    model = TransformerModel(ModelConfig(**{**fields, **changes}), seed=seed)
    model.flat.values[...] *= 3.0
    return model


@functools.cache
def warm_up():
    """Compile what the service runs: on a slow machine that takes longer than a test may."""
    streams = EventStreams(make_model(), 1)
    streams.push([0], [0], [0.0])
    streams.push([0] * 20, [0] * 20, [1.0] * 20)
    streams.next_events([0])[0].quantiles([0.5])


class Service:
    """`async with Service(...) as service: await service.post("/push", {...})`."""

    def __init__(self, streams=8, token=None, headers=None, names=None, **options):
        from ttr_gpu.serving.app import Limits

        self.model = options.pop("model", None) or make_model()
        self.limits = options.pop("limits", None) or Limits()
        self.streams = EventStreams(self.model, streams, names=NAMES, origin=1.7e9)
        self.token, self.names, self.options = token, names, options
        self.headers = headers or {}

    async def __aenter__(self):
        import httpx2

        from ttr_gpu.serving.app import Model, make_app
        from ttr_gpu.serving.engine import StreamEngine
        from ttr_gpu.serving.metrics import Metrics

        metrics = Metrics()
        self.closing = asyncio.Event()
        self.engine = StreamEngine(self.streams, names=self.names, batch_done=metrics.round_done, **self.options)
        app = make_app(
            self.engine, Model("a model", NAMES, 1.0), metrics, token=self.token, limits=self.limits,
            closing=self.closing,
        )  # fmt: skip
        self._stack = contextlib.AsyncExitStack()
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        self.client = await self._stack.enter_async_context(
            httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=self.headers)
        )
        return self

    async def __aexit__(self, *error):
        await self._stack.aclose()

    async def post(self, path, value=None, **options):
        return await self.client.post(path, **({"json": value} if value is not None else {}), **options)

    async def push(self, stream, kind, time, **more):
        return await self.post("/push", {"stream": stream, "type": kind, "time": time, **more})


def events(count, seed=0):
    rng = np.random.default_rng(seed)
    times = 1.7e9 + np.cumsum(rng.exponential(3.0, count))
    return [NAMES[kind] for kind in rng.integers(0, 4, count)], times.tolist()
