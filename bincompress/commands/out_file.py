"""Options that name a file or folder to be written: refused before the work where it cannot be."""

from pathlib import Path
from typing import Any

import click


class OutFile(click.Path):
    """A path of a file that the command writes."""

    def __init__(self, *, appends: bool = False) -> None:
        """appends: as `refuse_unwritable` has it."""
        super().__init__(path_type=Path)
        self._appends = appends

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; raises BincompressError where no file can be written there."""
        from bincompress.process.out_file import refuse_unwritable

        path = Path(str(super().convert(value, param, ctx)))
        if ctx is None or not ctx.resilient_parsing:
            refuse_unwritable(path, _what(param), appends=self._appends)
        return path


class OutFolder(click.Path):
    """A path of a folder that the command writes in, and makes where it is not there."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; raises BincompressError where nothing can be written there."""
        from bincompress.process.out_file import refuse_unwritable_folder

        path = Path(str(super().convert(value, param, ctx)))
        if ctx is None or not ctx.resilient_parsing:
            refuse_unwritable_folder(path, _what(param))
        return path


def _what(param: click.Parameter | None) -> str:
    if param is None:
        return "path"
    return param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
