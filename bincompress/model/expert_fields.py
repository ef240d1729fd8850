"""What does config.json say of a mixture of experts?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bincompress.model.declaration import Choice, Mixture
from bincompress.model.errors import ConfigError
from bincompress.model.fields import count, flag, number, size

_MOST_EXPERTS = 4096
_MOST_IN_ALL = 1 << 16  # experts of all layers: each has names, which are made before any weight is seen


@dataclass(frozen=True)
class Experts:
    """The mixtures of experts of a model's layers."""

    count: int
    chosen: int  # for each token
    inner: int  # rows of an expert's gate
    normalized: bool  # whether the weights of the chosen ones are made to sum to one
    layers: tuple[bool, ...]  # per layer: whether it has them, and no dense MLP
    choice: Choice = "softmax"
    has_offsets: bool = False  # whether a number of each expert is added to what it is chosen by
    scale: float = 1.0  # of the weights of the chosen ones
    added: float = 0.0  # to the sum of the chosen sigmoids before they are divided by it
    biased: bool = False  # whether router and experts have biases
    clamp: tuple[float, float] | None = None  # alpha and limit of a gate whose values are held within bounds
    shared: int = 0  # rows of the gate of an expert that is each token's; none: there is no such expert


def read_experts(raw: Mapping[str, Any], mixture: Mixture, layers: int) -> Experts | None:
    """Return the layers' mixture of experts; None where every layer has a dense MLP."""
    # transformers takes either name for the number.
    given = {field: raw[field] for field in mixture.count_fields if raw.get(field) is not None}
    if len(set(map(repr, given.values()))) > 1:
        raise ConfigError("config.json: " + " contradicts ".join(f"{name} {value!r}" for name, value in given.items()))
    field = next(iter(given), mixture.count_fields[0])
    number_of = count(raw, field, mixture.count)
    if number_of > _MOST_EXPERTS:
        raise ConfigError(f"config.json: {field}: expected at most {_MOST_EXPERTS}, found {number_of}")
    sparse = [number_of > 0] * layers
    if mixture.dense_layers:
        step, dense = size(raw, "decoder_sparse_step", 1), _dense_layers(raw)
        sparse = [number_of > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    elif mixture.dense_field:
        dense_layers = count(raw, mixture.dense_field, mixture.dense_default)
        sparse = [number_of > 0 and layer >= dense_layers for layer in range(layers)]
    elif not number_of:
        raise ConfigError(f"config.json: {field}: expected 1 to {_MOST_EXPERTS}, found 0")
    if not any(sparse):
        return None
    if number_of * sum(sparse) > _MOST_IN_ALL:
        raise ConfigError(
            f"config.json: {field} {number_of} in {sum(sparse)} layers: expected at most {_MOST_IN_ALL} experts in all"
        )
    chosen = size(raw, "num_experts_per_tok", mixture.chosen)
    if chosen > number_of:
        raise ConfigError(
            f"config.json: num_experts_per_tok {chosen} is more than the {number_of} experts that {field} gives"
        )
    normalized = flag(raw, "norm_topk_prob", mixture.sums_to_one) if mixture.normalized is None else mixture.normalized
    inner = size(raw, mixture.inner_field, mixture.inner)
    return Experts(
        number_of, chosen, inner, normalized, tuple(sparse),
        choice=mixture.choice,
        has_offsets=bool(mixture.offset_field) and flag(raw, mixture.offset_field, True),
        scale=number(raw, "routed_scaling_factor", 1.0) if mixture.choice == "sigmoid" else 1.0,
        added=mixture.added if mixture.choice == "sigmoid" else 0.0,
        biased=mixture.biased,
        clamp=_clamp(raw, mixture),
        shared=_shared(raw, mixture, inner),
    )  # fmt: skip


def _shared(raw: Mapping[str, Any], mixture: Mixture, inner: int) -> int:
    """Return the rows of the gate of an expert that is each token's; 0 where there is none."""
    if mixture.shared_count_field:
        return inner * count(raw, mixture.shared_count_field, 1)
    return size(raw, "shared_expert_intermediate_size", mixture.shared) if mixture.shared else 0


def _clamp(raw: Mapping[str, Any], mixture: Mixture) -> tuple[float, float] | None:
    if mixture.clamp is None:
        return None
    alpha, limit = mixture.clamp
    return number(raw, "swiglu_alpha", alpha), number(raw, "swiglu_limit", limit)


def _dense_layers(raw: Mapping[str, Any]) -> list[int]:
    found = raw.get("mlp_only_layers")
    listed = [] if found is None else found
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise ConfigError(f"config.json: mlp_only_layers: expected a list of numbers of layers, found {found!r:.80}")
    return listed
