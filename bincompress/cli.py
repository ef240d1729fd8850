"""The command line: one subcommand each, and one library call in it. Heavy imports happen inside the commands."""

import atexit
import contextlib
import gc
import importlib
import os
import sys
import traceback
from typing import Any

import click

from bincompress import __version__
from bincompress.errors import BincompressError
from bincompress.process import faults, streams
from bincompress.process.interrupts import Terminated, end_soon, terminations_raised

_COMMANDS = {
    "demo": "Compress the small model that ships with the package, show the result, check it.",
    "compress": "Pack a checkpoint's weight matrices into a store.",
    "calibrate": "Collect input statistics for error-compensated quantization.",
    "batch": "Compress several models from a manifest.",
    "train": "Train the planes of a model's layers: the best quality at low bits.",
    "distill": "Train a store's coefficients against the unquantized model.",
    "inspect": "Show what is in a store: bits, errors, times.",
    "verify": "Check every byte of a store against its hashes and the format.",
    "pack": "Write a store as one file, which every command reads.",
    "unpack": "Write a packed file as a folder again.",
    "push": "Upload a store to the Hugging Face Hub, with a model card.",
    "models": "List or remove models in the Hub's cache.",
    "export": "Write a store as a Hugging Face folder (dequantized, bfloat16).",
    "generate": "Continue a text with the model in a store.",
    "chat": "Chat with the model in a store.",
    "run": "Answer the prompts of a file, several at once.",
    "serve": "Serve the model in a store over HTTP: OpenAI's and Ollama's interfaces, a web page.",
    "evaluate": "Measure a model's perplexity on a text, also against the unquantized model.",
    "warmup": "Compile the kernels that run a model, before it is asked for anything.",
    "kernels": "Export compiled kernels, or import them on a machine of the same kind.",
    "bench": "Time a model: reading a prompt and writing tokens.",
    "report": "Write one self-contained HTML page about a store.",
}

# Run again, these do what is left.
_GO_ON = ("compress", "calibrate", "train", "distill", "batch", "run", "unpack", "push")
_ANEW = ("train", "distill")  # with --overwrite, these begin again


class _Commands(click.Group):
    """Loads a command's module only when that command is called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        if not {"-h", "--help"} & set(sys.argv):
            from bincompress.process.limits import refuse_small_limit

            refuse_small_limit()  # before a command imports what would end the process
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
    """Run the command line, and end the process with the exit code of what came of it.

    0 done, 1 some tensors failed or verify found damage, 2 refused or failed (one line says why), 130 interrupted,
    143 and 129 ended by SIGTERM and SIGHUP, 141 the reader of the output has ended.
    """
    # The interpreter would look for garbage among all that is left, 0.3 s with Numba, before the process ends.
    atexit.register(gc.freeze)
    if "_BINCOMPRESS_COMPLETE" in os.environ:  # a shell asks what could follow
        return group()
    streams.prepare()
    context = None
    try:
        with terminations_raised():
            context = group.make_context("bincompress", sys.argv[1:])
            with context:
                group.invoke(context)
            streams.flush()
    except BaseException as error:
        if "--debug" in sys.argv and not isinstance(error, SystemExit | click.exceptions.Exit):
            traceback.print_exc()
        sys.exit(_told(error, context.invoked_subcommand if context else None))
    return None


def _told(error: BaseException, command: str | None) -> str | int | None:
    """Tell the user what ended a command, and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        return _interrupted(error, command)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message())
        return 2
    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if streams.failed_to_write(error):
        streams.give_up()
        if isinstance(error, BrokenPipeError):
            return 141
        return _line(f"standard output or error cannot be written: {faults.one_line(error)}")
    if isinstance(error, BincompressError):
        return _line(str(error))
    known = faults.explain(error)
    if known is not None:
        url = next((f"{word}: " for word in sys.argv[1:] if "://" in word and word not in known), "")
        return _line(url + known)
    return _line(
        f"this is a fault of bincompress: {type(error).__name__}: {faults.one_line(error)}; "
        "`bincompress --debug ...` shows where; please report it"
    )


def _line(text: str) -> int:
    with contextlib.suppress(OSError, ValueError):  # where no one can be told, the exit code has to do
        click.echo(f"error: {text}", err=True)
    return 2


def _interrupted(error: BaseException, command: str | None) -> int:
    code = 128 + error.number if isinstance(error, Terminated) else 130
    end_soon(code)
    what = f"ended by {error}" if isinstance(error, Terminated) else "interrupted"
    if command in _ANEW and "--overwrite" in sys.argv:
        what += "; with --overwrite the same command begins anew"
    elif command in _GO_ON and "--dry-run" not in sys.argv:
        what += "; completed work is kept: run the same command again to resume"
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"\n{what}", err=True)
    return code
