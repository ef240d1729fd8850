"""The metadata of one architecture in a GGUF file, checked as it is read; a key that nothing reads is refused or told.

Source: llama.cpp, llama-model.cpp (which keys change the arithmetic, and their defaults).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError

LONGEST_NAME = 60
# Keys that change what a model computes, each with the values that change nothing; any other is refused, not noted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attention.temperature_length": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window_pattern": (),
    "attention.layer_norm_epsilon": (),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
    "rope.dimension_sections": (),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
}
# Keys of an architecture that say nothing of the arithmetic, or what is read elsewhere.
_IDLE = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")


@dataclass
class Fields:
    """The metadata of one architecture, each value checked as it is read; what was not read is told at the end."""

    arch: str
    metadata: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._read: set[str] = {f"{self.arch}.{key}" for key in _IDLE}

    def value(self, key: str) -> Any:
        """Return what a key holds, None where it is absent."""
        self._read.add(f"{self.arch}.{key}")
        return self.metadata.get(f"{self.arch}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 0; a list of equal ones, as some files have for each layer, is one of them."""
        found = self.value(key)
        if isinstance(found, np.ndarray) and found.size and (found == found.flat[0]).all():
            found = found.flat[0].item()
        if found is None and default is not None:
            return default
        if type(found) is not int or not 0 <= found < 1 << 31:
            raise self._fault(key, "a whole number", found)
        return found

    def number(self, key: str, default: float | None = None) -> float | None:
        """Return a number that is finite."""
        found = self.value(key)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self._fault(key, "a number", found)
        return float(found)

    def _fault(self, key: str, expected: str, found: Any) -> CheckpointError:
        shown = f"an array of {len(found)}" if isinstance(found, np.ndarray | list) else f"{found!r:.60}"
        return CheckpointError(f"GGUF metadata: {self.arch}.{key}: expected {expected}, found {shown}")

    def left_over(self) -> list[str]:
        """Return the keys of this architecture that nothing asked for; raises where one changes the arithmetic."""
        left = sorted(key for key in self.metadata if key.startswith(f"{self.arch}.") and key not in self._read)
        for full in left:
            key, found = full.removeprefix(f"{self.arch}."), self.metadata[full]
            if key in _NEUTRAL and (isinstance(found, np.ndarray | list) or found not in _NEUTRAL[key]):
                shown = f"an array of {len(found)}" if isinstance(found, np.ndarray | list) else f"{found!r:.60}"
                raise CheckpointError(
                    f"GGUF metadata: {full} = {shown} changes the numbers; it is not supported for {self.arch}"
                )
        return left
