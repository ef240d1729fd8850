"""--prompt-cache: what was computed of a text is kept in a file, for the next run that begins alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.out_file import OutFile

if TYPE_CHECKING:
    from bincompress.inference.generate import Model
    from bincompress.inference.prefixes import PrefixCache

prompt_cache_option = click.option(
    "--prompt-cache",
    type=OutFile(),
    help="File that keeps what was computed of the text: the next run goes on where texts begin alike.",
)


def prefixes_of(model: Model) -> PrefixCache:
    """Return where one text's cache is kept, of the model's whole context."""
    from bincompress.inference.prefixes import PrefixCache
    from bincompress.model.cache import cache_bytes

    context, kind = model.decoder.config.context, model.defaults.cache
    return PrefixCache(model.decoder, context, kind, cache_bytes(model.decoder.config, context, kind))


class PromptCacheFile:
    """A file that is read at the start and written at the end; without a path, nothing."""

    def __init__(
        self, path: Path | None, store: str, model: Model, prefixes: PrefixCache | None, options: dict[str, Any]
    ) -> None:
        """Read the file, if there is one; raises PromptCacheError where it does not fit."""
        self._path, self._prefixes = path, prefixes
        if path is None or prefixes is None:
            return
        from bincompress.inference.engine import engine_of
        from bincompress.inference.prompt_cache import load_prefix

        self._engine = engine_of(
            store, int(options["activation_bits"]), options["activation_scale"], int(options["kv_bits"])
        )
        load_prefix(path, prefixes, model.decoder, self._engine)

    def save(self) -> None:
        """Write what was computed last."""
        if self._path is None or self._prefixes is None or (last := self._prefixes.last) is None:
            return
        from bincompress.inference.prompt_cache import save_prefix

        save_prefix(self._path, last, self._engine)
