"""What does a method know of the inputs of the layer whose weights it packs?"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.curvature import Curvature, curvature


@dataclass(frozen=True)
class Inputs:
    """What calibration found of a linear layer's inputs x."""

    name: str
    hessian: NDArray[np.float32]  # (cols, cols): the mean of x x^T
    absmax: NDArray[np.float32]  # (cols,): the greatest |x|
    # (cols,): of a transformation that is folded into the norm before the layer; its columns are multiplied by it.
    channel_scale: NDArray[np.float32] | None = None
    # Where the layers before are binarized already, with x* and r* for what the unquantized model has in that place:
    drift: NDArray[np.float32] | None = None  # (cols, cols): the mean of (x* - x) x^T
    # (rows, cols): of (r* - r) x^T, r the residual stream after the unquantized matrix has added to it; of one that
    # does so, in place of drift.
    lack: NDArray[np.float32] | None = None
    tokens: int | None = None  # of which these are the means; None: not known

    @cached_property
    def curvature(self) -> Curvature:
        """What an error costs; found once. Raises TensorError where the Hessian is not that of any inputs."""
        return curvature(self.hessian, self.name)
