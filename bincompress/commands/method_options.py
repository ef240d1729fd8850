"""The options of `compress` that methods declare: one for each setting, whichever methods have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from bincompress.methods import METHODS, Method, Option, embeddings, options


class Choice(click.ParamType[Any]):
    """One of a setting's choices, whatever their types."""

    def __init__(self, choices: tuple[Any, ...]) -> None:
        self.choices = choices
        self.name = "|".join(map(str, choices))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the choice that a text names."""
        for choice in self.choices:
            if str(value) == str(choice):
                return choice
        self.fail(f"{value!r}: expected one of {', '.join(map(str, self.choices))}", param, ctx)


def method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --method, --embeddings and an option for each setting of the methods; those not given are None."""
    binary = [method.name for method in METHODS if method.binary]
    exact = " or ".join(method.name for method in METHODS if method.recognize is not None)
    added = [
        click.option(
            "--method",
            type=click.Choice(binary),
            help="How matrices become planes (docs/methods.md).  "
            + f"[default: {exact} for few levels, else {METHODS[0].name}]",
        ),
        click.option(
            "--embeddings",
            type=click.Choice(list(embeddings())),
            help=f"Embeddings and output head.  [default: {exact} for few levels, else keep]",
        ),
        *(_option(name, owners) for name, owners in options().items() if any(owner.binary for owner, _ in owners)),
    ]
    for option in reversed(added):
        command = option(command)
    return command


def method_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Take the settings that were given out of a command's options."""
    taken = {name: given.pop(name, None) for name in ("method", "embeddings", *options())}
    return {name: value for name, value in taken.items() if value is not None}


def _option(name: str, owners: list[tuple[Method, Option]]) -> Callable[..., Any]:
    owners = [(method, option) for method, option in owners if method.binary]
    first = owners[0][1]
    every = len(owners) == sum(method.binary for method in METHODS)
    where = "" if every else ", ".join(method.name for method, _ in owners) + ": "
    if first.kind is bool:
        return click.option(first.flag, name, is_flag=True, default=None, help=f"{where}{_sentence(first.text, where)}")
    kind: Any = Choice(first.choices) if first.choices else first.kind
    return click.option(first.flag, name, type=kind, help=f"{where}{_sentence(first.text, where)}  {_defaults(owners)}")


def _sentence(text: str, where: str) -> str:
    return (text if where else text[0].upper() + text[1:]) + "."


def _defaults(owners: list[tuple[Method, Option]]) -> str:
    """Return the defaults of an option, the usual one and those of methods that have another."""
    usual = owners[0][1].default
    others = [f"{method.name}: {option.default}" for method, option in owners if option.default != usual]
    return f"[default: {'; '.join([str(usual), *others])}]"
