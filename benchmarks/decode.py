"""Tokens per second of decoding: the same at every position, and beside a key/value cache in PyTorch, each in float32
and in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
# What the logits may differ by, as a share of the largest. Ours in bfloat16 are rounded less often than the peer's.
AGREEMENT = {"float32": 1e-4, "bfloat16": 4e-2}


class Setting(NamedTuple):
    """What a contender decodes, and which side it is."""

    side: str
    precision: str
    batch: int
    position: int


def stream(batch: int, position: int) -> tuple[np.ndarray[Any, Any], Callable[[int], np.ndarray[Any, Any]]]:
    """Times (B, position) of what has been, and `tokens(position)` (B,) of a step; the same on both sides."""
    gaps = np.random.default_rng(0).exponential(MODEL.time_scale, (batch, position))
    return np.cumsum(gaps, axis=1), lambda at: (np.arange(batch) * 131 + at * 7919) % MODEL.vocabulary_size


def make_ours(threads: int, precision: str, batch: int, position: int) -> Callable[[], list[float]]:
    """Our decoding, after a prefill up to `position`."""
    from ttr_gpu.model import TransformerModel
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads)
    limit_blas()
    model = TransformerModel(MODEL, precision_name=precision)
    times, tokens = stream(batch, position)
    cache = model.new_cache(batch)
    past = np.array([tokens(at) for at in range(position)]).T.reshape(-1)
    starts = position * np.arange(batch + 1, dtype=np.int32)
    model.prefill(past, times.reshape(-1), starts, cache)
    return _steps(lambda token, time: model.decode_step(token, time, cache), tokens, position, times[:, -1])


def make_peer(threads: int, precision: str, batch: int, position: int) -> Callable[[], list[float]]:
    """PyTorch's, from the same weights, after as many steps."""
    import torch

    from ttr_gpu.model import TransformerModel

    from .peers import torch_decode, torch_model

    torch.set_num_threads(threads)
    model = torch_model.TorchModel(MODEL)
    torch_model.load_weights(model, TransformerModel(MODEL))
    decoder = torch_decode.Decoder(model, batch, bfloat16=precision == "bfloat16")
    times, tokens = stream(batch, position)

    def step(token: np.ndarray[Any, Any], time: np.ndarray[Any, Any]) -> Any:
        return decoder.step(torch.from_numpy(token.astype(np.int64)), torch.from_numpy(time)).float().numpy()

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
            first = first or logits[-1, :64].astype(np.float32).tolist()
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
    """Time decoding at positions 1k, 10k and 100k, and beside PyTorch's, in turns.

    Beside PyTorch's stand 1 and 16 sequences, in float32 and in bfloat16.
    """
    threads = threads or machine()["cores"]
    packages = find_packages()
    begin = POSITIONS[0]
    wanted = [Setting(OURS, "float32", 1, position) for position in POSITIONS[1:]]
    wanted += [
        Setting(side, precision, batch, begin)
        for precision in AGREEMENT
        for batch in BATCHES
        for side in ((OURS, PEER) if packages else (OURS,))
    ]
    with contextlib.ExitStack() as stack:
        contenders, first = {}, {}
        for setting in wanted:
            make = make_ours if setting.side == OURS else make_peer
            contenders[setting] = stack.enter_context(Contender(setting.side, make, threads, *setting[1:]))
            # One after the other: the first call compiles kernels and reads the past.
            first[setting] = contenders[setting].call(1)[0].value
        for setting, logits in first.items():
            if setting.side == PEER:
                ours = first[setting._replace(side=OURS)]
                check_agreement([(ours, logits)], AGREEMENT[setting.precision])
        timed = dict(zip(contenders, take_turns(list(contenders.values()), turns=turns, calls=calls), strict=True))
    result = summarize(timed, threads)
    print_table(result)
    write_result(output or result_file("decode"), "decode", result, *packages)


def check_agreement(pairs: list[tuple[list[float], list[float]]], allowed: float = AGREEMENT["float32"]) -> None:
    """Both sides must compute the same: otherwise their times say nothing."""
    for ours, peer in pairs:
        difference, largest = np.abs(np.subtract(ours, peer)).max(), np.abs(peer).max()
        # A NaN compares as false: it must not pass for agreement.
        if not difference <= allowed * largest:
            raise click.ClickException(f"the logits of the first step differ by {difference:.2g} of {largest:.2g}")


def summarize(timed: dict[Setting, list[list[Call]]], threads: int) -> dict[str, Any]:
    """What the result file says beyond machine and versions."""
    rows = []
    for setting, turns in timed.items():
        seconds = Spread.of([call.seconds / STEPS for turn in turns for call in turn])
        rows.append({
            **setting._asdict(), "seconds_per_step": seconds._asdict(),
            "tokens_per_second": setting.batch / seconds.median,
        })  # fmt: skip
    base = Setting(OURS, "float32", 1, POSITIONS[0])
    flatness = {
        str(position): ratio(timed[base._replace(position=position)], timed[base])._asdict()
        for position in POSITIONS[1:]
    }
    ratios: dict[str, dict[str, Any]] = {}
    for setting in timed:
        if setting.side == PEER:
            spread = ratio(timed[setting], timed[setting._replace(side=OURS)])
            ratios.setdefault(setting.precision, {})[str(setting.batch)] = spread._asdict()
    return {
        "threads": threads, "window": WINDOW, "steps": STEPS, "model": MODEL.model_dump(), "rows": rows,
        "time_over_that_at_1000": flatness, "peer_over_ours": ratios,
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(f"decoding, window {result['window']}, {result['threads']} threads, {machine()['cpu']}")
    print(f"{'':<19} {'batch':>6} {'position':>9} {'median':>10} {'quartiles':>18} {'tokens/s':>9}")
    for row in result["rows"]:
        seconds = row["seconds_per_step"]
        quartiles = f"{1e3 * seconds['lower']:.2f} – {1e3 * seconds['upper']:.2f}"
        print(
            f"{row['side']:<9} {row['precision']:<9} {row['batch']:>6} {row['position']:>9} "
            f"{1e3 * seconds['median']:>7.2f} ms {quartiles:>15} ms {row['tokens_per_second']:>9.0f}"
        )
    for position, spread in result["time_over_that_at_1000"].items():
        print(
            f"a step at {position} takes {spread['median']:.3f} times as long as at {POSITIONS[0]} {_quartiles(spread)}"
        )
    for precision, batches in result["peer_over_ours"].items():
        for batch, spread in batches.items():
            print(
                f"{precision}, batch {batch}: {PEER} takes {spread['median']:.2f} times as long as {OURS} "
                f"{_quartiles(spread)}"
            )


def _quartiles(spread: dict[str, float]) -> str:
    return f"(quartiles {spread['lower']:.3f} – {spread['upper']:.3f})"
