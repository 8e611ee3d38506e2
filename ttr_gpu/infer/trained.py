"""A trained model together with what its data set knows: tokenizer or names of types, unit and origin of its times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.dataset import open_dataset
from ..data.timestamps import TimestampParser, date_text, is_date
from ..data.tokenizer import TextTokenizer
from ..errors import UserError
from ..model import TransformerModel
from ..train.checkpoint import Checkpoint, check_same_data, find_checkpoint, open_checkpoint
from ..train.run import describe


@dataclass(frozen=True)
class Trained:
    """What inference needs.

    Attributes:
        tokenizer: of texts, or names of the event types.
        time_unit_seconds: None where times are positions.
        origin: what was subtracted from all times, in that unit.
    """

    checkpoint: Checkpoint
    model: TransformerModel
    tokenizer: TextTokenizer | list[str]
    time_unit_seconds: float | None
    origin: float

    @property
    def context(self) -> int | None:
        """As many positions as training has shown the model at a time; None: with a window it may read any number."""
        config = self.checkpoint.config
        return None if config.model.window else config.train.max_length

    def beyond_context(self, what: str, length: int, consequence: str) -> str | None:
        """A line about `what`, so many positions long, if training has not shown the model as many; else None."""
        if self.context is None or length <= self.context:
            return None
        return (
            f"note: {what}: got {length:,}, but this model, which has no window, was trained on {self.context:,} at a "
            f"time: {consequence}; to use more, train with a larger train.max_length or with --set model.window=N"
        )

    def parse_time(self, text: str, option: str) -> float:
        """A time as in the data: a number in their unit, or a date with its zone. UserError naming the option."""
        if self.time_unit_seconds is None:
            raise UserError(
                f"{option}: got {text!r}, but times of this model are positions, since its data had no timestamps; "
                f"leave {option} out"
            )
        try:
            return TimestampParser(self.time_unit_seconds, assume_utc=None).parse(text)
        except ValueError as error:
            raise UserError(f"{option}: {str(error).removeprefix('time: ')}") from None

    @property
    def dated(self) -> bool:
        """Whether the data set's times are dates."""
        return self.time_unit_seconds is not None and is_date(self.origin, self.time_unit_seconds)

    def time_text(self, time: float) -> str:
        """A time as people read it: a date in UTC to the millisecond, or the number where it is none."""
        date = date_text(time, self.time_unit_seconds or 1.0, milliseconds=True) if self.dated else None
        return f"{time:.12g}" if date is None else date

    def iso_date(self, time: float) -> str | None:
        """A time of a data set with dates in ISO 8601, UTC, to the millisecond; None for one outside the calendar."""
        date = date_text(time, self.time_unit_seconds or 1.0, "%Y-%m-%dT%H:%M:%S", milliseconds=True)
        return None if date is None else f"{date}Z"


def open_trained(run: Path, data: Path | None = None, best: bool = True) -> Trained:
    """The best (or last) checkpoint of a run folder, or a checkpoint itself.

    Args:
        run: run folder or checkpoint.
        data: the data set it was trained on, or one with the same vocabulary; default: where it was then.

    Raises:
        UserError: no checkpoint there, or no such data set.
    """
    checkpoint = open_checkpoint(find_checkpoint(run, best=best))
    path = data or Path(checkpoint.data["path"])
    try:
        dataset = open_dataset(path)
    except UserError as error:
        if data is not None:
            raise
        reason = str(error) if path.exists() else f"{path}: is not there, seen from {Path.cwd()}"
        raise UserError(
            f"{checkpoint.path}: holds no vocabulary, and its data set cannot be read ({reason}); say where it is: "
            f"--data .../{path.name}"
        ) from None
    check_same_data(checkpoint, describe(dataset), path)
    tokenizer = dataset.tokenizer() if dataset.vocabulary is None else dataset.vocabulary
    return Trained(checkpoint, checkpoint.load_model(), tokenizer, dataset.time_unit_seconds, dataset.origin)
