"""The decoder in PyTorch, with gradients: the same arithmetic as `bincompress.model.decoder`, over named weights."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bincompress.distillation.rounded_inputs import RoundedInputs
from bincompress.model.config import Experts, ModelConfig
from bincompress.model.errors import UnsupportedModelError
from bincompress.model.rope import table

Weights = Mapping[str, Tensor]

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


@dataclass
class Cache:
    """Keys and values of the positions that have been run, a pair of (batch, kv_heads, positions, head_dim) a layer."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def refuse_unknown(config: ModelConfig) -> None:
    """Raise UnsupportedModelError where a model has parts that this decoder does not have yet."""
    parts = {
        "inputs rounded to 8 bits": config.rounds_inputs,
        "attention sinks": config.sinks,
        "experts that are chosen otherwise, have biases, a clamped gate or a shared one beside them": _is_other(config),
        "layers without attention": config.recurrent is not None,
        "gated attention": config.gated,
        "heads whose neighbouring items are rotated": config.rotates_in_pairs,
        "queries that grow with their position": any(rope.query_growth for rope in config.ropes),
    }
    lacks = [part for part, has in parts.items() if has]
    if lacks:
        raise UnsupportedModelError(f"training does not know {config.architecture} yet: {', '.join(lacks)}")


def _is_other(config: ModelConfig) -> bool:
    experts = config.experts
    return experts is not None and (
        experts.choice != "softmax" or experts.biased or experts.clamp is not None or experts.shared > 0
    )


class TorchDecoder:
    """A decoder without weights of its own: teacher and student share it."""

    def __init__(
        self, config: ModelConfig, device: torch.device, positions: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Prepare the rotary tables of so many positions on a device; dtype: of what is multiplied.

        Raises UnsupportedModelError by name.
        """
        refuse_unknown(config)
        self.config = config
        self.dtype = dtype
        tables = {rope: table(rope, config.head_dim, positions) for rope in set(config.ropes)}
        on_device = {rope: tuple(torch.from_numpy(part).to(device) for part in parts) for rope, parts in tables.items()}
        self._tables = [on_device[rope] for rope in config.ropes]  # cosines and sines of each layer
        self._inputs: RoundedInputs | None = None

    def rounding(self, inputs: RoundedInputs | None) -> "TorchDecoder":
        """Return the same decoder with packed matrices whose inputs are rounded; None leaves them as they are."""
        found = copy.copy(self)
        found._inputs = inputs
        return found

    def states(self, weights: Weights, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Run tokens (batch, n) and return what the output head reads, (batch, n, hidden).

        With a cache, they follow the positions in it and are added to it.
        """
        stream = self.embed(weights, ids)
        for layer in range(self.config.layers):
            stream = self.layer(weights, stream, layer, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.normed(weights, stream)

    def embed(self, weights: Weights, ids: Tensor) -> Tensor:
        """Return the residual stream before the first layer, float32 (batch, n, hidden)."""
        return weights[self.config.declaration.names.embedding][ids].float() * self.config.embedding_multiplier

    def layer(self, weights: Weights, stream: Tensor, layer: int, cache: Cache | None = None) -> Tensor:
        """Return the residual stream after a layer, float32 (batch, n, hidden)."""
        names, config = self.config.declaration.names, self.config
        own = _Layer(weights, names.layer.format(layer=layer), self.dtype, self._inputs)
        read = self._norm(own, names.input_norm, stream).to(self.dtype)
        mixed = self._norm(own, names.out_norm, self._attend(own, read, layer, cache))
        stream = stream + config.residual_multiplier * mixed
        read = self._norm(own, names.post_norm, stream).to(self.dtype)
        experts = config.experts_of(layer)
        if experts is None:
            made = self._mlp(own, read, names.gate_up, names.down)
        else:
            made = self._mixture(own, read.flatten(0, 1), experts).view_as(stream)
        return stream + config.residual_multiplier * self._norm(own, names.down_norm, made)

    def normed(self, weights: Weights, stream: Tensor) -> Tensor:
        """Return what the output head reads of the stream after the last layer."""
        return self._normalized(stream, weights[self.config.declaration.names.norm])

    def head(self, weights: Weights, states: Tensor) -> Tensor:
        """Return the logits (..., vocab) of states (..., hidden), float32."""
        names = self.config.declaration.names
        name, states = names.embedding if self.config.tied else names.head, states.to(self.dtype)
        if self._inputs is not None:
            states = self._inputs(name, states)
        logits = functional.linear(states, weights[name].to(self.dtype)).float() / self.config.logit_divisor
        cap = self.config.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _mlp(self, own: "_Layer", read: Tensor, gate_up: tuple[str, str], down: str) -> Tensor:
        gate, up = (own.linear(part, read) for part in gate_up)
        inner = self._norm(own, self.config.declaration.names.inner_norm, _GATES[self.config.activation](gate) * up)
        return own.linear(down, inner.to(self.dtype))

    def _mixture(self, own: "_Layer", read: Tensor, experts: Experts) -> Tensor:
        """Return what the experts that each token of read (tokens, hidden) chooses make of it, float32."""
        names = self.config.declaration.names
        shares = own.linear(names.router, read).float().softmax(-1)
        weights, chosen = shares.topk(experts.chosen, -1)
        if experts.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros(read.shape, device=read.device)
        for expert in range(experts.count):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                gate, up = (part.format(expert=expert) for part in names.expert_gate_up)
                made = self._mlp(own, read[tokens], (gate, up), names.expert_down.format(expert=expert))
                result = result.index_add(0, tokens, made.float() * weights[tokens, places, None])
        return result

    def _attend(self, own: "_Layer", normed: Tensor, layer: int, cache: Cache | None) -> Tensor:
        config, names = self.config, self.config.declaration.names
        batch, count, _ = normed.shape
        first = cache.length if cache is not None else 0
        query, key, value = (own.linear(part, normed) for part in names.qkv)
        query, key = query.float(), key.float()
        if config.qk_norm == "whole":
            query, key = self._norm(own, names.q_norm, query), self._norm(own, names.k_norm, key)
        query, key, value = (
            part.view(batch, count, -1, config.head_dim).transpose(1, 2) for part in (query, key, value)
        )
        if config.qk_norm == "head":
            query, key = self._norm(own, names.q_norm, query), self._norm(own, names.k_norm, key)
        query, key = (self._turned(heads, layer, first).to(value.dtype) for heads in (query, key))
        if cache is not None:
            if layer in cache.layers:
                before = cache.layers[layer]
                key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
            cache.layers[layer] = (key, value)
        window = config.windows[layer]
        total = first + count
        seen, whole = None, window is None or window >= total
        if not whole or 1 < count < total:
            seen = _visible(first, count, window or total, query.device)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None and count > 1,
            scale=config.query_scale, enable_gqa=config.heads != config.kv_heads,
        )  # fmt: skip
        mixed = self._norm(own, names.mixed_norm, mixed.transpose(1, 2).reshape(batch, count, -1))
        return own.linear(names.out, mixed.to(self.dtype))

    def _turned(self, heads: Tensor, layer: int, first: int) -> Tensor:
        """Rotate the first items of heads (batch, heads, n, head_dim), or all of them, by their positions."""
        cosines, sines = (part[first : first + heads.shape[2]] for part in self._tables[layer])
        count = 2 * cosines.shape[1]
        if not count:
            return heads
        low, high = heads[..., :count].chunk(2, -1)
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines, heads[..., count:]], -1)

    def _norm(self, own: "_Layer", name: str, x: Tensor) -> Tensor:
        """Normalize by a layer's weight of this name, in float32; an empty name leaves x as it is."""
        return self._normalized(x, own.get(name)) if name else x

    def _normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_epsilon)
        return scaled * (weight.float() + self.config.norm_offset)


class _Layer:
    """The weights of one layer by their names in it."""

    def __init__(self, weights: Weights, prefix: str, dtype: torch.dtype, inputs: RoundedInputs | None) -> None:
        self._weights = weights
        self._prefix = prefix
        self._dtype = dtype
        self._inputs = inputs
        self._read: tuple[Tensor, Tensor] | None = None  # the last input, and how it was rounded

    def get(self, name: str) -> Tensor:
        return self._weights[self._prefix + name]

    def linear(self, part: str, x: Tensor) -> Tensor:
        weight, bias = self.get(part + ".weight"), self._weights.get(f"{self._prefix}{part}.bias")
        x = self._rounded(part, x)
        return functional.linear(x, weight.to(self._dtype), None if bias is None else bias.to(self._dtype))

    def _rounded(self, part: str, x: Tensor) -> Tensor:
        """Return an input as the matrix reads it; matrices that read the same input share its rounding."""
        name = f"{self._prefix}{part}.weight"
        if self._inputs is None or not self._inputs.plain(name):
            return x if self._inputs is None else self._inputs(name, x)
        if self._read is None or self._read[0] is not x:
            self._read = x, self._inputs(name, x)
        return self._read[1]


def _visible(first: int, count: int, window: int, device: torch.device) -> Tensor:
    """Return which of the positions 0 .. first + count - 1 each of the last `count` sees, (count, first + count)."""
    own = torch.arange(first, first + count, device=device)[:, None]
    others = torch.arange(first + count, device=device)[None]
    return (others <= own) & (others > own - window)
