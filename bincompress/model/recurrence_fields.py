"""Which layers read a state in place of the tokens before them, and of which sizes is it? As config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bincompress.model.declaration import Recurrence
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.fields import flag, size

_INTERVAL = 4  # of layers with attention, where absent
_MOST_HEADS = 4096
_WIDEST = 64  # positions of a convolution
_MOST_STATE = 1 << 26  # numbers of a layer's state


@dataclass(frozen=True)
class Recurrent:
    """Layers whose tokens read a state; sizes of heads are those of the gated delta rule."""

    kind: Literal["delta", "convolution"]
    layers: tuple[bool, ...]  # per layer: whether it is one, and has no attention
    width: int  # positions that a convolution sees, the token's own among them
    channels: int  # of the convolution
    out: int  # columns of the matrix that reads what the layer makes
    key_heads: int = 0
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    in_turns: bool = False  # whether the rows of queries, keys, values and gates take turns by head of keys
    biased: bool = False  # whether its matrices and its convolution have biases

    @property
    def rows(self) -> int:
        """Rows of all matrices that read the layer's input, but for the small ones of its gates."""
        return 3 * self.out if self.kind == "convolution" else self.channels + self.out

    @property
    def state_bytes(self) -> int:
        """Bytes of a layer's state, of which a text has two."""
        numbers = (self.width - 1) * self.channels + self.heads * self.key_dim * self.value_dim
        return 2 * 4 * numbers


def recurrent_layers(raw: Mapping[str, Any], declared: Recurrence, layers: int) -> tuple[bool, ...]:
    """Return which layers read a state; raises UnsupportedModelError or ConfigError by name."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ConfigError(f"config.json: layer_types: expected a list of {layers} kinds, found {str(kinds)[:80]}")
        known = ("full_attention", declared.layer_type)
        for kind in kinds:
            if kind not in known:
                raise UnsupportedModelError(
                    f"config.json: layer type {kind!r:.60} is not supported; known: {', '.join(known)}"
                )
        return tuple(kind == declared.layer_type for kind in kinds)
    if declared.interval:
        interval = size(raw, declared.interval, _INTERVAL)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    listed = raw.get(declared.listed)
    if listed is None:
        return (False,) * layers
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise ConfigError(f"config.json: {declared.listed}: expected a list of numbers of layers, found {listed!r:.80}")
    return tuple(layer not in listed for layer in range(layers))


def read_recurrent(raw: Mapping[str, Any], declared: Recurrence, layers: int, hidden: int) -> Recurrent | None:
    """Return the layers that read a state; None where each has attention."""
    which = recurrent_layers(raw, declared, layers)
    if not any(which):
        return None
    if declared.kind == "convolution":
        width = size(raw, "conv_L_cache", 3, limit=_WIDEST)
        return Recurrent("convolution", which, width, hidden, hidden, biased=flag(raw, "conv_bias"))
    key_heads, heads = (
        size(raw, field, default, limit=_MOST_HEADS)
        for field, default in (("linear_num_key_heads", 16), ("linear_num_value_heads", 32))
    )
    key_dim, value_dim = (size(raw, f"linear_{part}_head_dim", 128) for part in ("key", "value"))
    if heads % key_heads:
        raise ConfigError(
            f"config.json: linear_num_key_heads {key_heads} does not divide linear_num_value_heads {heads}"
        )
    if heads * key_dim * value_dim > _MOST_STATE:
        raise ConfigError(
            f"config.json: a state of {heads} heads of {key_dim} x {value_dim}: expected at most {_MOST_STATE:,} "
            "numbers"
        )
    return Recurrent(
        "delta",
        which,
        size(raw, "linear_conv_kernel_dim", 4, limit=_WIDEST),
        2 * key_heads * key_dim + heads * value_dim,
        heads * value_dim,
        key_heads,
        heads,
        key_dim,
        value_dim,
        declared.in_turns,
    )
