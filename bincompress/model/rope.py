"""Rotary position embedding: the frequencies of each kind of scaling and the table of cosines and sines."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rope:
    """How positions become angles. The three fields after the factor matter to the kind "llama3" only."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    share: float = 1.0  # of a head's items, from its first on, that are rotated


def rotated(rope: Rope, head_dim: int) -> int:
    """Return how many of a head's items are rotated."""
    return int(head_dim * rope.share)


def frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Return the angle per position of each pair of a head's rotated items, (rotated / 2,)."""
    # In float32 throughout: models were trained with these very roundings, which far positions magnify.
    dim = rotated(rope, head_dim)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.kind == "default":
        return plain
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


def table(rope: Rope, head_dim: int, positions: int, first: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines of the positions first .. positions, each (positions - first, rotated / 2)."""
    angles = np.arange(first, positions).astype(np.float32)[:, None] * frequencies(rope, head_dim)
    return np.cos(angles), np.sin(angles)
