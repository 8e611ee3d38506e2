"""A result beside what simple methods reach on the same split, in words."""

from __future__ import annotations

from ..config import ModelConfig
from ..data.dataset import Dataset
from ..data.inspection import unit_name
from .evaluation import Evaluation
from .floors import Floor, event_floors, gap_floors, lowest, text_floors
from .gap_figures import GapFigures


def floors(dataset: Dataset, split: str, config: ModelConfig) -> list[Floor]:
    """The floors of a split: of types where there are several, of gaps where the model answers for them."""
    if dataset.kind == "text":
        return text_floors(dataset)
    train, test = dataset.split("train"), dataset.split(split)
    found = event_floors(train, test, dataset.vocabulary_size) if dataset.event_types > 1 else []
    if not config.time_components:
        return found
    return found + gap_floors(train, test, config.time_zero_gap, dataset.gap.get("grid"))


def compare(result: Evaluation, beside: list[Floor], dataset: Dataset) -> list[str]:
    """Lines that put a result beside its floors."""
    if result.bits_per_byte is not None:
        head = (
            f"{result.split:<11} {result.bits_per_byte:.4f} bits per byte ({result.cross_entropy:.4f} nats per token, "
            f"accuracy {100 * result.accuracy:.1f} %, {result.tokens:,} tokens)"
        )
        return [head, *_beside(result.bits_per_byte, beside, "text")]
    if result.time_nll is None:
        head = (
            f"{result.split:<11} {result.cross_entropy:.4f} nats per token, accuracy {100 * result.accuracy:.1f} %, "
            f"perplexity {result.perplexity:.2f}{_top(result.top_k)} ({result.tokens:,} tokens)"
        )
        return [head, *_beside(result.cross_entropy, beside, "type")]
    typed = dataset.event_types > 1
    lines = [f"{result.split:<11} {result.nll:.4f} nats per event ({result.tokens:,} events; {result.protocol})"]
    if typed:
        lines.append(
            f"next type   {result.cross_entropy:.4f} nats, accuracy {100 * result.accuracy:.1f} %, perplexity "
            f"{result.perplexity:.2f}{_top(result.top_k)}"
        )
        lines += _beside(result.cross_entropy, beside, "type")
    unit = unit_name(dataset.time_unit_seconds)
    lines.append(f"gap to it   {result.time_nll:.4f} nats, of a density per unit of time ({unit})")
    lines += _beside(result.time_nll, beside, "time")
    if result.survival is not None:
        floors_of = ", ".join(f"{f.name} {f.survival:.4f}" for f in beside if f.survival is not None)
        lines.append(f"survival    {result.survival:.4f} nats per event, of the intervals cut off ({floors_of})")
    marginal = next((floor.gaps for floor in beside if floor.gaps is not None), None)
    return lines if result.gaps is None or marginal is None else lines + _gap_lines(result.gaps, marginal)


def _gap_lines(own: GapFigures, floor: GapFigures) -> list[str]:
    """All figures of gaps, those of the marginal log-normal in brackets."""
    lines = []
    if own.dequantised_nll is not None:
        lines.append(f"dequantised {own.dequantised_nll:.4f} nats (log-normal {floor.dequantised_nll:.4f})")
    inside, floors = (
        "/".join(f"{100 * share:.1f}" for share in each.coverage.values()) for each in (own, floor)
    )  # fmt: skip
    nominal = "/".join(f"{100 * share:g}" for share in own.coverage)
    return [
        *lines,
        f"median gap  mean absolute error {own.mae:.6g} (log-normal {floor.mae:.6g}), root mean square {own.rmse:.6g} "
        f"({floor.rmse:.6g})",
        f"coverage    of {nominal} % intervals: {inside} % (log-normal {floors})",
        f"calibration Kolmogorov-Smirnov {own.ks:.4f} (log-normal {floor.ks:.4f}; 5 % of samples of the true process "
        f"exceed {own.ks_critical:.4f})",
    ]


def _top(shares: dict[int, float] | None) -> str:
    """ ", top 3 70.1 %": of the k that say more than accuracy, and less than everything."""
    return (
        ""
        if shares is None
        else "".join(f", top {k} {100 * share:.1f} %" for k, share in shares.items() if k > 1 and share < 1)
    )


def _beside(own: float, floors: list[Floor], of: str) -> list[str]:
    lines = []
    for floor in floors:
        if floor.of == of:
            accuracy = f", accuracy {100 * floor.accuracy:.1f} %" if floor.accuracy is not None else ""
            lines.append(f"  {floor.name:<17} {floor.value:.4f} {floor.unit}{accuracy}{_top(floor.top_k)}")
    if (best := lowest(floors, of)) is not None:
        verdict = "below" if own < best.value else "ABOVE"
        lines.append(f"  the model is {abs(own - best.value):.4f} {best.unit} {verdict} the best floor ({best.name})")
    return lines
