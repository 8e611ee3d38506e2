"""Safetensors files in one pass over their bytes, written with a checksum and read into arrays that are there already.

The library's `save_file` and `load_file` copy every array once more, and know no checksum. The format
(https://huggingface.co/docs/safetensors#format) is the length of a header, the header in JSON, the arrays end to end.
Checksums are CRC-32C (Castagnoli), which processors compute: six times as fast here as SHA-256, and made to find what
disks and copies do to bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import copy_into
from ..errors import UserError

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_PIECE = 1 << 20


class Abandoned(Exception):
    """Writing was given up before its end."""


def write_arrays(path: Path, arrays: dict[str, Array], abandoned: Callable[[], bool] = lambda: False) -> str:
    """Write a new file of arrays by name; returns what `checksum` returns of it.

    Args:
        arrays: NumPy arrays, float32 or float64, C-contiguous.
        abandoned: asked before each piece of a MiB; raises Abandoned once it says so.
    """
    from google_crc32c import extend

    names = {dtype: name for name, dtype in _DTYPES.items()}
    described, end = {}, 0
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected a C-contiguous array")
        begin, end = end, end + array.nbytes
        described[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the arrays are aligned in a mapping of the file
    parts: list[Any] = [len(header).to_bytes(8, "little") + header, *map(_bytes, arrays.values())]
    crc = size = 0
    with path.open("xb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), _PIECE):
                if abandoned():
                    raise Abandoned
                piece = part[start : start + _PIECE]
                crc = extend(crc, bytes(piece))
                size += len(piece)
                while piece:
                    # An unbuffered write may take a part only, such as what a disk has room for.
                    piece = piece[file.write(piece) :]
    return _text(crc, size)


def read_arrays(path: Path, targets: dict[str, Array]) -> None:
    """Copy a file's arrays into these of the same names and shapes, which may be on a GPU.

    Raises UserError for a file of other arrays, or that is none.
    """
    try:
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            described = json.loads(file.read(length))
            described.pop("__metadata__", None)
            if set(described) != set(targets):
                name = min(set(described) ^ set(targets))
                where = "the file" if name in described else "the model"
                raise UserError(f"{path}: {name!r} is only in {where}; another model?")
            for name, target in targets.items():
                _read_one(file, 8 + length, described[name], target, f"{path}: {name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; use another checkpoint") from None


def checksum(path: Path) -> str:
    """ "crc32c:<8 hexadecimal digits>:<bytes>" of a file."""
    from google_crc32c import extend

    crc = size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            crc = extend(crc, piece)
            size += len(piece)
    return _text(crc, size)


def _read_one(file: Any, start: int, entry: dict[str, Any], target: Array, name: str) -> None:
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    if shape != target.shape:
        raise UserError(f"{name} has shape {shape}, expected {target.shape}")
    begin, end = entry["data_offsets"]
    if end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{name}: its bytes are not those of its shape")
    into = isinstance(target, np.ndarray) and target.dtype == dtype and target.flags.c_contiguous
    array: Array = target if into else np.empty(shape, dtype)
    file.seek(start + begin)
    rest = _bytes(array)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError("the file ends early")
        rest = rest[count:]
    if not into:
        copy_into(target, array)


def _text(crc: int, size: int) -> str:
    return f"crc32c:{crc:08x}:{size}"


def _bytes(array: Array) -> Any:
    """The array's bytes, as they lie in memory."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
