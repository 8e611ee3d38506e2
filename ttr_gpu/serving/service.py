"""A trained model as a service: what the pieces of this package are for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
from starlette.applications import Starlette

from ..errors import UserError
from ..infer.event_stream import EventStreams
from ..infer.trained import Trained
from .app import Limits, Model, make_app
from .engine import StreamEngine
from .metrics import Metrics
from .server import is_loopback, open_socket, serve, url_of
from .state import Keeper, load_streams, prepare


class Service:
    """Streams of one model, and the application that serves them.

    Args:
        trained: a model of events.
        name: of the model, for /health.
        streams: how many may exist at once.
        capacity: events that a stream remembers where the model has no window.
        state: folder from which streams come and to which they go; None: they end with the service.
        save_every: seconds, of which a crash may lose the streams' last; see Keeper.
        say: prints a line.
        token: what clients must send; None: loopback callers alone.
        max_request_bytes, patience: see Limits and StreamEngine.

    Raises:
        UserError: a model of texts or without times, a state that cannot be read or of another model.
    """

    def __init__(
        self, trained: Trained, *, name: str, streams: int, capacity: int | None, state: Path | None,
        save_every: float, say: Callable[[str], object], token: str | None, max_request_bytes: int, patience: float,
    ) -> None:  # fmt: skip
        if not isinstance(trained.tokenizer, list) or trained.time_unit_seconds is None:
            raise UserError(f"{name}: was trained on texts or without times; expected a model of events with times")
        self.streams = EventStreams(
            trained.model, streams, names=trained.tokenizer, origin=trained.origin, capacity=capacity
        )
        self.token, self.state, self.patience, self.save_every, self.say = token, state, patience, save_every, say
        self.limits = Limits(body_bytes=max_request_bytes)
        self.model = Model(name, trained.tokenizer, trained.time_unit_seconds)
        self.names: dict[str, int] = {}
        if state is not None:
            prepare(state)
            self.names = load_streams(state, self.streams)
            self.streams.fingerprint()  # which takes a while with many weights
        self.keeper: Keeper | None = None

    def warm_up(self) -> None:
        """Compile and touch what the first request would wait for."""
        scratch = EventStreams(self.streams.model, 1)
        scratch.push([0], [0], [0.0])
        predicted = scratch.next_events([0])[0]
        if predicted.gap is not None:
            predicted.quantiles(np.array([0.5]))

    def application(self, closing: asyncio.Event | None = None) -> Starlette:
        """The ASGI application; at its end streams are saved. Made within the event loop that runs it."""
        metrics = Metrics()
        engine = StreamEngine(self.streams, names=self.names, patience=self.patience, batch_done=metrics.round_done)

        if self.state is not None:
            self.keeper = Keeper(self.state, engine, self.save_every, self.say, metrics.save_seconds.observe)
        return make_app(
            engine, self.model, metrics, token=self.token, limits=self.limits, closing=closing, keeper=self.keeper
        )


def serve_until_asked(service: Service, host: str, port: int) -> None:
    """Serve on an address until SIGINT or SIGTERM. UserError if it cannot be, lacks a token, or cannot save its streams
    at the end."""
    if service.token is None and not is_loopback(host):
        raise UserError(
            f"--host: got {host}, which others can reach; set what they must send: --token or TTR_SERVE_TOKEN"
        )
    if service.token is not None and (
        not service.token.isprintable() or " " in service.token or len(service.token) < 8
    ):
        raise UserError("--token: expected at least 8 printable characters without spaces")
    listening = open_socket(host, port)
    with listening:
        service.warm_up()
        loaded = f", {len(service.names)} loaded" if service.names else ""
        most = len(service.streams.cache.lengths)
        service.say(f"serving on {url_of(listening)} (up to {most} streams{loaded}; Ctrl-C ends it)")
        serve(service.application, listening)
    if service.keeper is not None:
        if service.keeper.failure is not None:
            raise UserError(service.keeper.failure)
        service.say(f"{service.keeper.count} streams saved in {service.state}")
