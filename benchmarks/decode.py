"""Tokens per second of decoding: the same at every position, and beside a key/value cache in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig

from .harness import Call, Contender, Spread, machine, ratio, result_file, take_turns, write_result
from .step import find_packages
from .step_sides import EAGER as PEER
from .step_sides import OURS

WINDOW = 512
MODEL = ModelConfig(vocabulary_size=4096, window=WINDOW, **PRESETS["tiny"])
BATCHES = (1, 16)
# Of one sequence; the first is where the peer stands too, beyond the window.
POSITIONS = (1_000, 10_000, 100_000)
# Steps of one call.
STEPS = 32
# What the logits may differ by, as a share of the largest.
AGREEMENT = 1e-4


def stream(batch: int, position: int) -> tuple[np.ndarray[Any, Any], Callable[[int], np.ndarray[Any, Any]]]:
    """Times (B, position) of what has been, and `tokens(position)` (B,) of a step; the same on both sides."""
    gaps = np.random.default_rng(0).exponential(MODEL.time_scale, (batch, position))
    return np.cumsum(gaps, axis=1), lambda at: (np.arange(batch) * 131 + at * 7919) % MODEL.vocabulary_size


def make_ours(threads: int, batch: int, position: int) -> Callable[[], list[float]]:
    """Our decoding, after a prefill up to `position`."""
    from ttr_gpu.model import TransformerModel
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    model = TransformerModel(MODEL)
    times, tokens = stream(batch, position)
    cache = model.new_cache(batch)
    past = np.array([tokens(at) for at in range(position)]).T.reshape(-1)
    starts = position * np.arange(batch + 1, dtype=np.int32)
    model.prefill(past, times.reshape(-1), starts, cache)
    return _steps(lambda *step: model.decode_step(*step, cache), tokens, position, times[:, -1])


def make_peer(threads: int, batch: int, position: int) -> Callable[[], list[float]]:
    """PyTorch's, from the same weights, after as many steps."""
    import torch

    from ttr_gpu.model import TransformerModel

    from .peers import torch_decode, torch_model

    torch.set_num_threads(threads)
    model = torch_model.TorchModel(MODEL)
    torch_model.load_weights(model, TransformerModel(MODEL))
    decoder = torch_decode.Decoder(model, batch)
    times, tokens = stream(batch, position)

    def step(token: np.ndarray[Any, Any], time: np.ndarray[Any, Any]) -> Any:
        return decoder.step(torch.from_numpy(token.astype(np.int64)), torch.from_numpy(time)).numpy()

    for at in range(position):
        step(tokens(at), np.ascontiguousarray(times[:, at]))
    return _steps(step, tokens, position, times[:, -1])


def _steps(
    step: Callable[..., Any], tokens: Any, position: int, time: np.ndarray[Any, Any]
) -> Callable[[], list[float]]:
    """STEPS steps a call, each going on from the one before: some logits after the first."""
    at, now = position, time.copy()

    def run() -> list[float]:
        nonlocal at, now
        first: list[float] = []
        for _ in range(STEPS):
            now = now + MODEL.time_scale
            logits = step(tokens(at), now)
            first = first or logits[-1, :64].tolist()
            at += 1
        return first

    return run


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=10, show_default=True, help="Turns of each contender.")
@click.option(
    "--calls", type=click.IntRange(min=1), default=3, show_default=True, help=f"Calls a turn, of {STEPS} steps."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
def decode(threads: int | None, turns: int, calls: int, output: Path | None) -> None:
    """Time decoding at positions 1k, 10k and 100k, and beside PyTorch's with 1 and 16 sequences, in turns."""
    threads = threads or machine()["cores"]
    packages = find_packages()
    wanted = [(OURS, make_ours, 1, position) for position in POSITIONS]
    wanted += [(OURS, make_ours, batch, POSITIONS[0]) for batch in BATCHES[1:]]
    if packages:
        wanted += [(PEER, make_peer, batch, POSITIONS[0]) for batch in BATCHES]
    with contextlib.ExitStack() as stack:
        contenders, first = {}, {}
        for name, make, batch, position in wanted:
            key = (name, batch, position)
            contenders[key] = stack.enter_context(Contender(name, make, threads, batch, position))
            # One after the other: the first call compiles kernels and reads the past.
            first[key] = contenders[key].call(1)[0].value
        if packages:
            check_agreement([(first[OURS, batch, POSITIONS[0]], first[PEER, batch, POSITIONS[0]]) for batch in BATCHES])
        timed = dict(zip(contenders, take_turns(list(contenders.values()), turns=turns, calls=calls), strict=True))
    result = summarize(timed, threads)
    print_table(result)
    write_result(output or result_file("decode"), "decode", result, *packages)


def check_agreement(pairs: list[tuple[list[float], list[float]]]) -> None:
    """Both sides must compute the same: otherwise their times say nothing."""
    for ours, peer in pairs:
        difference, largest = np.abs(np.subtract(ours, peer)).max(), np.abs(peer).max()
        # A NaN compares as false: it must not pass for agreement.
        if not difference <= AGREEMENT * largest:
            raise click.ClickException(f"the logits of the first step differ by {difference:.2g} of {largest:.2g}")


def summarize(timed: dict[tuple[str, int, int], list[list[Call]]], threads: int) -> dict[str, Any]:
    """What the result file says beyond machine and versions."""
    rows = []
    for (name, batch, position), turns in timed.items():
        seconds = Spread.of([call.seconds / STEPS for turn in turns for call in turn])
        rows.append({
            "side": name, "batch": batch, "position": position, "seconds_per_step": seconds._asdict(),
            "tokens_per_second": batch / seconds.median,
        })  # fmt: skip
    base = timed[OURS, 1, POSITIONS[0]]
    flatness = {str(position): ratio(timed[OURS, 1, position], base)._asdict() for position in POSITIONS[1:]}
    ratios = {
        str(batch): ratio(timed[PEER, batch, POSITIONS[0]], timed[OURS, batch, POSITIONS[0]])._asdict()
        for batch in BATCHES
        if (PEER, batch, POSITIONS[0]) in timed
    }
    return {
        "threads": threads, "window": WINDOW, "steps": STEPS, "model": MODEL.model_dump(), "rows": rows,
        "time_over_that_at_1000": flatness, "peer_over_ours": ratios,
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(f"decoding, float32, window {result['window']}, {result['threads']} threads, {machine()['cpu']}")
    print(f"{'':<10} {'batch':>6} {'position':>9} {'median':>10} {'quartiles':>18} {'tokens/s':>9}")
    for row in result["rows"]:
        seconds = row["seconds_per_step"]
        quartiles = f"{1e3 * seconds['lower']:.2f} – {1e3 * seconds['upper']:.2f}"
        print(
            f"{row['side']:<10} {row['batch']:>6} {row['position']:>9} {1e3 * seconds['median']:>7.2f} ms "
            f"{quartiles:>15} ms {row['tokens_per_second']:>9.0f}"
        )
    for position, spread in result["time_over_that_at_1000"].items():
        print(
            f"a step at {position} takes {spread['median']:.3f} times as long as at {POSITIONS[0]} {_quartiles(spread)}"
        )
    for batch, spread in result["peer_over_ours"].items():
        print(f"batch {batch}: {PEER} takes {spread['median']:.2f} times as long as {OURS} {_quartiles(spread)}")


def _quartiles(spread: dict[str, float]) -> str:
    return f"(quartiles {spread['lower']:.3f} – {spread['upper']:.3f})"
