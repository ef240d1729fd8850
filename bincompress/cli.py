"""The command line: one subcommand each, and one library call in it. Heavy imports happen inside the commands."""

import atexit
import gc
import importlib
import sys
from typing import Any

import click

from bincompress import __version__
from bincompress.errors import BincompressError

_COMMANDS = {
    "demo": "Compress the small model that ships with the package, show the result, check it.",
    "compress": "Pack a checkpoint's weight matrices into a store.",
    "calibrate": "Collect input statistics for error-compensated quantization.",
    "batch": "Compress several models from a manifest.",
    "distill": "Train a store's coefficients against the unquantized model.",
    "inspect": "Show what is in a store: bits, errors, times.",
    "verify": "Check every byte of a store against its hashes and the format.",
    "export": "Write a store as a Hugging Face folder (dequantized, bfloat16).",
    "generate": "Continue a text with the model in a store.",
    "chat": "Chat with the model in a store.",
    "evaluate": "Measure a model's perplexity on a text, also against the unquantized model.",
    "bench": "Time a model: reading a prompt and writing tokens.",
    "report": "Write one self-contained HTML page about a store.",
}


class _Commands(click.Group):
    """Loads a command's module only when that command is called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = importlib.import_module(f"bincompress.commands.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bincompress")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def group(ctx: click.Context, debug: bool) -> None:
    """Compress language models into binary planes of 1 to 3 bits a weight, for CPUs.

    \b
    Example:
      bincompress demo
      bincompress compress meta-llama/Llama-3.2-1B ./llama-1b
    """
    ctx.obj = {"debug": debug}


def main() -> Any:
    """Run the command line; what a user can mend is printed as one line, with exit code 2."""
    # Otherwise the garbage collector goes through everything at exit, which takes 0.3 s with Numba.
    atexit.register(gc.freeze)
    try:
        return group(standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        click.echo("interrupted; completed work is kept: run the same command again to resume", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BincompressError as error:
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
