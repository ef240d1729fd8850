"""Gemma 1, Seed-OSS and CWM against transformers, in float32, and what of them is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.errors import UnsupportedModelError
from tests.test_declarations import config_of

KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
ODD = {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 67}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 24}),
    "gemma odd": ("Gemma", {**ODD, "head_dim": 14, "tie_word_embeddings": False, "hidden_act": "gelu"}),
    "seed-oss": ("SeedOss", {"head_dim": 24}),
    "seed-oss odd": (
        "SeedOss",
        {**ODD, "head_dim": 14, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "cwm": ("Cwm", {"head_dim": 24, "layer_types": KINDS, "sliding_window": 9}),
    "cwm odd": ("Cwm", {**ODD, "head_dim": 14, "layer_types": KINDS[::-1], "sliding_window": 21}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.transformers_models import TOLERANCE, VOCAB, distance, in_parts, random_model, their_logits

    theirs = random_model(tmp_path, *CASES[case])
    ids = np.random.default_rng(1).integers(0, VOCAB, 45)
    expected = their_logits(theirs, ids)
    decoder = load_checkpoint(tmp_path)
    off = [distance(in_parts(decoder, ids, parts), expected) for parts in ([45], [23, 9, 1, 12], [33] + [1] * 12)]
    assert max(off) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("GemmaForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported for gemma"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("CwmForCausalLM", {"layer_types": None}, "without layer_types is not supported: nothing says which layers"),
        ("CwmForCausalLM", {"attention_bias": True}, "attention_bias = True is not supported for cwm"),
        ("SeedOssForCausalLM", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("InternLM3ForCausalLM", {"bias": True}, "bias = True is not supported for internlm3; only None or False is"),
        ("InternLM3ForCausalLM", {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM has model_type"),
        ("Ernie4_5ForCausalLM", {"use_bias": True}, "use_bias = True is not supported for ernie4_5"),
        ("Glm4MoeForCausalLM", {"n_group": 4}, "n_group = 4 is not supported for glm4_moe; only None or 1 is"),
        ("MiniMaxM2ForCausalLM", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ("MiniMaxM2ForCausalLM", {"rotary_dim": 5}, "partial_rotary_factor"),
        ("SeedOssForCausalLM", {"model_type": "gemma4_text"}, "SeedOssForCausalLM has model_type 'seed_oss', found"),
    ],
)
def test_what_is_not_known_is_refused_by_name(architecture: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse(config_of(architecture) | change)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("Gemma4ForCausalLM", "gemma4_text"),
        ("Gemma4ForConditionalGeneration", "gemma4"),
        ("Cohere2ForCausalLM", "cohere2"),
        ("ExaoneMoeForCausalLM", "exaone_moe"),
        ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
        ("GlmMoeDsaForCausalLM", "glm_moe_dsa"),
    ],
)
def test_a_model_without_a_declaration_is_refused_by_name(name: str, model_type: str) -> None:
    config = config_of("LlamaForCausalLM") | {"architectures": [name], "model_type": model_type}
    with pytest.raises(UnsupportedModelError, match=rf"{name} is not supported; known: .*{model_type}"):
        parse(config)
