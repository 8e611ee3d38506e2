"""`ttr-gpu generate`: continuations of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .threads import threads_option, use_threads

if TYPE_CHECKING:
    from ttr_gpu.infer.generator import Piece


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help='What to continue: a text, or types of events: "login, click".')
@click.option("--at", metavar="TIME", help="When: 2024-05-01T12:00Z, or a number in the data's unit.")
@click.option(
    "--gap", type=click.FloatRange(min=0), help="Time from each token to the next, in the data's unit; default: 0."
)
@click.option(
    "--advance", type=click.Choice(["sample", "median"]),
    help="Let the model say when each new token happens: its gap drawn from what it expects, or the median of that.",
)  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of each sample.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many continuations.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the k likeliest tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option(
    "--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Draw from tokens at least so many times as likely as the likeliest.",
)  # fmt: skip
@click.option(
    "--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
    help="Above 1: tokens that occurred before become less likely.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same samples.")
@click.option("--data", type=click.Path(path_type=Path), help="The data set, if it is not where it was in training.")
@click.option("--last", is_flag=True, help="The last checkpoint of the run, not the best on validation.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per sample, when it has ended.")
def generate(
    run: Path, prompt: str, at: str | None, gap: float | None, advance: str | None, max_tokens: int, samples: int,
    temperature: float, top_k: int | None, top_p: float, min_p: float, repetition_penalty: float, seed: int,
    data: Path | None, last: bool, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Continue a prompt with the model of RUN (a run folder or a checkpoint), as it is generated.

    Only what is new is printed. Texts end at `</s>`; events are printed one a line.
    """
    from ttr_gpu.errors import UserError
    from ttr_gpu.infer.generator import Generator
    from ttr_gpu.infer.sampling import Sampling
    from ttr_gpu.infer.trained import open_trained

    use_threads(threads)
    trained = open_trained(run, data, best=not last)
    if at is None and trained.time_unit_seconds is not None:
        raise UserError("--at: not given; this model knows of time: say when, such as --at 2024-05-01T12:00Z")
    if gap is not None and trained.time_unit_seconds is None:
        raise UserError(f"--gap: got {gap:g}, but times of this model are positions; leave --gap out")
    if advance is not None and trained.model.time_head is None:
        raise UserError(
            f"--advance: got {advance}, but this model does not say when (model.time_components is 0); "
            "leave --advance out, or give a --gap"
        )
    generator = Generator(trained.model, trained.tokenizer, origin=trained.origin)
    length = len(generator.prompts.encode(prompt))
    if note := trained.beyond_context("tokens of --prompt", length, "what follows may be poor; shorten the prompt"):
        click.echo(note, err=True)
    pieces = generator.stream(
        prompt, at=None if at is None else trained.parse_time(at, "--at"), gap=gap or 0.0, max_tokens=max_tokens,
        samples=samples, advance=advance,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            seed=seed,
        ),
    )  # fmt: skip
    if as_json:
        _print_json(pieces, samples)
        return
    # When tells more than what alone; a text's tokens are too short for it.
    dated = advance is not None and isinstance(trained.tokenizer, list)
    _print_text(pieces, samples, trained.time_text if dated else None)


def _print_text(pieces: Iterable[Piece], samples: int, time_text: Callable[[float], str] | None) -> None:
    """The first sample that has not ended as it comes; the others, which are drawn beside it, when it is their turn.

    With `time_text` each piece, an event, has its time before it.
    """
    waiting = [""] * samples
    ended = [False] * samples
    shown = 0
    _head(shown, samples)
    line_open = False
    for piece in pieces:
        waiting[piece.sample] += piece.text if time_text is None else f"{time_text(piece.time)}  {piece.text}"
        ended[piece.sample] = piece.finish is not None
        while shown < samples:
            text, waiting[shown] = waiting[shown], ""
            if text:
                click.echo(text, nl=False)
                line_open = not text.endswith("\n")
            if not ended[shown]:
                break
            click.echo("\n" if line_open else "", nl=False)
            line_open = False
            shown += 1
            _head(shown, samples)


def _head(sample: int, samples: int) -> None:
    if samples > 1 and sample < samples:
        click.echo(f"--- sample {sample + 1} of {samples}")


def _print_json(pieces: Iterable[Piece], samples: int) -> None:
    texts, tokens = [""] * samples, [0] * samples
    times: list[list[float]] = [[] for _ in range(samples)]
    for piece in pieces:
        times[piece.sample].append(piece.time)
        texts[piece.sample] += piece.text
        tokens[piece.sample] += 1
        if piece.finish is not None:
            result = {
                "sample": piece.sample, "text": texts[piece.sample], "tokens": tokens[piece.sample],
                "finish": piece.finish, "times": times[piece.sample],
            }  # fmt: skip
            click.echo(json.dumps(result, ensure_ascii=False))
