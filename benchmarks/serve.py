"""Load on the HTTP service: time to an answer and events per second at 1, 10 and 100 clients, and whose answer it was.

The service, with an untrained model, runs in a process of its own; the clients, each with a stream and a connection of
its own, run in this one. Each pushes an event, asks in the same request what comes next, and waits for the answer.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig

from .harness import machine, result_file, write_result

TYPES = [f"type-{number}" for number in range(64)]
MODEL = ModelConfig(vocabulary_size=len(TYPES), window=128, time_components=8, **PRESETS["tiny"])
CLIENTS = (1, 10, 100)
# What a probability may differ by from that of a stream alone.
AGREEMENT = 1e-4


def run_service(pipe: Any, threads: int) -> None:
    """The service's process: tells its port, and serves until SIGTERM."""
    from ttr_gpu.infer.event_stream import EventStreams
    from ttr_gpu.model import TransformerModel
    from ttr_gpu.serving.app import Model, make_app
    from ttr_gpu.serving.engine import StreamEngine
    from ttr_gpu.serving.metrics import Metrics
    from ttr_gpu.serving.server import open_socket, serve
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    streams = EventStreams(TransformerModel(MODEL), 1 + sum(CLIENTS), names=TYPES)
    listening = open_socket("127.0.0.1", 0)
    pipe.send(listening.getsockname()[1])

    def app(closing: asyncio.Event) -> Any:
        metrics = Metrics()
        engine = StreamEngine(streams, batch_done=metrics.round_done)
        return make_app(engine, Model("benchmark", TYPES, 1.0), metrics, closing=closing)

    serve(app, listening)


class Client:
    """One stream over one connection."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.rng = name, np.random.default_rng(seed)
        self.time, self.types, self.times = 0.0, [], []  # type: float, list[int], list[float]
        self.seconds: list[float] = []
        self.last: dict[str, Any] = {}

    async def run(self, port: int, until: float) -> None:
        """Push until a moment of the clock, and hold every answer to what was sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while time.perf_counter() < until:
                self.time += float(self.rng.exponential(1.0))
                self.types.append(int(self.rng.integers(len(TYPES))))
                self.times.append(self.time)
                body = json.dumps({
                    "stream": self.name, "type": TYPES[self.types[-1]], "time": self.time, "predict": True, "top": 64,
                }).encode()  # fmt: skip
                begun = time.perf_counter()
                self.last = await _post(reader, writer, port, body)
                self.seconds.append(time.perf_counter() - begun)
                told = self.last["stream"], self.last["events"], self.last["last_time"]
                if told != (self.name, len(self.types), self.time):
                    raise click.ClickException(f"{self.name}: was answered as {told}")
        finally:
            writer.close()


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, body: bytes) -> dict[str, Any]:
    head = f"POST /push HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    length = 0
    while (line := await reader.readline()) not in (b"\r\n", b""):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    answer = await reader.readexactly(length)
    if b" 200 " not in status:
        raise click.ClickException(f"{status.decode().strip()}: {answer.decode()}")
    found: dict[str, Any] = json.loads(answer)
    return found


def check_streams(clients: list[Client]) -> float:
    """The largest difference of a probability in a last answer from that of the same events in a stream alone."""
    from ttr_gpu.infer.event_stream import EventStream
    from ttr_gpu.model import TransformerModel

    model, worst = TransformerModel(MODEL), 0.0
    for client in clients:
        alone = EventStream(model, names=TYPES)
        # What a window of 128 in 4 layers can still see.
        for kind, when in zip(client.types, client.times, strict=True):
            alone.push(kind, when)
        expected = alone.next().types
        found = {each["type"]: each["probability"] for each in client.last["next"]["types"]}
        worst = max(worst, float(np.abs(expected - [found[name] for name in TYPES]).max()))
    return worst


async def load(port: int, count: int, seconds: float, what: str = "client") -> tuple[list[Client], float]:
    """So many clients at once for so long; half a second before it counts for nothing."""
    clients = [Client(f"{what} {number} of {count}", 1000 * count + number) for number in range(count)]
    await asyncio.gather(*(client.run(port, time.perf_counter() + 0.5) for client in clients))
    for client in clients:
        client.seconds.clear()
    begun = time.perf_counter()
    await asyncio.gather(*(client.run(port, begun + seconds) for client in clients))
    return clients, time.perf_counter() - begun


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the service; default: all cores.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="With each number.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
def serve(threads: int | None, seconds: float, output: Path | None) -> None:
    """Load the HTTP service with 1, 10 and 100 clients."""
    threads = threads or machine()["cores"]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_service, args=(theirs, threads), daemon=True)
    process.start()
    try:
        port = ours.recv()
        asyncio.run(load(port, 1, 0.5, "warm-up"))  # compiles kernels
        rows, worst = [], 0.0
        for count in CLIENTS:
            clients, lasted = asyncio.run(load(port, count, seconds))
            taken = [each for client in clients for each in client.seconds]
            cuts = statistics.quantiles(taken, n=100, method="inclusive")
            row = {"clients": count, "events": len(taken), "events_per_second": len(taken) / lasted}
            row |= {"p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98]}
            rows.append(row)
            print(
                f"{count:>4} clients: {row['events_per_second']:>7.0f} events/s, p50 {row['p50_ms']:.1f} ms, "
                f"p99 {row['p99_ms']:.1f} ms"
            )
            worst = max(worst, check_streams(clients))
    finally:
        if process.pid is not None and process.is_alive():
            process.terminate()
        process.join(30)
    if not worst <= AGREEMENT:
        raise click.ClickException(f"an answer differs by {worst:.2g} from that of the same events in a stream alone")
    if process.exitcode not in (0, -signal.SIGTERM):
        raise click.ClickException(f"the service ended with code {process.exitcode}")
    print(f"every stream's last answer is that of a stream alone, to {worst:.1g}")
    result = {"threads": threads, "seconds": seconds, "model": MODEL.model_dump(), "rows": rows, "difference": worst}
    write_result(output or result_file("serve"), "serve", result, "starlette", "uvicorn")
