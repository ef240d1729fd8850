"""The values of quantized blocks as GGUF files store them, for the types that most files are made of.

Every value is computed as ggml does: the scale times the integer in float32, less the block's minimum if it has one.
The NumPy twins are in cpu_kernels/reference/block_formats.py. Source: ggml-quants.c (`dequantize_row_*`).
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view

U1, F4 = numba.uint8, numba.float32


@kernel(numba.void(view(U1, 2), view(F4, 1), out(F4, 2)))
def q8_0(blocks, scales, values):
    """Compute 32 values a block: 8-bit integers times a scale.

    blocks: uint8 (n, 34), of which the first two bytes are the scale; scales: float32 (n,), the same; values: float32
    (n, 32).
    """
    for block in range(blocks.shape[0]):
        scale = scales[block]
        for place in range(32):
            values[block, place] = scale * np.float32(np.int8(blocks[block, 2 + place]))


@kernel(numba.void(view(U1, 2), view(F4, 1), out(F4, 2)))
def q5_0(blocks, scales, values):
    """Compute 32 values a block: 5-bit integers, less 16, times a scale; the fifth bits lie together.

    blocks: uint8 (n, 22): scale, 4 bytes of fifth bits, 16 of pairs; scales: float32 (n,); values: float32 (n, 32).
    """
    for block in range(blocks.shape[0]):
        scale = scales[block]
        for place in range(16):
            pair = np.int32(blocks[block, 6 + place])
            low = (np.int32(blocks[block, 2 + place // 8]) >> np.int32(place % 8)) & np.int32(1)
            high = (np.int32(blocks[block, 4 + place // 8]) >> np.int32(place % 8)) & np.int32(1)
            first = (pair & np.int32(15)) | (low << np.int32(4))
            second = (pair >> np.int32(4)) | (high << np.int32(4))
            values[block, place] = scale * np.float32(first - np.int32(16))
            values[block, 16 + place] = scale * np.float32(second - np.int32(16))


@kernel(numba.void(view(U1, 2), view(F4, 1), view(F4, 1), out(F4, 2)))
def q4_k(blocks, scales, minima, values):
    """Compute 256 values a block: 4-bit integers, with a 6-bit scale and a 6-bit minimum for each 32.

    blocks: uint8 (n, 144): scale, minimum, 12 bytes of scales and minima, 128 of pairs; scales, minima: float32 (n,),
    the first two; values: float32 (n, 256).
    """
    for block in range(blocks.shape[0]):
        for group in range(8):
            if group < 4:
                scale = np.int32(blocks[block, 4 + group]) & np.int32(63)
                minimum = np.int32(blocks[block, 8 + group]) & np.int32(63)
            else:
                both = np.int32(blocks[block, 8 + group])
                scale = (both & np.int32(15)) | ((np.int32(blocks[block, group]) >> np.int32(2)) & np.int32(48))
                minimum = (both >> np.int32(4)) | ((np.int32(blocks[block, 4 + group]) >> np.int32(2)) & np.int32(48))
            step = scales[block] * np.float32(scale)
            least = minima[block] * np.float32(minimum)
            start, shift = 16 + group // 2 * 32, np.int32(4 * (group % 2))
            for place in range(32):
                code = (np.int32(blocks[block, start + place]) >> shift) & np.int32(15)
                values[block, 32 * group + place] = step * np.float32(code) - least


@kernel(numba.void(view(U1, 2), view(F4, 1), out(F4, 2)))
def q6_k(blocks, scales, values):
    """Compute 256 values a block: 6-bit integers, less 32, with an 8-bit scale for each 16.

    blocks: uint8 (n, 210): 128 bytes of low bits, 64 of high bits, 16 scales, the scale of all; scales: float32 (n,),
    the last; values: float32 (n, 256).
    """
    for block in range(blocks.shape[0]):
        for group in range(8):
            half, part = group // 4, group % 4
            low, high = half * 64 + part % 2 * 32, 128 + half * 32
            low_shift, high_shift = np.int32(4 * (part // 2)), np.int32(2 * part)
            for sixteen in range(2):
                step = scales[block] * np.float32(np.int8(blocks[block, 192 + 2 * group + sixteen]))
                for place in range(16 * sixteen, 16 * sixteen + 16):
                    code = (np.int32(blocks[block, low + place]) >> low_shift) & np.int32(15)
                    code |= ((np.int32(blocks[block, high + place]) >> high_shift) & np.int32(3)) << np.int32(4)
                    values[block, 32 * group + place] = step * np.float32(code - np.int32(32))
