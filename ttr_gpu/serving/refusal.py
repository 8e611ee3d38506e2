"""What the service refuses, and why: an HTTP status and one line."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP, 4xx where the client is to change something, 503 where it may come again.
        reason: what was got and what was expected.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
