"""What a cubin says of its kernels, read from the ELF file itself: no driver, no tools.

Format: ELF64 with NVIDIA's sections. `.nv.info` holds attributes of all kernels, `.nv.info.<kernel>` those of one; each
is (format, attribute, size or value), and for format 4 that many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SYMBOLS = 2  # section type
_SIZED = 4  # attribute format
_FRAME_SIZE, _REGISTERS, _MAX_THREADS = 0x11, 0x2F, 0x05


@dataclass
class Resources:
    """What a kernel takes."""

    registers: int = 0  # per thread
    stack: int = 0  # bytes per thread: local memory
    shared: int = 0  # bytes per block, static
    threads: int = 0  # per block at most (__launch_bounds__)


def resources(cubin: bytes) -> dict[str, Resources]:
    """The kernels of a cubin."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = []
    for i in range(count):
        name, kind, _, _, offset, size, link, _, _, _ = struct.unpack_from("<IIQQQQIIQQ", cubin, headers + i * entry)
        sections.append((name, kind, offset, size, link))
    names = sections[names_at][2]
    found: dict[str, Resources] = {}
    symbols: list[str] = []
    for _, kind, offset, size, link in sections:
        if kind == _SYMBOLS:
            strings = sections[link][2]
            at = (struct.unpack_from("<I", cubin, offset + i)[0] for i in range(0, size, 24))
            symbols = [_text(cubin, strings + name) for name in at]
    for name_at, _, offset, size, _ in sections:
        name = _text(cubin, names + name_at)
        part, _, kernel = name.removeprefix(".").removeprefix("nv.").partition(".")
        if part == "text":
            found.setdefault(kernel, Resources())
        elif part == "shared":
            found.setdefault(kernel, Resources()).shared = size
        elif part == "info":
            for attribute, values in _attributes(cubin[offset : offset + size]):
                if attribute == _MAX_THREADS:
                    found.setdefault(kernel, Resources()).threads = values[0] * values[1] * values[2]
                elif attribute == _REGISTERS:
                    found.setdefault(symbols[values[0]], Resources()).registers = values[1]
                elif attribute == _FRAME_SIZE:
                    found.setdefault(symbols[values[0]], Resources()).stack = values[1]
    # Where this section exists (from sm_90 on), the 1 KiB that each block takes for itself is counted too.
    if found.pop("reserved.0", None):
        for kernel in found.values():
            kernel.shared = max(kernel.shared - 1024, 0)
    return found


def _attributes(info: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            yield attribute, struct.unpack_from(f"<{size // 4}I", info, at)
            at += size


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
