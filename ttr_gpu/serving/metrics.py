"""What /metrics tells: counters and histograms in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one service, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("ttr_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "ttr_request_seconds", "Time to an answer", ["path"], buckets=_SECONDS, registry=registry
        )
        self.events = Counter("ttr_events", "Events taken in", registry=registry)
        self.round_seconds = Histogram(
            "ttr_round_seconds", "Time of a round of the engine", buckets=_SECONDS, registry=registry
        )
        self.round_requests = Histogram("ttr_round_requests", "Requests in a round", buckets=_SIZES, registry=registry)
        self.save_seconds = Histogram(
            "ttr_save_seconds", "Time of a writing of changed streams", buckets=_SECONDS, registry=registry
        )
        self.streams = Gauge("ttr_streams", "Streams that exist", registry=registry)
        self.streams_limit = Gauge("ttr_streams_limit", "Streams that may exist", registry=registry)
        self.waiting = Gauge("ttr_requests_waiting", "Requests that wait for an answer", registry=registry)

    def round_done(self, requests: int, events: int, seconds: float) -> None:
        """The engine has finished a round."""
        self.round_requests.observe(requests)
        self.round_seconds.observe(seconds)
        self.events.inc(events)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
