"""The metadata of a GGUF file that stands for a model's configuration, proved by reading it as a source is read."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import BincompressError, StoreError
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.config import ModelConfig, parse
from bincompress.model.fields import LARGEST_POSITION, size
from bincompress.model.rope import Rope, rotated
from bincompress.sources.gguf import keys
from bincompress.sources.gguf.config import GEMMA_27B, config_of
from bincompress.sources.gguf.names import FAMILIES, Family, arch_of
from bincompress.sources.gguf.rope import llama3_factors

Factors = dict[str, NDArray[np.float32]]  # of rotary embeddings, by the tensor that holds them
_USUAL_WINDOWS = 6  # Gemma 3: every so many layers see all positions


def family_of(config: ModelConfig) -> tuple[str, Family]:
    """Return what llama.cpp calls an architecture, and how it writes it; raises StoreError where no name is known."""
    arch = arch_of(config.architecture)
    if arch is None:
        known = ", ".join(sorted({family.architecture for family in FAMILIES.values()}))
        raise StoreError(f"{config.architecture} is not written as GGUF; known: {known}")
    return arch, FAMILIES[arch]


def metadata_of(config: ModelConfig, raw: Mapping[str, Any]) -> tuple[dict[str, Any], Factors]:
    """Return the keys of an architecture with their values, and the tensors of its rotary embedding.

    raw: config.json, of which `config` was read.
    """
    arch, _ = family_of(config)
    full = next((rope for rope, window in zip(config.ropes, config.windows, strict=True) if window is None), None)
    rope = full or config.rope
    if config.architecture == "SmolLM3ForCausalLM":  # some of whose layers rotate nothing
        rope = next((rope for rope in config.ropes if rope.share), config.rope)
    values = {
        "hidden_size": config.hidden,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": _context(config, raw),
    }
    scaling, factors = _scaling(rope, raw, config)
    found: dict[str, Any] = {
        **{keys.SIZES[field]: value for field, value in values.items()},
        keys.VALUE_LENGTH: config.head_dim,
        keys.EPSILON: float(config.norm_epsilon),
        keys.THETA: float(rope.theta),
        keys.ROTATED: rotated(rope, config.head_dim),
        "vocab_size": config.vocab,
        **scaling,
        **_of_family(config),
    }
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in found.items()}, factors


def _context(config: ModelConfig, raw: Mapping[str, Any]) -> int:
    declared = ARCHITECTURES[config.architecture].context
    return size(raw, "max_position_embeddings", declared, limit=LARGEST_POSITION)


def _scaling(rope: Rope, raw: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], Factors]:
    if rope.kind == "linear":
        return {keys.SCALING: "linear", keys.FACTOR: float(rope.factor)}, {}
    if rope.kind == "yarn":
        return {keys.SCALING: "yarn", keys.FACTOR: float(rope.factor), keys.ORIGINAL: rope.original_context}, {}
    if rope.kind == "llama3":
        factors = llama3_factors(rope.theta, config.head_dim, rope.factor, rope.original_context)
        return {keys.ORIGINAL: rope.original_context}, {"rope_freqs.weight": factors.astype(np.float32)}
    if rope.kind == "longrope":
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        lists = {end: np.array(given[f"{end}_factor"], np.float32) for end in ("long", "short")}
        attention = {"rope.scaling.attn_factor": float(rope.attention_factor)}
        return {keys.ORIGINAL: rope.original_context, **attention}, {
            f"rope_factors_{end}.weight": values for end, values in lists.items()
        }
    return {}, {}


def _of_family(config: ModelConfig) -> dict[str, Any]:
    """Return what only some architectures have."""
    windows = {window for window in config.windows if window is not None}
    found: dict[str, Any] = {keys.WINDOW: windows.pop()} if len(windows) == 1 else {}
    if config.architecture == "Gemma3ForCausalLM":
        local = next((rope for rope, window in zip(config.ropes, config.windows, strict=True) if window), None)
        found |= {keys.LOCAL_THETA: float(local.theta)} if local is not None else {}
        found |= {keys.LOGIT_CAP: float(config.logit_cap)} if config.logit_cap is not None else {}
        if any((window is None) != ((layer + 1) % _USUAL_WINDOWS == 0) for layer, window in enumerate(config.windows)):
            found[keys.PATTERN] = [window is not None for window in config.windows]
    elif config.architecture == "GraniteForCausalLM":
        scale = config.query_scale if config.query_scale is not None else 1 / math.sqrt(config.head_dim)
        held = (scale, config.embedding_multiplier, config.residual_multiplier, config.logit_divisor)
        found |= {key: float(value) for key, value in zip(keys.MULTIPLIERS.values(), held, strict=True)}
    return found


def check(
    config: ModelConfig, metadata: Mapping[str, Any], names: set[str], factors: Mapping[str, NDArray[np.float32]]
) -> None:
    """Raise StoreError, naming the field, where the file would not say what the store's config does.

    names: of the tensors in the file.
    """
    arch, family = family_of(config)
    try:
        read, _ = config_of(family, arch, as_read(metadata), config.vocab, names, factors)
        back = parse(read)
    except BincompressError as error:
        raise StoreError(f"GGUF cannot hold this {config.architecture}: {error}") from None
    ours, theirs = (
        _rounded(asdict(replace(found, architecture="", notes=(), names=back.names))) for found in (config, back)
    )
    for field, value in ours.items():
        if value != theirs[field]:
            pair = (value, theirs[field])
            if isinstance(value, list) and isinstance(theirs[field], list):  # of layers: the first that differ
                pair = next((both for both in zip(*pair, strict=False) if both[0] != both[1]), pair)
            raise StoreError(
                f"GGUF cannot hold this {config.architecture}: {field} is {pair[0]!r:.200} here, and {pair[1]!r:.200} "
                f"to who reads the file"
            )
    _check_gemma(config)


def _check_gemma(config: ModelConfig) -> None:
    """Raise StoreError where llama.cpp scales queries otherwise: it does so by the size of a head alone."""
    if config.architecture == "Gemma3ForCausalLM" and config.layers != GEMMA_27B:
        scale = 1 / math.sqrt(config.head_dim)
        if config.query_scale is not None and not math.isclose(config.query_scale, scale, rel_tol=1e-6):
            raise StoreError(
                f"GGUF cannot hold this {config.architecture}: query_pre_attn_scalar is {config.query_scale**-2:g}; "
                f"llama.cpp takes head_dim for it, {config.head_dim}"
            )


def as_read(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as a reader has it: numbers as float32, lists of numbers as arrays."""
    found = {}
    for key, value in metadata.items():
        if isinstance(value, float):
            value = float(np.float32(value))
        elif isinstance(value, list) and value and type(value[0]) in (int, float):
            value = np.array(value, np.int32 if type(value[0]) is int else np.float32)
        found[key] = value
    return found


def _rounded(value: Any) -> Any:
    """Return a record with its numbers as float32 has them, which is how a file holds them."""
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
