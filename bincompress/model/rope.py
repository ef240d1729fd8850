"""Rotary position embedding: the frequencies of each kind of scaling and the table of cosines and sines."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bincompress.model.errors import UnsupportedModelError

Kind = Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rope:
    """How positions become angles. What a field is of use to, its comment says; others leave it as it is."""

    theta: float = 10000.0
    kind: Kind = "default"
    factor: float = 1.0  # linear, llama3, yarn
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    original_context: int = 8192  # llama3, yarn, and the most positions of longrope and dynamic
    share: float = 1.0  # of a head's items, from its first on, that are rotated
    attention_factor: float = 1.0  # yarn, longrope: multiplies cosines and sines
    beta_fast: float = 32.0  # yarn: rotations within the original context from which on a pair keeps its frequency
    beta_slow: float = 1.0  # yarn: and up to which its frequency is divided by the factor
    truncate: bool = True  # yarn: whether the limits between pairs are whole numbers
    divisors: tuple[float, ...] = ()  # longrope: of each pair's frequency
    query_growth: float = 0.0  # queries times 1 + this * ln(1 + how many times the original context is behind them)

    @property
    def most_positions(self) -> int | None:
        """Positions past which other frequencies would apply to all of them; None: there is no such limit."""
        return self.original_context if self.kind in ("longrope", "dynamic") else None


def rotated(rope: Rope, head_dim: int) -> int:
    """Return how many of a head's items are rotated."""
    return int(head_dim * rope.share)


def frequencies(rope: Rope, head_dim: int) -> Floats:
    """Return the angle per position of each pair of a head's rotated items, (rotated / 2,)."""
    with np.errstate(over="ignore", under="ignore"):  # of bases and factors that no model has: a pair does not turn
        return _frequencies(rope, head_dim)


def _frequencies(rope: Rope, head_dim: int) -> Floats:
    # In float32 throughout: models were trained with these very roundings, which far positions magnify.
    dim = rotated(rope, head_dim)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.float32(rope.theta) ** exponents
    if rope.kind == "longrope":
        return np.asarray(np.float32(1.0) / (np.array(rope.divisors, np.float32) * powers), np.float32)
    plain = np.float32(1.0) / powers
    if rope.kind in ("default", "dynamic"):  # which differ past the original context alone
        return plain
    if rope.kind == "yarn":
        return _yarn(rope, dim, plain, np.float32(1.0) / (np.float32(rope.factor) * powers))
    slow = plain / np.float32(rope.factor)
    if rope.kind == "linear":
        return slow
    wavelength = np.float32(2 * np.pi) / plain
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    share = (rope.original_context / wavelength - low) / (high - low)
    blended = (1 - share) * slow + share * plain
    long = wavelength > rope.original_context / low
    short = wavelength < rope.original_context / high
    return np.where(long, slow, np.where(short, plain, blended)).astype(np.float32)


def _yarn(rope: Rope, dim: int, plain: Floats, slow: Floats) -> Floats:
    """Blend frequencies from pair to pair (YaRN, arXiv 2309.00071), with the limits that transformers sets."""

    def pair(rotations: float) -> float:
        return dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    fast = np.float32(1.0) - np.clip(ramp, 0, 1).astype(np.float32)
    return np.asarray(slow * (np.float32(1.0) - fast) + plain * fast, np.float32)


def table(rope: Rope, head_dim: int, positions: int, first: int = 0) -> tuple[Floats, Floats]:
    """Return cosines and sines of the positions first .. positions, each (positions - first, rotated / 2).

    Raises UnsupportedModelError by name past the positions that this kind of scaling can be computed for.
    """
    if rope.most_positions is not None and positions > rope.most_positions:
        raise UnsupportedModelError(
            f"rope type {rope.kind!r} beyond its original {rope.most_positions:,} positions is not supported, "
            f"found {positions:,}"
        )
    angles = np.arange(first, positions).astype(np.float32)[:, None] * frequencies(rope, head_dim)
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def growth(rope: Rope, first: int, count: int) -> Floats:
    """Return what the queries of the positions first .. first + count - 1 are multiplied by, (count,).

    Source: `get_llama_4_attn_scale` of transformers' Ministral 3.
    """
    behind = np.arange(first, first + count) // rope.original_context
    return np.float32(1.0) + np.float32(rope.query_growth) * np.log1p(behind.astype(np.float32))
