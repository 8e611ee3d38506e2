"""The folder that keeps what has been compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`TTR_CACHE_DIR`, else `ttr-gpu` in `XDG_CACHE_HOME` or `~/.cache`. It need not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ttr-gpu"
    return Path(os.environ.get("TTR_CACHE_DIR") or home).expanduser()
