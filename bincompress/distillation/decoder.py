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


class TorchDecoder:
    """A Llama-like decoder without weights of its own: teacher and student share it."""

    def __init__(self, config: ModelConfig, device: torch.device, positions: int) -> None:
        """Prepare the rotary tables of so many positions on a device; raises UnsupportedModelError by name."""
        lacks = config.beyond_llama()
        if lacks:
            raise UnsupportedModelError(f"distill does not know {config.architecture} yet: {', '.join(lacks)}")
        self.config = config
        cosines, sines = table(config.rope, config.head_dim, positions)
        self._cosines = torch.from_numpy(cosines).to(device)
        self._sines = torch.from_numpy(sines).to(device)

    def states(self, weights: Weights, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Run tokens (batch, n) and return what the output head reads, (batch, n, hidden).

        With a cache, they follow the positions in it and are added to it.
        """
        names, config = self.config.declaration.names, self.config
        stream = weights[names.embedding][ids].float()
        for layer in range(config.layers):
            own = _Layer(weights, names.layer.format(layer=layer))
            normed = _norm(stream, own.get(names.input_norm), config.norm_epsilon)
            stream = stream + self._attend(own, normed, layer, cache)
            normed = _norm(stream, own.get(names.post_norm), config.norm_epsilon)
            gate, up = (own.linear(part, normed) for part in names.gate_up)
            stream = stream + own.linear(names.down, functional.silu(gate) * up)
        if cache is not None:
            cache.length += ids.shape[1]
        return _norm(stream, weights[names.norm], config.norm_epsilon)

    def head(self, weights: Weights, states: Tensor) -> Tensor:
        """Return the logits (..., vocab) of states (..., hidden), float32."""
        names = self.config.declaration.names
        return functional.linear(states, weights[names.embedding if self.config.tied else names.head]).float()

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
        group = config.heads // config.kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        window = config.windows[layer]
        total = first + count
        if count == total and (window is None or window >= total):
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            seen = _visible(first, count, window or total, query.device)
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return own.linear(names.out, mixed.transpose(1, 2).reshape(batch, count, -1))

    def _turned(self, heads: Tensor, first: int) -> Tensor:
        """Rotate heads (batch, heads, n, head_dim) by their positions."""
        cosines, sines = (part[first : first + heads.shape[2]] for part in (self._cosines, self._sines))
        low, high = heads.chunk(2, -1)
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)


class _Layer:
    """The weights of one layer by their names in it."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights = weights
        self._prefix = prefix

    def get(self, name: str) -> Tensor:
        return self._weights[self._prefix + name]

    def linear(self, part: str, x: Tensor) -> Tensor:
        weight, bias = self.get(part + ".weight"), self._weights.get(f"{self._prefix}{part}.bias")
        return functional.linear(x, weight, bias)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def _visible(first: int, count: int, window: int, device: torch.device) -> Tensor:
    """Return which of the positions 0 .. first + count - 1 each of the last `count` sees, (count, first + count)."""
    own = torch.arange(first, first + count, device=device)[:, None]
    others = torch.arange(first + count, device=device)[None]
    return (others <= own) & (others > own - window)
