"""A text file that a user named."""

from pathlib import Path

from bincompress.errors import BincompressError


def read_text(path: Path) -> str:
    """Return a file's text; raises BincompressError where it is not readable as UTF-8."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise BincompressError(f"{path}: not readable as UTF-8 text: {error}") from None
