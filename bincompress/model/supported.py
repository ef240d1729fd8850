"""Which registered architecture is a config.json of? Others, and fields that are not handled, are refused by name."""

from collections.abc import Mapping
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.declaration import Architecture
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.sources.bitnet import checked, is_bitnet

# How names of classes begin that are of other families: with a known model_type they contradict it, while a name that
# nobody knows (LLaMAForCausalLM, MyModelForCausalLM) is a spelling, and model_type decides.
OTHER_FAMILIES = (
    "albert", "apertus", "arctic", "baichuan", "bamba", "bart", "bert", "bitnet", "bloom", "chatglm", "cohere", "dbrx",
    "deepseek", "ernie4", "exaone", "falcon", "gemma", "glm", "gpt", "granite", "grok", "internlm", "iquest",
    "jamba", "jetmoe",
    "lfm", "llama4", "mamba", "minicpm", "minimax", "ministral", "mixtral", "mllama", "modernbert", "mpt", "nemotron",
    "olmo", "optfor", "persimmon", "phi", "qwen2_", "qwen2audio", "qwen2moe", "qwen2vl", "qwen3_", "qwen3moe",
    "qwen3next", "qwen3omni", "qwen3vl", "recurrentgemma", "roberta", "rwkv", "seedoss", "smollm3", "stablelm",
    "starcoder", "t5", "xlnet", "zamba",
)  # fmt: skip

# Fields that change the arithmetic of some model, with the values that do not. An architecture that has one says so.
UNHANDLED: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "clip_qkv": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None,),
    "use_mrope": (None, False),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "attn_temperature_tuning": (None, False),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "n_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "routed_scaling_factor": (None, 1, 1.0),
    "num_experts_per_tok": (None, 0, 1),
}


def refuse_unhandled(raw: Mapping[str, Any], declared: Architecture) -> None:
    """Raise UnsupportedModelError where a field has a value that changes the arithmetic and is not handled."""
    _refuse_unhandled(raw, declared)
    _refuse_other_values(raw, declared)


def architecture_of(raw: Mapping[str, Any]) -> str:
    """Return the registered architecture: model_type says which, as transformers has it, unless a name contradicts."""
    model_type = raw.get("model_type")
    listed = raw.get("architectures")
    names = [] if listed is None else listed
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config.json: architectures: expected a list of names, found {listed!r:.80}")
    of_type = [name for name, declared in ARCHITECTURES.items() if declared.model_type == model_type]
    registered = [name for name in names if name in ARCHITECTURES]
    chosen: str | None = next(iter(registered if model_type is None else of_type), None)
    known = ", ".join(ARCHITECTURES)
    for name in registered:
        expected = ARCHITECTURES[name].model_type
        if model_type not in (None, expected) and (chosen is None or name not in ARCHITECTURES[chosen].other_classes):
            raise UnsupportedModelError(f"config.json: {name} has model_type {expected!r}, found {model_type!r}")
    own: tuple[str, ...] = ()
    if chosen is not None:
        ends = (chosen.replace("ForCausalLM", end) for end in ("Model", "TextModel"))
        own = (chosen, *ends, *ARCHITECTURES[chosen].other_classes)
    for name in names:
        if chosen is None or (name not in own and name.lower().startswith(OTHER_FAMILIES)):
            raise UnsupportedModelError(
                f"config.json: architecture {name} is not supported; known: {known} (model_type: {model_type!r})"
            )
    if chosen is None:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is not supported; known: {known}")
    return chosen


def _refuse_unhandled(raw: Mapping[str, Any], declared: Architecture) -> None:
    for field, neutral in UNHANDLED.items():
        value = raw.get(field)
        if field in declared.reads:
            continue
        if field == "quantization_config" and is_bitnet(raw):
            try:
                checked(raw)
            except CheckpointError as error:
                raise UnsupportedModelError(str(error)) from None
            continue
        if not any(value is entry or (type(value) is type(entry) and value == entry) for entry in neutral):
            shown = value.get("quant_method", value) if isinstance(value, Mapping) else value
            raise UnsupportedModelError(
                f"config.json: {field} = {shown!r:.200} is not supported; only {neutral[0]!r} is"
            )


def _refuse_other_values(raw: Mapping[str, Any], declared: Architecture) -> None:
    for field, supported in declared.only.items():
        value = raw.get(field)
        if not any(type(value) is type(entry) and value == entry for entry in supported):
            raise UnsupportedModelError(
                f"config.json: {field} = {value!r:.60} is not supported for {declared.model_type}; only "
                f"{' or '.join(map(repr, supported))} is"
            )
