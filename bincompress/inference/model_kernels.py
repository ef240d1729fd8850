"""Which kernels does a model's first token take beside those of Llama? For what compiles them ahead."""

import numpy as np

from bincompress.model.config import ModelConfig
from cpu_kernels.decoder.attention import ATTEND_WITH_SINKS
from cpu_kernels.decoder.gates import clamped_gate, gate_by_sigmoid
from cpu_kernels.decoder.norms import GATES, PLACE_IN_PAIRS, add_normed, norm_queries_keys, norm_rows
from cpu_kernels.decoder.recurrence import convolve, delta_rule, norm_and_gate
from cpu_kernels.decoder.routing import choose_by_logits, choose_by_sigmoid, choose_experts, mix_experts
from cpu_kernels.jit.addresses import NATIVE_CALLS
from cpu_kernels.jit.compiler import Kernel
from cpu_kernels.matmul.chosen import run_chosen, set_up

_USUAL = ("silu",)


def kernels_beside_llamas(config: ModelConfig) -> list[Kernel]:
    """Return the kernels, those that take longest to compile first."""
    names, experts, recurrent = config.names, config.experts, config.recurrent
    norms = (names.input_norm, names.post_norm, names.out_norm, names.down_norm)
    chosen: list[tuple[bool, Kernel]] = [
        (config.sinks, ATTEND_WITH_SINKS[np.dtype(np.uint16)]),
        (config.rotates_in_pairs, PLACE_IN_PAIRS[np.dtype(np.uint16)]),
        (experts is not None and experts.choice == "logits", choose_by_logits),
        (experts is not None and experts.choice == "sigmoid", choose_by_sigmoid),
        (experts is not None and experts.choice == "softmax", choose_experts),
        (experts is not None and NATIVE_CALLS, run_chosen),
        (experts is not None and NATIVE_CALLS, set_up),
        (experts is not None, mix_experts),
        (experts is not None and experts.clamp is not None, clamped_gate),
        (recurrent is not None and recurrent.kind == "delta", delta_rule),
        (recurrent is not None and recurrent.kind == "delta", norm_and_gate),
        (recurrent is not None, convolve),
        (config.gated, gate_by_sigmoid),
        (list(map(bool, norms)) != [True, True, False, False] or config.residual_multiplier != 1, add_normed),
        (config.qk_norm == "whole", norm_queries_keys),
        (bool(names.mixed_norm or names.inner_norm), norm_rows),
        (config.activation not in _USUAL, GATES[config.activation]),
    ]
    return [kernel for takes, kernel in chosen if takes]
