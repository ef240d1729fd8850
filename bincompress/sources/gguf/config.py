"""config.json of the model that a GGUF file describes, under the names of transformers.

Sources: llama.cpp, conversion/ (which key holds what) and llama-model.cpp (defaults); transformers,
modeling_gguf_pytorch_utils.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.gguf.fields import LONGEST_NAME, Fields
from bincompress.sources.gguf.keys import (
    EPSILON,
    LOCAL_THETA,
    LOGIT_CAP,
    MULTIPLIERS,
    PATTERN,
    ROTATED,
    SIZES,
    THETA,
    TOKEN_IDS,
    VALUE_LENGTH,
    WINDOW,
)
from bincompress.sources.gguf.names import Family
from bincompress.sources.gguf.rope import rope_scaling
from bincompress.sources.gguf.tokenizer import TOKENIZER_KEYS

_TOKENS = "tokenizer.ggml."
GEMMA_27B = 62  # layers; the one Gemma 3 whose queries are not scaled by its head size
_MOST_NAMED = 8  # keys in a note
_WINDOWED = ("gemma3_text", "phi3", "mistral", "olmo2")


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
        **rope_scaling(fields, factors, head_dim),
        **_tokens(metadata),
        **_of_family(family, fields, head_dim),
    }
    experts = fields.whole("expert_count", 0)
    if experts:
        config["num_local_experts"] = experts
    left = [*fields.left_over(), *_unknown_of_tokenizer(metadata)]
    return config, [f"metadata that is not read: {_listed(left)}"] if left else []


def _listed(keys: list[str]) -> str:
    named = ", ".join(ascii(key)[1:-1][:LONGEST_NAME] for key in keys[:_MOST_NAMED])
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
