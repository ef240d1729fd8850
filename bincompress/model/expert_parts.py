"""What a mixture may have beside its experts' matrices: biases, and an expert that is each token's."""

from dataclasses import dataclass

import numpy as np

from bincompress.model.config import ModelConfig
from bincompress.model.linear import Floats, Linear, WeightSource
from cpu_kernels.decoder.norms import GATES


class Shared:
    """An expert that is each token's, as much of it as its gate (1, hidden) says; all of it where there is no gate."""

    def __init__(self, config: ModelConfig, gate: Linear | None, gate_up: Linear, down: Linear) -> None:
        self._gate, self._gate_up, self._down = gate, gate_up, down
        self._apply, self._no_bias = GATES[config.activation], np.zeros(gate_up.rows, np.float32)
        self.inner = down.cols

    def gated(self, x: Floats) -> Floats:
        """Return what its down matrix reads, (n, inner)."""
        inner = np.empty((len(x), self.inner), np.float32)
        self._apply(self._gate_up(x), self._no_bias, 0, len(x), inner)
        return inner

    def down(self, inner: Floats, x: Floats) -> Floats:
        """Return what it gives for x (n, hidden), of which `gated` gave inner."""
        made = self._down(inner)
        if self._gate is None:
            return made
        with np.errstate(over="ignore"):
            made /= np.float32(1.0) + np.exp(-self._gate(x))
        return made


def read_shared(config: ModelConfig, source: WeightSource, layer: int) -> Shared | None:
    """Read the expert of a layer that is each token's; None where there is none."""
    if config.experts is None or not config.experts.shared:
        return None
    gate_up, down = config.names.of_shared(layer)
    gate = source.linear([config.shared_gate_of(layer)]) if config.names.shared_gate else None
    return Shared(config, gate, source.linear(gate_up), source.linear([down]))


@dataclass(frozen=True)
class Biases:
    """Biases of a layer's router (experts,), and of its experts, (experts, 2 * inner) and (experts, hidden)."""

    router: Floats
    gate_up: Floats
    down: Floats


def read_biases(config: ModelConfig, source: WeightSource, layer: int) -> Biases | None:
    """Read the biases of a layer's router and experts; None where they have none."""
    experts = config.experts
    if experts is None or not experts.biased:
        return None
    everyone = np.arange(experts.count)
    in_turns, down = (source.embedding(name).rows_of(everyone) for name in config.expert_biases_of(layer))
    gate_up = np.concatenate([in_turns[:, ::2], in_turns[:, 1::2]], axis=1)
    return Biases(source.vector([config.router_of(layer, "bias")]), gate_up, down)
