"""A tensor's items as they lie in a file, mapped into memory and read-only."""

import errno
import math
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.tensors.weight import TensorSource, Weight

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
# Tensors of other dtypes are kept as they are where the model does not need them. (4-bit and smaller floats have no
# whole number of bytes an item, so their sizes are not checked.)
OTHER_DTYPES: dict[str, Any] = {
    "BOOL": np.uint8, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
    "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F64": np.float64, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip


def map_items(source: TensorSource) -> NDArray[Any]:
    """Map a tensor's items into memory, read-only, in its own shape: floats as bit patterns.

    Raises CheckpointError where the dtype is neither a float's nor one of OTHER_DTYPES, or the file is shorter than its
    header said.
    """
    if source.dtype not in ITEM_BYTES and source.dtype not in OTHER_DTYPES:
        known = ", ".join([*ITEM_BYTES, *OTHER_DTYPES])
        raise CheckpointError(f"{source.name}: dtype {source.dtype}; expected one of {known}")
    item = OTHER_DTYPES.get(source.dtype, np.uint32 if source.dtype == "F32" else np.uint16)
    if not math.prod(source.shape):
        return np.empty(source.shape, item)
    # Mapped, not read: filling new memory costs three times what the first pass over a mapped file does.
    start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with open(source.file, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < source.offset + source.nbytes:
                raise CheckpointError(
                    f"{source.name}: {source.file} has {size:,} bytes, the tensor ends at "
                    f"{source.offset + source.nbytes:,}; has it changed since?"
                )
            mapped = mmap.mmap(
                file.fileno(), source.offset - start + source.nbytes, access=mmap.ACCESS_READ, offset=start
            )
    except OSError as error:
        if error.errno == errno.ENOMEM:  # the machine's fault, or a limit's, not the file's
            raise
        raise CheckpointError(f"{source.name}: {source.file} not readable: {error}") from None
    bits = np.frombuffer(mapped, np.uint8, source.nbytes, source.offset - start)
    # Kernels want aligned items; the format does not promise them.
    aligned = bits.view(item) if bits.ctypes.data % item().itemsize == 0 else np.frombuffer(bits.tobytes(), item)
    return aligned.reshape(source.shape)


def map_floats(source: TensorSource) -> NDArray[np.float32]:
    """Return the values of a small tensor of floats in its own shape, such as the scales of a quantized one."""
    items = map_items(source)
    return Weight(items.reshape(1, -1), source.dtype).float32().reshape(source.shape)
