"""What of a tokenizer.json does the class LlamaTokenizer replace? By the rule of transformers, so that ids agree.

Files that name this class keep their vocabulary, merges and post-processor; how a text is split and written is the
class's own. Only its first piece gets a space before it (with `legacy`: every piece between special tokens), and none
where the text begins with one. Source: transformers 5, tokenization_llama.py and tokenization_auto.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from bincompress.model.files import json_object

_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_SPACE = "\u2581"  # as sentencepiece writes it
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # of the class, where a file has no such key

# With these, transformers takes tokenizer.json as it is, whatever class is named. Source: tokenization_auto.py,
# TOKENIZER_MAPPING_NAMES (TokenizersBackend, MistralCommonBackend) and MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.
_TAKE_IT = """
    arctic chatlm ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite gpt_bigcode granite granitemoe
    granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder jamba
    kimi_linear llava llava_next mimo_v2_flash minicpm3 minicpmv minimax_m2 ministral ministral3 mistral mistral3
    mistral_large4 mixtral molmo molmo2 nemotron nvfp4 olmo2 olmo3 olmo_hybrid opencua persimmon phi3 phi3_v phimoe
    pixtral qwen2 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen4_exp smolvlm stablelm step3_vl vipllava voxtral
    voxtral_realtime
"""
AS_IT_IS = frozenset(_TAKE_IT.split())


@dataclass(frozen=True)
class LlamaForm:
    """What tokenizer_config.json says to the class."""

    prepend: str  # where a space comes first: always, first or never
    lists_all: bool  # it has added_tokens_decoder, so that those of tokenizer.json do not count


def llama_form(files: Mapping[str, bytes]) -> LlamaForm | None:
    """Return how the class writes a model's texts, None where tokenizer.json is taken as it is; files by name."""
    own, config = json_object(files, "tokenizer_config.json") or {}, json_object(files, "config.json") or {}
    if (own.get("tokenizer_class") or config.get("tokenizer_class")) not in _CLASSES:
        return None
    if config.get("model_type") in AS_IT_IS or b'"ByteLevel"' in files.get("tokenizer.json", b""):
        return None
    given = own.get("add_prefix_space")
    prepend = "never" if given is not None and not given else "always" if own.get("legacy") else "first"
    return LlamaForm(prepend, lists_all="added_tokens_decoder" in own)


def class_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the named tokens that a model's tokenizer has where tokenizer_config.json has no such key."""
    return {} if llama_form(files) is None else dict(_TOKENS)


def without_added(data: bytes) -> bytes:
    """Return tokenizer.json without the tokens added to its vocabulary; raises ValueError where it is not JSON."""
    found = json.loads(data)
    return json.dumps({**found, "added_tokens": []}).encode() if isinstance(found, dict) else data


def rebuild(tokenizer: tokenizers.Tokenizer, form: LlamaForm) -> None:
    """Replace what the class replaces, in place. A model that is no BPE is left alone: the class cannot hold one."""
    model: Any = tokenizer.model
    if not isinstance(model, models.BPE):
        return
    model.dropout = model.unk_token = model.continuing_subword_prefix = model.end_of_word_suffix = None
    model.fuse_unk = model.byte_fallback = True
    model.ignore_merges = False
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=form.prepend, split=False)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([] if form.prepend == "never" else [decoders.Strip(" ", 1, 0)]))
