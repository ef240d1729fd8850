"""The decoder in PyTorch, with gradients: the same arithmetic as `bincompress.model.decoder`, over named weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from bincompress.model.config import ModelConfig
from bincompress.model.errors import UnsupportedModelError
from bincompress.model.rope import table

Weights = Mapping[str, Tensor]


@dataclass
class Cache:
    """Keys and values of the positions that have been run, a pair of (batch, kv_heads, positions, head_dim) a layer."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def refuse_unknown(config: ModelConfig) -> None:
    """Raise UnsupportedModelError where a model has parts that this decoder does not have yet."""
    lacks = config.beyond_llama()
    if lacks:
        raise UnsupportedModelError(f"training does not know {config.architecture} yet: {', '.join(lacks)}")


class TorchDecoder:
    """A Llama-like decoder without weights of its own: teacher and student share it."""

    def __init__(
        self, config: ModelConfig, device: torch.device, positions: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Prepare the rotary tables of so many positions on a device; dtype: of what is multiplied.

        Raises UnsupportedModelError by name.
        """
        refuse_unknown(config)
        self.config = config
        self.dtype = dtype
        cosines, sines = table(config.rope, config.head_dim, positions)
        self._cosines = torch.from_numpy(cosines).to(device)
        self._sines = torch.from_numpy(sines).to(device)

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
        return weights[self.config.declaration.names.embedding][ids].float()

    def layer(self, weights: Weights, stream: Tensor, layer: int, cache: Cache | None = None) -> Tensor:
        """Return the residual stream after a layer, float32 (batch, n, hidden)."""
        names, config = self.config.declaration.names, self.config
        own = _Layer(weights, names.layer.format(layer=layer), self.dtype)
        normed = _norm(stream, own.get(names.input_norm), config.norm_epsilon).to(self.dtype)
        stream = stream + self._attend(own, normed, layer, cache)
        normed = _norm(stream, own.get(names.post_norm), config.norm_epsilon).to(self.dtype)
        gate, up = (own.linear(part, normed) for part in names.gate_up)
        return stream + own.linear(names.down, functional.silu(gate) * up)

    def normed(self, weights: Weights, stream: Tensor) -> Tensor:
        """Return what the output head reads of the stream after the last layer."""
        return _norm(stream, weights[self.config.declaration.names.norm], self.config.norm_epsilon)

    def head(self, weights: Weights, states: Tensor) -> Tensor:
        """Return the logits (..., vocab) of states (..., hidden), float32."""
        names = self.config.declaration.names
        matrix = weights[names.embedding if self.config.tied else names.head]
        return functional.linear(states.to(self.dtype), matrix.to(self.dtype)).float()

    def _attend(self, own: "_Layer", normed: Tensor, layer: int, cache: Cache | None) -> Tensor:
        config, names = self.config, self.config.declaration.names
        batch, count, _ = normed.shape
        first = cache.length if cache is not None else 0
        query, key, value = (
            own.linear(part, normed).view(batch, count, -1, config.head_dim).transpose(1, 2) for part in names.qkv
        )
        query, key = query.float(), key.float()
        if config.qk_norm:
            query = _norm(query, own.get(names.q_norm), config.norm_epsilon)
            key = _norm(key, own.get(names.k_norm), config.norm_epsilon)
        query, key = (self._turned(heads, first).to(value.dtype) for heads in (query, key))
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
            enable_gqa=config.heads != config.kv_heads,
        )  # fmt: skip
        return own.linear(names.out, mixed.transpose(1, 2).reshape(batch, count, -1))

    def _turned(self, heads: Tensor, first: int) -> Tensor:
        """Rotate heads (batch, heads, n, head_dim) by their positions."""
        cosines, sines = (part[first : first + heads.shape[2]] for part in (self._cosines, self._sines))
        low, high = heads.chunk(2, -1)
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)


class _Layer:
    """The weights of one layer by their names in it."""

    def __init__(self, weights: Weights, prefix: str, dtype: torch.dtype) -> None:
        self._weights = weights
        self._prefix = prefix
        self._dtype = dtype

    def get(self, name: str) -> Tensor:
        return self._weights[self._prefix + name]

    def linear(self, part: str, x: Tensor) -> Tensor:
        weight, bias = self.get(part + ".weight"), self._weights.get(f"{self._prefix}{part}.bias")
        return functional.linear(x, weight.to(self._dtype), None if bias is None else bias.to(self._dtype))


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def _visible(first: int, count: int, window: int, device: torch.device) -> Tensor:
    """Return which of the positions 0 .. first + count - 1 each of the last `count` sees, (count, first + count)."""
    own = torch.arange(first, first + count, device=device)[:, None]
    others = torch.arange(first + count, device=device)[None]
    return (others <= own) & (others > own - window)
