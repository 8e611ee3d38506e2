"""The `ttr-gpu` command: a group whose sub-commands are imported only when they are used, so that --help is instant."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import click

# name -> (module:attribute, the line shown by `ttr-gpu --help`; a command's own help says more)
COMMANDS = {
    "preprocess": ("ttr_cli.preprocess:preprocess", "Turn raw CSV, JSON, JSONL or text into a data set (data.zarr)."),
    "inspect": ("ttr_cli.inspect:inspect", "Show what is in a data set; --verify checks every checksum."),
    "train": ("ttr_cli.train:train", "Train a model on a data set."),
    "eval": ("ttr_cli.evaluate:evaluate", "Evaluate a trained model on a split of a data set."),
    "plot": ("ttr_cli.plot:plot", "Draw runs: loss, gradient norm, throughput, how attention decays with age."),
    "checkpoint": ("ttr_cli.checkpoint:checkpoint", "Show checkpoints, average them, export their weights."),
    "generate": ("ttr_cli.generate:generate", "Continue a text, or a sequence of events, with a trained model."),
    "serve": ("ttr_cli.serve:serve", "Serve live streams of events over HTTP, with a dashboard."),
    "predict": ("ttr_cli.predict:predict", "Predict the next event, and sample futures, from histories of events."),
    "plan": ("ttr_cli.plan:plan", "Predict step time, memory and efficiency on many machines."),
    "slurm": ("ttr_cli.slurm:slurm", "Write a batch script for Slurm."),
    "bench": ("ttr_cli.bench:bench", "Time kernels on this machine."),
    "info": ("ttr_cli.info:info", "Print versions, devices, back ends and thread counts."),
}


class LazyGroup(click.Group):
    """A click group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command '{args[0]}'; {hint}", context)
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
@click.version_option(package_name="ttr-gpu", prog_name="ttr-gpu")
def cli(debug: bool) -> None:
    """Time-aware Transformers over timestamped sequences, without a deep-learning framework.

    The whole way:  ttr-gpu preprocess log.csv -o data.zarr  and then  ttr-gpu train data.zarr
    """


class _Terminated(BaseException):
    """SIGTERM, raised so that what is half-written is cleared away as after Ctrl-C."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line.

    What the user can mend becomes one line on stderr and exit code 2; Ctrl-C exits with 130, SIGTERM with 143, and
    anything else is a defect of the program and shows its traceback.
    """
    from ttr_gpu.errors import UserError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted anywhere on the line: it is what one adds to the end of a command that has just failed.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _sigterm_raises():
            return cli.main(args=arguments, prog_name="ttr-gpu", standalone_mode=False)
    except click.UsageError as error:
        if "\n" in error.message:
            # `ttr-gpu` alone: click shows the help as an error.
            error.show()
            sys.exit(error.exit_code)
        _fail(_usage_line(error), debug)
    except click.ClickException as error:
        _fail(error.format_message(), debug)
    except UserError as error:
        _fail(str(error), debug)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        _leave(130)
    except _Terminated:
        _say("terminated")
        _leave(143)
    except OSError as error:
        # Such as a full disk under redirected output. (If only its reader has gone, click ends the program quietly.)
        where = f"{error.filename}: " if error.filename else "output: "
        _drop(sys.stdout)
        _fail(f"{where}{error.strerror or error}", debug)
    except MemoryError:
        _fail("out of memory; when training, try a smaller --preset or --set train.tokens_per_batch", debug)


def _fail(message: str, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exc()
    _say(f"error: {message}")
    sys.exit(2)


def _leave(code: int) -> NoReturn:
    """Exit, at once where training of a tokenizer was left behind: if it comes back while Python ends, it aborts."""
    if any(thread.name == "tokenizer" for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _say(line: str) -> None:
    # Where nobody reads stderr, the exit code must do.
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def _drop(stream: Any) -> None:
    """Let Python's last flush of a stream that cannot be written go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _usage_line(error: click.UsageError) -> str:
    """Click's three lines of a usage error as one."""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if "such command" in message:
        return message
    command = error.ctx.command_path if error.ctx is not None else "ttr-gpu"
    if isinstance(error, click.NoSuchOption):
        # Click guesses from letters alone: for --lr it would propose --help.
        message = f"no such option {error.option_name}"
        name = error.option_name.lstrip("-").replace("-", "_")
        if command.endswith(" train") and name:
            from ttr_gpu.train.config import config_keys

            keys = [key for key in config_keys() if key.split(".", 1)[1] == name]
            if keys:
                return f"{message}; it is a key: --set {keys[0]}=VALUE"
        options = [o for p in error.ctx.command.params for o in p.opts] if error.ctx is not None else []
        import difflib

        near = difflib.get_close_matches(error.option_name, [o for o in options if o.startswith("--")], 1, 0.7)
        if near:
            return f"{message}; did you mean {near[0]}?"
    return f"{message}; see `{command} --help`"


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:
        # Only the main thread may set handlers.
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
