"""How many tokens of a calibration reached each expert, and which experts saw too few?"""

from collections.abc import Mapping, Sequence

from bincompress.calibration.statistics import Statistics
from bincompress.model.config import ModelConfig

_SHOWN = 8  # experts of a layer that are named in a line

Counts = Mapping[int, Sequence[int]]  # by layer: the tokens of each of its experts


def expert_tokens(config: ModelConfig, statistics: Statistics) -> dict[int, list[int]]:
    """Return the tokens of every expert, by layer; empty where the model has no mixture of experts."""
    return {
        layer: [statistics.tokens(key) for key in [*config.stages_of_layer(layer)[2]][: experts.count]]
        for layer in range(config.layers)
        if (experts := config.experts_of(layer)) is not None
    }


def few_tokens(config: ModelConfig, counts: Counts) -> list[str]:
    """Return what a summary says of experts with fewer tokens than columns: a line for all, and one for each layer.

    Nothing where every expert saw as many.
    """
    cols = _columns(config)
    few = {
        layer: [(expert, tokens) for expert, tokens in enumerate(found) if tokens < cols]
        for layer, found in counts.items()
    }
    number = sum(map(len, few.values()))
    if not number:
        return []
    none = sum(tokens == 0 for found in few.values() for _, tokens in found)
    everything = sum(map(len, counts.values()))
    lines = [
        f"few tokens: {number:,} of {everything:,} experts saw fewer tokens than the {cols:,} columns of their inputs"
        + (f", {none:,} of them none at all: their errors are not compensated" if none else "")
        + "; more --samples help"
    ]
    for layer, found in few.items():
        shown = ", ".join(f"{expert} ({tokens:,})" for expert, tokens in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        if found:
            lines.append(f"  layer {layer}: experts {shown}{more}")
    return lines


def _columns(config: ModelConfig) -> int:
    experts = config.experts
    return max(config.hidden, experts.inner) if experts is not None else config.hidden
