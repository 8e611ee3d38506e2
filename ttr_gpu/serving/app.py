"""The HTTP service: routes, who may use them, limits, and what goes over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..data.timestamps import TimestampParser
from .engine import Answer, Seen, StreamEngine
from .forecast import described
from .metrics import CONTENT_TYPE, Metrics
from .refusal import Refusal
from .requests import read_predict, read_push
from .state import Keeper

DASHBOARD = Path(__file__).with_name("dashboard.html")
# Hosts by which a service without a token may be called: a page of another site that a browser on this machine shows
# could otherwise reach it under a name of its own.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Seconds between signs of life on a live connection.
HEARTBEAT = 10.0
# The page holds all it needs; nothing else may be loaded or sent anywhere.
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        body_bytes: of a request.
        body_seconds: for its body to arrive.
        watchers: live connections at once.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    watchers: int = 64


@dataclass(frozen=True)
class Model:
    """What the service tells of its model: a name, the types' names and the unit of times in seconds."""

    name: str
    types: list[str]
    time_unit_seconds: float


def make_app(
    engine: StreamEngine, model: Model, metrics: Metrics, *, token: str | None = None, limits: Limits | None = None,
    closing: asyncio.Event | None = None, keeper: Keeper | None = None,
) -> Starlette:  # fmt: skip
    """The service as an ASGI application.

    Args:
        token: what clients must send as `Authorization: Bearer …`; None: only calls to a loopback host are served.
        closing: set when the service is to end: live connections then end by themselves.
        keeper: saves the streams, the last time when all requests have been answered.
    """
    service = _Service(engine, model, metrics, token, limits or Limits(), closing or asyncio.Event())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(engine.run())
        keeping = None if keeper is None else asyncio.create_task(keeper.run())
        yield
        engine.close()
        await running
        if keeper is not None and keeping is not None:
            keeper.end()
            await keeping

    def route(
        path: str, handler: Callable[[Request], Awaitable[Response]], method: str, *, open: bool = False
    ) -> Route:
        return Route(path, service.guarded(path, handler, open), methods=[method])

    routes = [
        route("/", service.page, "GET", open=True),
        route("/health", service.health, "GET", open=True),
        route("/metrics", service.metrics_text, "GET"),
        route("/push", service.push, "POST"),
        route("/predict", service.predict, "POST"),
        route("/streams", service.list_streams, "GET"),
        route("/streams/{stream:path}", service.forget, "DELETE"),
        route("/live", service.live, "GET"),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _unrouted})


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and error.headers is not None:
        expected = error.headers["Allow"]
    else:
        expected = "/push, /predict, /streams, /live, /health, /metrics or /"
    reason = f"{request.method} {request.url.path}: {error.detail.lower()}; expected {expected}"
    return JSONResponse({"error": reason}, error.status_code, headers=error.headers)


class _Service:
    def __init__(
        self, engine: StreamEngine, model: Model, metrics: Metrics, token: str | None, limits: Limits,
        closing: asyncio.Event,
    ) -> None:  # fmt: skip
        self.engine, self.model, self.metrics, self.token, self.limits = engine, model, metrics, token, limits
        self.closing, self.watchers = closing, 0
        self.parse_time = TimestampParser(model.time_unit_seconds, assume_utc=None).parse
        metrics.streams_limit.set(engine.limit)

    def guarded(
        self, path: str, handler: Callable[[Request], Awaitable[Response]], open: bool
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the checks of who calls; refusals become answers, and all are counted."""

        async def call(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                self._check_caller(request, open)
                response = await handler(request)
            except Refusal as refusal:
                headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
                if refusal.status == 401:
                    headers = {"WWW-Authenticate": "Bearer"}
                response = JSONResponse({"error": refusal.reason}, refusal.status, headers=headers)
            self.metrics.requests.labels(path, response.status_code).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
            return response

        return call

    def _check_caller(self, request: Request, open: bool) -> None:
        if self.token is None:
            host = request.headers.get("host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name not in LOOPBACK:
                raise Refusal(421, f"host: got {host!r}, expected one of {', '.join(LOOPBACK)}; others need a --token")
        elif not open:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                raise Refusal(401, "authorization: expected `Bearer` and the service's token")

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # What a form of another site can send is of another type.
            raise Refusal(415, f"content-type: got {kind!r}, expected application/json")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise Refusal(413, f"body: got {declared} bytes, expected at most {most}")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise Refusal(413, f"body: got more than {most} bytes")
        except TimeoutError:
            raise Refusal(408, f"body: has not arrived within {self.limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise Refusal(400, "body: the client went away") from None
        return bytes(body)

    async def push(self, request: Request) -> Response:
        asked = read_push(await self._body(request), self.parse_time)
        answer = await self.engine.push(asked.stream, asked.types, asked.times, predict=asked.predict)
        return _json(self._answer(answer, asked.top))

    async def predict(self, request: Request) -> Response:
        asked = read_predict(await self._body(request), self.parse_time)
        return _json(self._answer(await self.engine.predict(asked.stream, asked.at), asked.top))

    def _answer(self, answer: Answer, top: int) -> dict[str, Any]:
        told: dict[str, Any] = {"stream": answer.stream, "events": answer.events, "last_time": answer.last_time}
        if answer.next is not None:
            told["next"] = described(answer.next, self.model.types, top)
        return told

    async def list_streams(self, request: Request) -> Response:
        streams = [self._answer(self.engine.describe(name), 0) for name in sorted(self.engine.rings)]
        return _json({"streams": [each for each in streams if each["events"]], "limit": self.engine.limit})

    async def forget(self, request: Request) -> Response:
        self.engine.forget(request.path_params["stream"])
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        status = "closing" if self.closing.is_set() else "ok"
        return _json({
            "status": status, "model": self.model.name, "streams": len(self.engine.rings), "limit": self.engine.limit,
            "waiting": self.engine.waiting,
        })  # fmt: skip

    async def metrics_text(self, request: Request) -> Response:
        self.metrics.streams.set(len(self.engine.rings))
        self.metrics.waiting.set(self.engine.waiting)
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def page(self, request: Request) -> Response:
        return HTMLResponse(DASHBOARD.read_text(), headers={"Content-Security-Policy": _PAGE_POLICY})

    async def live(self, request: Request) -> Response:
        """Server-sent events: the events of a stream as they come, with what is expected after them."""
        stream = request.query_params.get("stream", "")
        if not stream:
            raise Refusal(422, "stream: not given; expected /live?stream=NAME")
        if self.watchers >= self.limits.watchers:
            raise Refusal(503, f"{self.watchers} live connections are open already; come again later")
        return StreamingResponse(
            self._told(stream), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _told(self, stream: str) -> AsyncIterator[str]:
        # Here, not before: what never starts would never end.
        self.watchers += 1
        queue = self.engine.watch(stream)
        closing = asyncio.create_task(self.closing.wait())
        try:
            # What is expected now, for a page that has just been opened.
            with contextlib.suppress(Refusal):
                answer = await self.engine.predict(stream)
                if answer.next is not None:
                    yield _live({"types": [], "times": []}, self._expected(Seen(stream, [], [], answer.next)))
            while not closing.done():
                coming = asyncio.create_task(queue.get())
                await asyncio.wait({coming, closing}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    yield ": still here\n\n"
                    continue
                seen = coming.result()
                names = [self.model.types[kind] if isinstance(kind, int) else kind for kind in seen.types]
                yield _live({"types": names, "times": seen.times}, self._expected(seen))
        finally:
            closing.cancel()
            self.engine.unwatch(stream, queue)
            self.watchers -= 1

    def _expected(self, seen: Seen) -> dict[str, Any]:
        return described(seen.next, self.model.types, 8, density=True)


def _live(events: dict[str, Any], expected: dict[str, Any]) -> str:
    return f"data: {json.dumps(_finite({**events, 'next': expected}), allow_nan=False)}\n\n"


def _json(value: dict[str, Any]) -> Response:
    return JSONResponse(_finite(value))


def _finite(value: Any) -> Any:
    """JSON has no infinities: a quantile or a density that overflows is null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
