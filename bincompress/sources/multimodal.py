"""Which part of config.json is the language model's? That of a model that also sees or hears has it in text_config.

The text model alone is packed and run; the towers beside it are kept as they are.
"""

from collections.abc import Mapping
from typing import Any

# By model_type of the whole: those that its language model may have, the first where none is given, and whether the
# head is tied where nothing says so.
_WHOLES: dict[str, tuple[tuple[str, ...], bool]] = {
    "gemma3": (("gemma3_text",), True),
    "mistral3": (("mistral", "ministral3"), True),
    "qwen3_5": (("qwen3_5_text",), False),
    "qwen3_5_moe": (("qwen3_5_moe_text",), False),
}
# Fields beside text_config that count for the language model.
_SHARED = ("quantization_config",)
_TIED = "tie_word_embeddings"


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Return whether this is the config.json of a larger model whose language model is known."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in _WHOLES and isinstance(config.get("text_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json of the language model: the whole one where there is nothing beside it.

    A language model of another type than those that are known in the larger one is returned as it is, for whoever
    refuses it by name.
    """
    if not is_multimodal(config):
        return config
    kinds, tied = _WHOLES[config["model_type"]]
    text = dict(config["text_config"])
    text.setdefault("model_type", kinds[0])
    text.pop("architectures", None)
    if text["model_type"] not in kinds:
        text["model_type"] = f"{config['model_type']} with a language model of type {text['model_type']}"
    text[_TIED] = config.get(_TIED, text.get(_TIED, tied))
    return text | {field: config[field] for field in _SHARED if config.get(field) is not None}
