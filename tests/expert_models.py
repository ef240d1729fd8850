"""Which mixtures of experts the tests know, and their tensors."""

from pathlib import Path
from typing import Any

import safetensors.numpy

KINDS = ("Qwen3MoeForCausalLM", "MixtralForCausalLM")


def tensors_of(folder: Path) -> dict[str, Any]:
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in safetensors.numpy.load_file(path).items()
    }
