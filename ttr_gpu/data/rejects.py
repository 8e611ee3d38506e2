"""What happens to input that cannot be used: the run stops, or the input is set aside in a file with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from ..errors import UserError


class Rejects:
    """`--on-error fail`: the first problem is raised. `skip`: problems go to a JSONL file, are counted, and are passed
    over.

    Args:
        path: the file for rejects, opened on the first one; None: fail.
        hint: what is added to the message of a failure.
    """

    def __init__(self, path: Path | None = None, hint: str = " (--on-error skip sets such input aside)") -> None:
        self.path, self.count, self._hint = path, 0, hint
        self._file: IO[str] | None = None

    def add(self, where: str, reason: str, content: str = "") -> None:
        """Reject one thing found at `where` ("file:line")."""
        if self.path is None:
            raise UserError(f"{where}: {reason}{self._hint}")
        self.count += 1
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        record = {"where": where, "reason": reason, "content": content[:10000]}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        return f"{self.count:,} rejected, with reasons: {self.path}"

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
