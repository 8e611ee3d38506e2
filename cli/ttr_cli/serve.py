"""`ttr-gpu serve`: live streams of events over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from .threads import threads_option, use_threads


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; any but loopback needs a --token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--token", envvar="TTR_SERVE_TOKEN", help="What clients must send as `Authorization: Bearer ...`.")
@click.option("--streams", type=click.IntRange(min=1), default=1000, show_default=True, help="How many may exist.")
@click.option(
    "--capacity", type=click.IntRange(min=1), metavar="EVENTS",
    help="Events that a stream remembers, of a model without a window; default: 2048.",
)  # fmt: skip
@click.option(
    "--state", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Streams are read from it at the start and written to it, every --save-every seconds and at the end.",
)  # fmt: skip
@click.option(
    "--save-every", type=click.FloatRange(min=0), default=30.0, show_default=True, metavar="SECONDS",
    help="With --state: what a crash loses at most; 0: write at the end alone.",
)  # fmt: skip
@click.option(
    "--max-request-bytes", type=click.IntRange(min=1), default=1 << 20, show_default=True, help="Of a request's body."
)
@click.option(
    "--patience", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
    help="Seconds that a request waits for its turn before it is refused.",
)  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help="The data set, if it is not where it was in training.")
@click.option("--last", is_flag=True, help="The last checkpoint of the run, not the best on validation.")
@threads_option
def serve(
    run: Path, host: str, port: int, token: str | None, streams: int, capacity: int | None, state: Path | None,
    save_every: float, max_request_bytes: int, patience: float, data: Path | None, last: bool, threads: int | None,
) -> None:  # fmt: skip
    """Serve the model of RUN (a run folder or a checkpoint, trained on events) over HTTP.

    POST /push takes events, POST /predict answers what comes next, / shows a stream live. Ctrl-C ends it when all
    requests have been answered; with --state no stream is lost.

    \b
    ttr-gpu serve runs/badges --state streams/
    curl http://127.0.0.1:8000/push -H "Content-Type: application/json" \\
      -d '{"stream": "a", "type": "Student", "time": "2024-05-01T12:00Z"}'
    """
    from ttr_gpu.errors import UserError

    try:
        from ttr_gpu.serving.service import Service, serve_until_asked
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"{error.name} is not installed; install what serving needs: pip install 'ttr-gpu[serve]'"
        ) from None
    from ttr_gpu.infer.trained import open_trained

    use_threads(threads)
    service = Service(
        open_trained(run, data, best=not last), name=str(run), streams=streams, capacity=capacity, state=state,
        save_every=save_every, say=click.echo, token=token, max_request_bytes=max_request_bytes, patience=patience,
    )  # fmt: skip
    serve_until_asked(service, host, port)
