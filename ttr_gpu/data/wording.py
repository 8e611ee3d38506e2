"""How values and errors of the input are worded in messages."""

from __future__ import annotations

import json
from typing import Any


def shown(value: Any, most: int = 60) -> str:
    """A value as in Python, shortened."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def json_reason(error: Exception, column: bool = True) -> str:
    """What is wrong with JSON, without Python's place in its buffer; `column`: where in the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})" if column else error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
