"""The process that serves: its socket, its signals, and its end, at which no stream is lost."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp
from uvicorn import Config, Server

from ..errors import UserError

# Seconds that clients have to take their answers once the service is to end.
GRACE = 15


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With its protocol said: otherwise asyncio leaves Nagle's delay on, and an answer in two parts takes 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
        return listening
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}; "
            "--port 0 takes any that is free"
        ) from None


def url_of(listening: socket.socket) -> str:
    """Where the service is."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(Server):
    """Uvicorn's, which tells the application before it waits for open connections, and ends as if by itself."""

    def __init__(self, config: Config, asked_to_end: Callable[[], object]) -> None:
        super().__init__(config)
        self._asked_to_end = asked_to_end

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn raises the signal again when it has ended: the command would look killed.
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: object) -> None:
        # The second Ctrl-C does not wait for clients.
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True
        self._asked_to_end()


def serve(app: Callable[[asyncio.Event], ASGIApp], listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; returns when every request has been answered and the application has ended.

    Args:
        app: makes the application from an event that is set when the service is to end.
    """

    async def run() -> bool:
        closing = asyncio.Event()
        loop = asyncio.get_running_loop()
        config = Config(
            app(closing), lifespan="on", log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE,
            server_header=False,
        )  # fmt: skip
        server = _Server(config, lambda: loop.call_soon_threadsafe(closing.set))
        await server.serve(sockets=[listening])
        return bool(server.lifespan.should_exit)

    if asyncio.run(run()):
        raise RuntimeError("the service did not start or end as it should: see above")
