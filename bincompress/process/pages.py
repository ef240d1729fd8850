"""Arrays whose memory is taken as they are filled, and given back when they are freed."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.process.systems import private_pages

_FEWEST = 1 << 17  # bytes of the smallest array with pages of its own


def zeros_by_page(shape: tuple[int, ...], item: type[Any]) -> NDArray[Any]:
    """Return zeros whose pages take memory when they are first written to, and go back when the array does.

    numpy takes large arrays from the allocator's heap once some were freed: there zeros are written, so a cache for a
    whole context takes its memory before it is filled, and what is freed stays with the process. To have the allocator
    map every large array is no way out: each product's result would be new pages, which took a third of the time of a
    pass of four texts. Raises MemoryError.
    """
    size = math.prod(shape) * np.dtype(item).itemsize
    pages = private_pages(size) if size >= _FEWEST else None
    return np.zeros(shape, item) if pages is None else np.frombuffer(pages, item).reshape(shape)
