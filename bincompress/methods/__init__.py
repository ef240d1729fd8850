"""How does a matrix become planes and coefficients? One pure function a method.

A new method is one function `binarize(weight, settings) -> Binarized` and one line in METHODS.
"""

from collections.abc import Callable

from bincompress.methods import dbllm, uniform, wgm, xnor
from bincompress.records import Binarized, Settings, Weight

METHODS: dict[str, Callable[[Weight, Settings], Binarized]] = {
    "dbllm": dbllm.binarize,
    "uniform": uniform.binarize,
    "wgm": wgm.binarize,
    "xnor": xnor.binarize,
}
