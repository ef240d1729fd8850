"""config.json of the model that a GGUF file describes, under the names of transformers.

Sources: llama.cpp, conversion/ (which key holds what) and llama-model.cpp (defaults); transformers,
modeling_gguf_pytorch_utils.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.gguf.keys import (
    EPSILON,
    FACTOR,
    LOCAL_THETA,
    LOGIT_CAP,
    MULTIPLIERS,
    ORIGINAL,
    PATTERN,
    ROTATED,
    SCALING,
    SIZES,
    THETA,
    TOKEN_IDS,
    VALUE_LENGTH,
    WINDOW,
)
from bincompress.sources.gguf.names import Family
from bincompress.sources.gguf.tokenizer import TOKENIZER_KEYS

_TOKENS = "tokenizer.ggml."
GEMMA_27B = 62  # layers; the one Gemma 3 whose queries are not scaled by its head size
_LLAMA3 = (1.0, 4.0)  # low_freq_factor and high_freq_factor of all Llama 3 models
_LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
_CLOSE = 1e-4
_LONGEST_NAME = 60
_MOST_NAMED = 8  # keys in a note
_WINDOWED = ("gemma3_text", "phi3", "mistral", "olmo2")
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


def config_of(
    family: Family,
    arch: str,
    metadata: Mapping[str, Any],
    vocab: int,
    names: set[str],
    factors: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json, and notes on metadata that is not read.

    vocab: rows of the embedding. names: of the tensors, as the file has them. factors: of rotary embeddings, by tensor.
    Raises CheckpointError where a value is missing or wrong; what the decoder cannot do is said by its own reader.
    """
    fields = Fields(arch, metadata)
    hidden, heads = fields.whole(SIZES["hidden_size"]), fields.whole(SIZES["num_attention_heads"])
    if not heads:
        raise CheckpointError(f"GGUF metadata: {arch}.attention.head_count is 0")
    head_dim = fields.whole(SIZES["head_dim"], _head_dim(family, fields, hidden, heads))
    if fields.whole(VALUE_LENGTH, head_dim) != head_dim:
        raise CheckpointError(f"GGUF metadata: {arch}: keys and values of different lengths are not supported")
    rotated = fields.whole(ROTATED, head_dim)
    if rotated != head_dim and family.model_type != "phi3":
        raise CheckpointError(
            f"GGUF metadata: {arch}.rope.dimension_count: {rotated} of {head_dim} columns of a head; expected all"
        )
    if fields.value("attention.causal") is False or fields.whole("pooling_type", 0):
        raise CheckpointError(f"GGUF metadata: {arch}: a model of embeddings, which writes no text, is not supported")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": fields.whole(SIZES["intermediate_size"]),
        "num_hidden_layers": fields.whole(SIZES["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole(SIZES["num_key_value_heads"], heads),
        "head_dim": head_dim,
        "rms_norm_eps": _required(fields, EPSILON),
        "max_position_embeddings": fields.whole(SIZES["max_position_embeddings"]),
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "rope_theta": fields.number(THETA, 10000.0),
        **_rope_scaling(fields, factors, head_dim),
        **_tokens(metadata),
        **_of_family(family, fields, head_dim),
    }
    experts = fields.whole("expert_count", 0)
    if experts:
        config["num_local_experts"] = experts
    left = [*fields.left_over(), *_unknown_of_tokenizer(metadata)]
    return config, [f"metadata that is not read: {_listed(left)}"] if left else []


def _listed(keys: list[str]) -> str:
    named = ", ".join(ascii(key)[1:-1][:_LONGEST_NAME] for key in keys[:_MOST_NAMED])
    return named + (f" and {len(keys) - _MOST_NAMED:,} more" if len(keys) > _MOST_NAMED else "")


def _unknown_of_tokenizer(metadata: Mapping[str, Any]) -> list[str]:
    """Return the keys of the tokenizer that say how texts become tokens, or may, and that are not read."""
    keys = sorted(key for key in metadata if key.startswith(_TOKENS) and metadata[key] is not False)
    return [
        key
        for key in keys
        if key.removeprefix(_TOKENS) not in TOKENIZER_KEYS and not key.endswith(("_token_id", "_token_ids"))
    ]


def _required(fields: Fields, key: str) -> float:
    found = fields.number(key)
    if found is None:
        raise CheckpointError(f"GGUF metadata: {fields.arch}.{key}: missing")
    return found


def _head_dim(family: Family, fields: Fields, hidden: int, heads: int) -> int:
    """Return the columns of a head where the file does not say: those that are rotated, as far as that is all."""
    rotated = fields.whole(ROTATED, 0)
    return rotated if rotated and family.model_type not in ("phi3", "gemma3_text") else max(1, hidden // heads)


def _tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: metadata.get(_TOKENS + key) for name, key in TOKEN_IDS.items()}
    return {name: value for name, value in found.items() if type(value) is int}


def _of_family(family: Family, fields: Fields, head_dim: int) -> dict[str, Any]:
    """Return what only some architectures have."""
    kind = family.model_type
    found: dict[str, Any] = {}
    window = fields.whole(WINDOW, 0) if kind in _WINDOWED else 0
    if kind == "gemma3_text":
        pattern = fields.value(PATTERN)
        if isinstance(pattern, np.ndarray | list):
            found["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        elif pattern is not None:
            found["sliding_window_pattern"] = fields.whole(PATTERN)
        found |= {"sliding_window": window} if window else {}
        local, cap = fields.number(LOCAL_THETA), fields.number(LOGIT_CAP)
        found |= {} if local is None else {"rope_local_base_freq": local}
        found |= {} if cap is None else {"final_logit_softcapping": cap}
        if not window:  # llama.cpp: all layers are full; transformers: a window of 4,096
            raise CheckpointError("GGUF metadata: gemma3.attention.sliding_window: missing")
        if fields.whole(SIZES["num_hidden_layers"]) == GEMMA_27B:
            found["query_pre_attn_scalar"] = fields.whole(SIZES["hidden_size"]) // fields.whole(
                SIZES["num_attention_heads"]
            )
    elif kind == "phi3":
        share = fields.whole(ROTATED, head_dim) / head_dim
        found = {"partial_rotary_factor": share, "sliding_window": window or None, "hidden_act": "silu"}
    elif kind == "mistral":
        found = {"sliding_window": window or None}
    elif kind == "olmo2" and window:
        raise CheckpointError("GGUF metadata: olmo2.attention.sliding_window: OLMo 3, which is not supported")
    elif kind == "granite":
        values = {name: fields.number(key) for name, key in MULTIPLIERS.items()}
        found = {name: value for name, value in values.items() if value is not None}
        found.setdefault("attention_multiplier", 1 / math.sqrt(head_dim))
    return found


def _rope_scaling(fields: Fields, factors: Mapping[str, NDArray[Any]], head_dim: int) -> dict[str, Any]:
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
    scaling: dict[str, Any] = {"rope_type": str(kind)[:_LONGEST_NAME], "factor": factor}
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
