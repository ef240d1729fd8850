"""Gates beside those of Llama and its kin: with values held within bounds, and of what attention or an expert gives."""

from typing import Any

from numba import types
from numpy import float32

from cpu_kernels.decoder.exponential import exponential
from cpu_kernels.jit.compiler import kernel, out, view

_F4, _SIZE = types.float32, types.intp
_ONE = float32(1.0)


@kernel(types.void(view(_F4, 2), _F4, _F4, _SIZE, _SIZE, out(_F4, 2)))
def clamped_gate(gate_up: Any, alpha: float, limit: float, start: int, stop: int, result: Any) -> None:
    """For rows start..stop-1: result = x / (1 + exp(-alpha x)) * (y + 1), the gate of gpt-oss.

    gate_up (n, 2 * inner): x, the first half, held to at most limit, and y, the second, to -limit .. limit; result
    (n, inner).
    """
    inner = result.shape[1]
    for row in range(start, stop):
        for i in range(inner):
            x, y = gate_up[row, i], gate_up[row, inner + i]
            x = limit if x > limit else x  # NaN stays
            y = limit if y > limit else y
            y = -limit if y < -limit else y
            result[row, i] = x / (_ONE + exponential(-alpha * x)) * (y + _ONE)


@kernel(types.void(out(_F4, 2), view(_F4, 2), _SIZE, _SIZE))
def gate_by_sigmoid(values: Any, gates: Any, start: int, stop: int) -> None:
    """For rows start..stop-1: values = values * sigmoid(gates), in place; both (n, width)."""
    for row in range(start, stop):
        own, factors = values[row], gates[row]
        for i in range(own.size):
            own[i] = own[i] / (_ONE + exponential(-factors[i]))
