"""Tokens per second of reading a prompt into the cache, beside PyTorch's forward over the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from .decode import MODEL, check_agreement
from .harness import Contender, Spread, as_the_trainer_computes, machine, ratio, result_file, take_turns, write_result
from .step import find_packages
from .step_sides import EAGER as PEER
from .step_sides import OURS

# Sequences and positions of each: one prompt as long as the window, and several.
SHAPES = ((1, 512), (8, 512))


class Prompt:
    """Packed random tokens and times, the same on both sides."""

    def __init__(self, sequences: int, length: int) -> None:
        rng = np.random.default_rng(0)
        total = sequences * length
        self.tokens = rng.integers(0, MODEL.vocabulary_size, total).astype(np.int32)
        self.times = np.cumsum(rng.exponential(MODEL.time_scale, (sequences, length)), axis=1).reshape(-1)
        self.cu_seqlens = length * np.arange(sequences + 1, dtype=np.int32)
        self.targets = np.full(total, -1, np.int32)
        self.target_times = self.times


def make_ours(threads: int, sequences: int, length: int) -> Callable[[], list[float]]:
    """Our prefill into an empty cache: some logits of what follows."""
    from ttr_gpu.model import TransformerModel

    as_the_trainer_computes(threads)
    model, prompt = TransformerModel(MODEL), Prompt(sequences, length)
    cache = model.new_cache(sequences)

    def run() -> list[float]:
        cache.clear()
        logits = model.prefill(prompt.tokens, prompt.times, prompt.cu_seqlens, cache)
        first: list[float] = logits[-1, :64].tolist()
        return first

    return run


def make_peer(threads: int, sequences: int, length: int) -> Callable[[], list[float]]:
    """PyTorch's forward without gradients up to the last block, and the logits of the last positions."""
    import torch
    import torch.nn.functional as F

    from ttr_gpu.memory import keep_freed_memory
    from ttr_gpu.model import TransformerModel

    from .peers import torch_model

    torch.set_num_threads(threads)
    keep_freed_memory()
    model = torch_model.TorchModel(MODEL)
    torch_model.load_weights(model, TransformerModel(MODEL))
    batch = torch_model.to_torch(Prompt(sequences, length))

    def run() -> list[float]:
        with torch.inference_mode():
            x = model.hidden(batch)[:, -1]
            weight = model.embedding.token.weight if model.head is None else model.head.weight
            first: list[float] = F.linear(x, weight)[-1, :64].tolist()
            return first

    return run


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each side; default: all cores.")
@click.option("--turns", type=click.IntRange(min=1), default=10, show_default=True, help="Turns of each contender.")
@click.option("--calls", type=click.IntRange(min=1), default=5, show_default=True, help="Prompts timed in each turn.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
def prefill(threads: int | None, turns: int, calls: int, output: Path | None) -> None:
    """Time reading prompts of 512 tokens, 1 and 8 at once, beside PyTorch's forward, in turns."""
    threads = threads or machine()["cores"]
    packages = find_packages()
    sides = [(OURS, make_ours), *([(PEER, make_peer)] if packages else [])]
    with contextlib.ExitStack() as stack:
        contenders, first = {}, {}
        for shape in SHAPES:
            for name, make in sides:
                contender = stack.enter_context(Contender(name, make, threads, *shape))
                contenders[name, shape] = contender
                first[name, shape] = contender.call(1)[0].value
        if packages:
            check_agreement([(first[OURS, shape], first[PEER, shape]) for shape in SHAPES])
        timed = dict(zip(contenders, take_turns(list(contenders.values()), turns=turns, calls=calls), strict=True))
    rows = []
    for (name, shape), taken in timed.items():
        seconds = Spread.of([call.seconds for turn in taken for call in turn])
        rows.append({
            "side": name, "sequences": shape[0], "length": shape[1], "seconds": seconds._asdict(),
            "tokens_per_second": shape[0] * shape[1] / seconds.median,
        })  # fmt: skip
    ratios = {str(shape[0]): ratio(timed[PEER, shape], timed[OURS, shape])._asdict() for shape in SHAPES if packages}
    result = {"threads": threads, "model": MODEL.model_dump(), "rows": rows, "peer_over_ours": ratios}
    print_table(result)
    write_result(output or result_file("prefill"), "prefill", result, *packages)


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(f"prefill, float32, {result['threads']} threads, {machine()['cpu']}")
    for row in result["rows"]:
        seconds = {name: 1e3 * value for name, value in row["seconds"].items()}
        print(
            f"{row['side']:<8} {row['sequences']} x {row['length']}: {seconds['median']:.1f} ms (quartiles "
            f"{seconds['lower']:.1f} – {seconds['upper']:.1f}), {row['tokens_per_second']:.0f} tokens/s"
        )
    for sequences, spread in result["peer_over_ours"].items():
        print(
            f"{sequences} sequences: {PEER} takes {spread['median']:.2f} times as long as {OURS} "
            f"(quartiles {spread['lower']:.2f} – {spread['upper']:.2f})"
        )
