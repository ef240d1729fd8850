"""rope_scaling of the model that a GGUF file describes: of a kind in the metadata, or of factors in its tensors.

Sources: llama.cpp, conversion/ and llama-model.cpp.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.gguf.fields import LONGEST_NAME, Fields
from bincompress.sources.gguf.keys import FACTOR, ORIGINAL, SCALING, THETA

_LLAMA3 = (1.0, 4.0)  # low_freq_factor and high_freq_factor of all Llama 3 models
_LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
_CLOSE = 1e-4


def rope_scaling(fields: Fields, factors: Mapping[str, NDArray[Any]], head_dim: int) -> dict[str, Any]:
    """Return rope_scaling: of a kind in the metadata, or of the factors of Phi-3 or Llama 3."""
    kind, factor = fields.value(SCALING), fields.number(FACTOR)
    context = fields.whole(ORIGINAL, 0)
    both = {end: factors.get(f"rope_factors_{end}.weight") for end in ("long", "short")}
    if any(found is not None for found in both.values()):
        lists = {f"{end}_factor": found.tolist() for end, found in both.items() if found is not None}
        beside = {"original_max_position_embeddings": context} if context else {}
        return {"rope_scaling": {"type": "longrope", "rope_type": "longrope", **lists}, **beside}
    if "rope_freqs.weight" in factors and kind != "none" and factor not in (None, 0.0, 1.0):
        raise CheckpointError(
            f"GGUF metadata: {fields.arch}.rope.scaling.factor {factor} beside rope_freqs.weight is not supported"
        )
    if "rope_freqs.weight" in factors:
        theta = fields.number(THETA, 10000.0) or 1.0
        return _llama3(factors["rope_freqs.weight"], theta, head_dim, context)
    old = fields.number("rope.scale_linear")  # of old files
    factor = old if factor is None else factor
    kind = "linear" if kind is None else kind  # as llama.cpp takes a factor alone
    if kind == "none" or factor in (None, 0.0, 1.0):
        return {}
    scaling: dict[str, Any] = {"rope_type": str(kind)[:LONGEST_NAME], "factor": factor}
    return {"rope_scaling": scaling | ({"original_max_position_embeddings": context} if context else {})}


def _llama3(factors: NDArray[Any], theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaling that give these factors; raises CheckpointError where none do."""
    factors = factors.astype(np.float64)
    if np.allclose(factors, 1.0, rtol=0, atol=1e-7):
        return {}
    low, high = _LLAMA3
    factor = float(factors.max())
    for original in (context, *_LLAMA3_CONTEXTS):
        if not original or len(factors) != len(range(0, head_dim, 2)):
            continue
        if np.allclose(factors, llama3_factors(theta, head_dim, factor, original), rtol=_CLOSE, atol=0):
            scaling = {"rope_type": "llama3", "factor": float(np.float32(factor)), "low_freq_factor": low}
            scaling |= {"high_freq_factor": high, "original_max_position_embeddings": original}
            return {"rope_scaling": scaling}
    raise CheckpointError("rope_freqs.weight: factors that are not those of Llama 3's scaling, which are not supported")


def llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> NDArray[np.float64]:
    """Return what Llama 3's scaling divides the frequencies by, (head_dim / 2,). Source: llama.cpp, conversion/."""
    low, high = _LLAMA3
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, blended))
