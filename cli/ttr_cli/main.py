"""The `ttr-gpu` command: a group whose sub-commands are imported only when they are used, so that --help is instant."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

# name -> (module:attribute, the line shown by `ttr-gpu --help`; a command's own help says more)
COMMANDS = {
    "preprocess": ("ttr_cli.preprocess:preprocess", "Turn raw CSV, JSON, JSONL or text into a data set (data.zarr)."),
    "inspect": ("ttr_cli.inspect:inspect", "Show what is in a data set; --verify checks every checksum."),
    "train": ("ttr_cli.train:train", "Train a model on a data set."),
    "eval": ("ttr_cli.evaluate:evaluate", "Evaluate a trained model on a split of a data set."),
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
            hint = f"; did you mean '{near[0]}'?" if near else f"; commands: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command '{args[0]}'{hint}", context)
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


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. A UserError becomes one line on stderr and exit code 2; Ctrl-C exits with 130."""
    from ttr_gpu.errors import UserError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted anywhere on the line: it is what one adds to the end of a command that has just failed.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return cli.main(args=arguments, prog_name="ttr-gpu", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is left to say.
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
