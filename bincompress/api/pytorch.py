"""What is said where something needs PyTorch, which is not installed."""

import contextlib
from collections.abc import Iterator

from bincompress.errors import BincompressError


@contextlib.contextmanager
def torch_needed(what: str) -> Iterator[None]:
    """Say how to install PyTorch where it is not."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BincompressError(
            f"{what} needs PyTorch, which is not installed: pip install 'bincompress[distill]'"
        ) from None
