"""A matrix whose inputs the model itself rounds to 8 bits a token, as BitNet is trained with."""

import numpy as np

from bincompress.model.linear import Floats, Linear
from bincompress.model.low_rank_linear import LowRankLinear
from bincompress.model.packed_linear import PackedLinear, StackedLinear

_MOST = np.float32(127)
_LEAST = np.float32(1e-5)  # of a token's greatest magnitude


class RoundedLinear:
    """Rounds its inputs, and multiplies them in float32."""

    def __init__(self, linear: Linear) -> None:
        self.rows, self.cols = linear.rows, linear.cols
        self._linear = linear

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols), rounded, times the transposed matrix, (n, rows)."""
        return self._linear(rounded(x))


def rounding(linear: Linear) -> Linear:
    """Return the matrix with rounded inputs.

    A product with quantized activations does the same in integers, if each token has one scale.
    """
    if isinstance(linear, PackedLinear | LowRankLinear):
        return linear.per_token()
    if isinstance(linear, StackedLinear) and any(
        isinstance(part, PackedLinear | LowRankLinear) for part in linear.parts
    ):
        return StackedLinear([rounding(part) for part in linear.parts])
    return RoundedLinear(linear)


def rounded(x: Floats) -> Floats:
    """Return x (n, cols) in steps of a 127th of each token's greatest magnitude.

    Source: transformers, integrations/bitnet.py (`ActQuant`).
    """
    scale = _MOST / np.maximum(np.abs(x).max(axis=1, keepdims=True), _LEAST)
    steps = np.rint(x * scale).clip(-_MOST - 1, _MOST)
    return np.asarray(steps / scale, np.float32)
