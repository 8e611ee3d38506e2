"""Bodies of requests: JSON to plain, checked values. Nothing here knows of models or streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ..data.wording import shown
from .refusal import Refusal

# Characters of a stream's name, and most likely types that are told unless asked otherwise.
LONGEST_NAME = 200
DEFAULT_TOP = 10


@dataclass(frozen=True)
class Push:
    """Events of one stream, in their order."""

    stream: str
    types: list[int | str]
    times: list[float]
    predict: bool
    top: int


@dataclass(frozen=True)
class Predict:
    """A question about one stream: what comes next, given that nothing has until `at` (None: from its last event)."""

    stream: str
    at: float | None
    top: int


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Refusal for anything else: NaN and infinities are no JSON."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "body: is no UTF-8") from None
    except RecursionError:
        raise Refusal(400, "body: is nested too deeply") from None
    except ValueError as error:
        # Also of an integer with more digits than Python converts.
        raise Refusal(400, f"body: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise Refusal(400, f'body: got {shown(value)}, expected an object such as {{"stream": "a"}}')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal(400, f"body: got {name}, which is no JSON; expected a finite number")


def read_push(body: bytes, parse_time: Callable[[Any], float]) -> Push:
    """{"stream", "type", "time"} or {"stream", "events": [{"type", "time"}, …]}; and "predict", "top".

    Args:
        parse_time: a number or an ISO 8601 date -> time in the data set's unit; ValueError.
    """
    value = read_json(body)
    if "events" in value:
        _check_keys(value, {"stream", "events", "predict", "top"})
        events = value["events"]
        if not isinstance(events, list) or not events:
            raise Refusal(422, f"events: got {shown(events)}, expected a list of at least one event")
        named = [(f"events[{index}]", event) for index, event in enumerate(events)]
    else:
        _check_keys(value, {"stream", "type", "time", "predict", "top"})
        named = [("", {key: value[key] for key in ("type", "time") if key in value})]
    types: list[int | str] = []
    times: list[float] = []
    for name, event in named:
        where = f"{name}." if name else ""
        if not isinstance(event, dict):
            raise Refusal(422, f'{name}: got {shown(event)}, expected {{"type": …, "time": …}}')
        if name:
            _check_keys(event, {"type", "time"}, where)
        for key in ("type", "time"):
            if key not in event:
                raise Refusal(422, f"{where}{key}: not given")
        kind = event["type"]
        if isinstance(kind, bool) or not isinstance(kind, int | str):
            raise Refusal(422, f"{where}type: got {shown(kind)}, expected the name or the number of an event type")
        types.append(kind)
        times.append(_time(event["time"], f"{where}time", parse_time))
    return Push(_stream(value), types, times, _flag(value, "predict"), _top(value))


def read_predict(body: bytes, parse_time: Callable[[Any], float]) -> Predict:
    """{"stream"}, and "at", "top"."""
    value = read_json(body)
    _check_keys(value, {"stream", "at", "top"})
    at = value.get("at")
    return Predict(_stream(value), None if at is None else _time(at, "at", parse_time), _top(value))


def _check_keys(value: dict[str, Any], known: set[str], where: str = "") -> None:
    for key in value:
        if key not in known:
            raise Refusal(422, f"{where}{key}: is no field; there are {', '.join(sorted(known))}")


def _stream(value: dict[str, Any]) -> str:
    name = value.get("stream")
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise Refusal(
            422, f"stream: got {shown(name)}, expected a name of 1 to {LONGEST_NAME} printable characters"
        )  # fmt: skip
    return name


def _time(value: Any, name: str, parse_time: Callable[[Any], float]) -> float:
    try:
        return parse_time(value)
    except ValueError as error:
        raise Refusal(422, f"{name}: {str(error).removeprefix('time: ')}") from None


def _flag(value: dict[str, Any], name: str) -> bool:
    flag = value.get(name, False)
    if not isinstance(flag, bool):
        raise Refusal(422, f"{name}: got {shown(flag)}, expected true or false")
    return flag


def _top(value: dict[str, Any]) -> int:
    top = value.get("top", DEFAULT_TOP)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise Refusal(422, f"top: got {shown(top)}, expected how many of the likeliest types to tell")
    return top
