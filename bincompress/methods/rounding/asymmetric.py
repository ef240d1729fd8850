"""What should a matrix aim at when the layers before it are binarized already, and its inputs no longer what they were?

At the outputs W x* that the unquantized model has: W' minimizes the mean of |W x* - W' x|^2 over the inputs x as they
are now. A matrix that adds to the residual stream aims at what that has afterwards, and makes up for all before it.
The whole step shrinks the outputs too, as least squares does with noisy inputs; a share of it is better. Source:
asymmetric calibration (GPTAQ, arXiv 2504.02692), with the residual stream's lack added to it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding.curvature import Curvature

Floats = NDArray[np.float32]
_SHARE = 0.4  # of the step: 0.3 to 0.5 do equally well, the whole step a quarter worse


def asymmetric_target(weights: Floats, known: Curvature, inputs: Inputs) -> Floats:
    """Return the weights (rows, cols) that come nearest to the unquantized outputs on the inputs as they are now.

    Without inputs.drift and inputs.lack the inputs are what they were, and so are the weights.
    """
    if inputs.lack is not None:
        pull: NDArray[Any] = inputs.lack
    elif inputs.drift is not None:
        pull = weights @ inputs.drift
    else:
        return weights
    # H^-1 = U^T U, damped as in compensation.
    step: NDArray[Any] = (pull @ known.factor.T) @ known.factor
    return np.asarray(weights + np.float32(_SHARE) * step)
