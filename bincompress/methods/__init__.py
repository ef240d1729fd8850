"""How does a matrix become planes and coefficients? One pure function a method.

A new method is one function `binarize(weight, settings, inputs) -> Binarized` and one line in METHODS. inputs: what
calibration found of the layer's inputs, None where settings do not ask for it.
"""

from collections.abc import Callable

from bincompress.methods import billm, dbellquant, dbllm, uniform, wgm, xnor
from bincompress.records import Binarized, Inputs, Settings, Weight

METHODS: dict[str, Callable[[Weight, Settings, Inputs | None], Binarized]] = {
    "billm": billm.binarize,
    "dbellquant": dbellquant.binarize,
    "dbllm": dbllm.binarize,
    "uniform": uniform.binarize,
    "wgm": wgm.binarize,
    "xnor": xnor.binarize,
}
