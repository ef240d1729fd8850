"""NumPy twin of the kernel that chooses experts, for logits of which no two are equal."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def choose_experts(logits: Floats, count: int, normalized: bool) -> tuple[NDArray[np.int64], Floats]:
    """Return the experts of largest probability (n, count), by ascending number, and their shares.

    logits (n, experts). A share is the softmax over all experts, divided by the sum of those chosen if `normalized`.
    """
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    chosen = np.sort(np.argsort(-probabilities, axis=1, kind="stable")[:, :count], axis=1)
    shares = np.take_along_axis(probabilities, chosen, axis=1)
    if normalized:
        shares = shares / shares.sum(axis=1, keepdims=True)
    return chosen, np.asarray(shares, np.float32)


def choose_by_logits(logits: Floats, count: int) -> tuple[NDArray[np.int64], Floats]:
    """Return the experts of the largest logits (n, count), by ascending number, and the softmax over those alone."""
    chosen = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :count], axis=1)
    found = np.take_along_axis(logits, chosen, axis=1).astype(np.float64)
    powers = np.exp(found - found.max(axis=1, keepdims=True))
    return chosen, np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def choose_by_sigmoid(
    logits: Floats, offsets: Floats, count: int, normalized: bool, added: float, scale: float
) -> tuple[NDArray[np.int64], Floats]:
    """Return the experts of the largest sigmoid plus offset (n, count), by ascending number, and their weights."""
    sigmoids = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    chosen = np.sort(np.argsort(-(sigmoids + offsets), axis=1, kind="stable")[:, :count], axis=1)
    found = np.take_along_axis(sigmoids, chosen, axis=1)
    if normalized:
        found = found / (found.sum(axis=1, keepdims=True) + added)
    return chosen, np.asarray(found * scale, np.float32)


def mix_experts(made: Floats, places: NDArray[np.int64], weights: Floats) -> Floats:
    """Return the sum over each token's k experts of what they made, made[places] (n, k, hidden), times weights."""
    return np.asarray(np.einsum("nkh,nk->nh", made[places].astype(np.float64), weights), np.float32)
