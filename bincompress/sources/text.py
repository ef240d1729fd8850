"""A text file that a user named."""

from pathlib import Path

from bincompress.errors import BincompressError
from bincompress.sources.json_files import refuse_pointer

UTF_8 = "utf-8-sig"  # without the mark that some editors put before the first line


def read_text(path: Path) -> str:
    """Return a file's text; raises BincompressError where it is not readable as UTF-8, or a Git LFS pointer."""
    if path.is_file():
        refuse_pointer(path)
    try:
        return path.read_text(UTF_8)
    except (OSError, ValueError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or error
        raise BincompressError(f"{path}: not readable as UTF-8 text: {cause}") from None
