"""Reading `data.zarr`: what it says of itself, and ranges of tokens and times."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .sharded_array import lost_shard
from .shards import FORMAT, FORMAT_VERSION, attributes_checksum, sha256
from .wording import json_reason


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        name: "train", "validation" or "test".
        offsets: (sequences + 1,) int64: sequence i is tokens offsets[i] .. offsets[i + 1].
        observed_until: end of observation, relative to the origin; None: not known.
        first_scored: whether sequences begin with the start of observation, so that their first event has a prediction.
        documents, bytes: texts, and their UTF-8 bytes plus one each for the terminator (0 for events).
    """

    name: str
    path: Path
    offsets: np.ndarray[Any, Any]
    documents: int
    bytes: int
    _arrays: Any = field(repr=False)
    observed_until: float | None = None
    first_scored: bool = False

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1

    @property
    def token_count(self) -> int:
        """Number of tokens or events."""
        return int(self.offsets[-1])

    def read(self, begin: int, end: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens [begin, end) as int32, and their times as float64 relative to the data set's origin."""
        found, name = [], "tokens"
        try:
            for name in ("tokens", "times"):
                array = self._arrays[name]
                if (lost := lost_shard(array, begin, end)) is not None:
                    raise UserError(f"{lost}: is missing; copy the data set again or preprocess anew")
                found.append(array[begin:end])
        except UserError:
            raise
        except Exception as error:  # zarr and its codecs raise many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.path}/{self.name}/{name}: a shard cannot be read ({reason}); "
                f"`ttr-gpu inspect --verify {self.path}` names it; copy the data set again or preprocess anew"
            ) from None
        tokens, times = found
        return tokens.astype(np.int32), times


@dataclass(frozen=True)
class Dataset:
    """A data set on disk.

    Attributes:
        kind: "events" or "text".
        time_unit_seconds: seconds in one unit of its times; None where times are positions.
        origin: what was subtracted from all times, in that unit.
        gap: statistics of the gaps in the training split.
        vocabulary: names of the event types; None for text.
        fingerprint: of the content, whatever its compression.
    """

    path: Path
    kind: str
    vocabulary_size: int
    time_unit_seconds: float | None
    origin: float
    gap: dict[str, Any]
    vocabulary: list[str] | None
    fingerprint: str
    attributes: dict[str, Any]
    splits: list[str]
    _root: Any = field(repr=False)

    def split(self, name: str) -> Split:
        """One split; UserError naming those there are if it is absent."""
        if name not in self.splits:
            raise UserError(f"{self.path}: has no split {name!r}; it has {', '.join(self.splits)}")
        entry = self.attributes["splits"][name]
        group = self._root[name]
        try:
            offsets = group["offsets"][:]
        except Exception as error:  # zarr and its codecs raise many kinds
            raise UserError(f"{self.path}/{name}/offsets: cannot be read: {error}; preprocess anew") from None
        _, end = self.attributes.get("observation", (None, None))
        return Split(
            name, self.path, offsets, entry["documents"], entry["bytes"], group, end, self.begins_observed
        )  # fmt: skip

    @property
    def begins_observed(self) -> bool:
        """Whether every sequence begins with the start of observation, which is no event."""
        return bool(self.attributes.get("first_event_scored"))

    @property
    def event_types(self) -> int:
        """Number of types that events have: the vocabulary without the start of observation."""
        return self.vocabulary_size - self.begins_observed

    def tokenizer(self) -> Any:
        """The tokenizer of a text data set."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.path / "tokenizer.json")


def open_dataset(path: str | Path) -> Dataset:
    """Open a data set and check that all its files are there in full (sizes only; `verify` reads them).

    Raises UserError where there is none, where it is another format or version, or where a file is missing or cut.
    """
    path = Path(path)
    attributes = _attributes(path)
    for name, expected in attributes["checksums"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes, expected {expected['bytes']:,} (cut short?)"
            raise UserError(f"{file}: {what}; copy the data set again or preprocess anew")
    import zarr

    try:
        root = zarr.open_group(path, mode="r")
    except Exception as error:  # zarr raises many kinds
        raise UserError(f"{path}/zarr.json: is damaged ({error}); copy the data set again or preprocess anew") from None
    return Dataset(
        path, attributes["kind"], attributes["vocabulary_size"], attributes["time_unit_seconds"], attributes["origin"],
        attributes["gap"], attributes.get("vocabulary"), attributes["fingerprint"], attributes,
        list(attributes["splits"]), root,
    )  # fmt: skip


def verify(path: str | Path) -> list[str]:
    """Names of files whose checksum is wrong, or that are missing or were not written by preprocessing."""
    path = Path(path)
    expected = _attributes(path)["checksums"]
    bad = [
        f"{path / name}: {'is missing' if not (path / name).is_file() else 'has a wrong checksum'}"
        for name, entry in expected.items()
        if not (path / name).is_file() or sha256(path / name) != entry["sha256"]
    ]
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    return bad + [
        f"{path / name}: does not belong to the data set" for name in sorted(there - {*expected, "zarr.json"})
    ]


def _attributes(path: Path) -> dict[str, Any]:
    hint = "make one with `ttr-gpu preprocess INPUT -o data.zarr`"
    again = "copy the data set again or preprocess anew"
    if not path.exists():
        from .sources import similar

        raise UserError(f"{path}: no such data set{similar(str(path)) or '; ' + hint}")
    if path.is_file():
        raise UserError(
            f"{path}: is a file, expected a data set folder; `ttr-gpu preprocess {path} -o data.zarr` makes one"
        )
    try:
        described = json.loads((path / "zarr.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: is no data set (it has no zarr.json); {hint}") from None
    except OSError as error:
        raise UserError(f"{path}/zarr.json: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}/zarr.json: is damaged ({json_reason(error)}); {again}") from None
    attributes = described.get("attributes") if isinstance(described, dict) else None
    if not isinstance(attributes, dict):
        raise UserError(f"{path}/zarr.json: has no attributes, expected those of a data set; {again}")
    if attributes.get("format") != FORMAT:
        raise UserError(f"{path}: is a Zarr group but no ttr-gpu data set; {hint}")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format version {attributes.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "preprocess the raw data anew"
        )
    if attributes.get("attributes_sha256") != attributes_checksum(attributes):
        raise UserError(f"{path}/zarr.json: is damaged (wrong checksum of its attributes); {again}")
    return attributes
