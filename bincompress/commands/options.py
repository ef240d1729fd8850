"""The options that commands which run a model share."""

from collections.abc import Callable
from typing import Any

import click

from bincompress.commands.running import Size

Command = Callable[..., Any]


_FURTHER = ("typical_p", "dry_multiplier", "dry_base", "dry_allowed_length", "xtc_probability", "xtc_threshold")


class SeveralBits(click.ParamType[tuple[int, ...]]):
    """Bits of activations, one number or several, such as 16,8,6."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers."""
        found = [part.strip() for part in str(value).split(",")]
        if not set(found) <= {"6", "8", "16"} or len(set(found)) < len(found):
            self.fail(f"{value!r}: expected 6, 8 or 16, or several of them such as 16,8,6", param, ctx)
        return tuple(map(int, found))


def engine_options(command: Command) -> Command:
    """Add --threads, --memory, --kv-bits, --activation-bits, --activation-scale and --kernel."""
    return _engine_options(
        command,
        click.option(
            "--activation-bits",
            type=click.Choice(["6", "8", "16"]),
            default="8",
            show_default=True,
            help="Bits of activations. 16: float32 activations on decoded weights (slow).",
        ),
    )


def engine_options_for_several_bits(command: Command) -> Command:
    """Add the engine's options, with --activation-bits a tuple of numbers that are run one after the other."""
    return _engine_options(
        command,
        click.option(
            "--activation-bits",
            type=SeveralBits(),
            default="8",
            show_default=True,
            help="Bits of activations, or several such as 16,8,6. 16: float32 activations on decoded weights (slow).",
        ),
    )


def _engine_options(command: Command, activation_bits: Command) -> Command:
    for option in (
        click.option("--kernel", help="Force a kernel: lookup, lookup-avx2, popcount, ...  [default: the CPU's best]"),
        click.option(
            "--activation-scale",
            type=click.Choice(["token", "segment"]),
            default="segment",
            show_default=True,
            help="One scale per token, or per token and 128 columns.",
        ),
        activation_bits,
        click.option(
            "--kv-bits",
            type=click.Choice(["16", "8"]),
            default="16",
            show_default=True,
            help="Bits of the keys and values that are kept of each token. 8: half the memory of long contexts.",
        ),
        click.option(
            "--memory",
            type=Size(),
            help="Most memory, such as 4GB: experts that do not fit are read when they are chosen.  [default: all fit]",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all usable CPUs]"),
    ):
        command = option(command)
    return command


def rounded_inputs_option(command: Command) -> Command:
    """Add --activation-bits of commands that train."""
    return click.option(
        "--activation-bits", type=click.Choice(["6", "8", "16"]), default="16", show_default=True,
        help="Bits to which the inputs of packed matrices are rounded while they are trained. 16: not rounded.",
    )(command)  # fmt: skip


def sampling_options(command: Command) -> Command:
    """Add the sampling options; those not given come from the model's generation_config.json."""
    for option in (
        click.option("--seed", type=int, help="Seed of the sampling: the same seed gives the same text."),
        click.option("--xtc-threshold", type=float, help="XTC: probability from which on a token may be left out."),
        click.option(
            "--xtc-probability", type=float, help="XTC: how often all likely tokens but the last of them are left out."
        ),
        click.option("--dry-base", type=float, help="DRY: by what the penalty grows with each token of a repetition."),
        click.option("--dry-allowed-length", type=int, help="DRY: tokens that may be repeated without a penalty."),
        click.option("--dry-multiplier", type=float, help="DRY: penalty of tokens that go on with a repetition."),
        click.option(
            "--typical-p", type=float, help="Keep only the most typical tokens, of this probability together."
        ),
        click.option("--repetition-penalty", type=float, help="Above 1: tokens that have appeared become less likely."),
        click.option(
            "--min-p",
            type=float,
            help="Keep only tokens with at least this share of the likeliest token's probability.",
        ),
        click.option("--top-p", type=float, help="Keep only the likeliest tokens whose probabilities add up to this."),
        click.option("--top-k", type=int, help="Keep only this many of the likeliest tokens (0: all)."),
        click.option("--temperature", type=float, help="Randomness of sampling. 0: always the likeliest token."),
        click.option("--stop", multiple=True, help="Text that ends the answer (repeatable)."),
        click.option(
            "--max-tokens", type=int, help="Generate at most this many tokens.  [default: until the context is full]"
        ),
    ):
        command = option(command)
    return command


def lookup_option(command: Command) -> Command:
    """Add --prompt-lookup."""
    return click.option(
        "--prompt-lookup",
        is_flag=True,
        help="Check several tokens at once where a text repeats itself or its prompt: the same text, sooner or later.",
    )(command)


def settings_from(model: Any, options: dict[str, Any]) -> Any:
    """Return the generation settings of a model that `load_with` loaded, with the options that end a text."""
    from dataclasses import replace

    return replace(model.defaults, stop=options["stop"], max_tokens=options["max_tokens"])


def _sampling_given(options: dict[str, Any]) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", *_FURTHER)
    return {name: options[name] for name in names if options.get(name) is not None}


def load_with(store: str, options: dict[str, Any]) -> Any:
    """Load a store with the engine's options."""
    from bincompress.inference.load import load

    model = load(
        store,
        threads=options["threads"],
        activation_bits=int(options["activation_bits"]),
        activation_scale=options["activation_scale"],
        kernel=options["kernel"],
        memory=options["memory"],
        sampling=_sampling_given(options),
        prompt_lookup=options.get("prompt_lookup", False),
        kv_bits=int(options["kv_bits"]),
    )
    for note in model.notes:
        click.echo(f"note: {note}", err=True)
    return model
