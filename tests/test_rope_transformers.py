"""Rotary embeddings of every kind, in either form of config.json, against transformers' logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.errors import PromptError
from tests.transformers_models import (
    LLAMA3,
    TOLERANCE,
    VOCAB,
    assert_alike,
    assert_parts_alike,
    distance,
    in_parts,
    random_model,
    rewritten,
    their_logits,
)

pytestmark = pytest.mark.slow  # PyTorch and transformers

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
# The rope_scaling of Ministral and DeepSeek, of Qwen3 as its card says, and the fields that others have.
SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("Llama", {"rope_scaling": YARN}),
    "yarn mistral": (
        "Mistral",
        {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 1.0}},
    ),
    "yarn mscale alone": ("Mistral", {"rope_scaling": {**YARN, "mscale": 0.707}}),
    "yarn ministral": (
        "Mistral",
        {
            "rope_parameters": {
                **YARN,
                "rope_theta": 1e6,
                "factor": 16.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "sliding_window": None,
        },
    ),
    "yarn qwen3": ("Qwen3", {"head_dim": 32, "rope_scaling": {**YARN, "factor": 4.0, "attention_factor": 0.8}}),
    "yarn qwen2 parameters": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6, "truncate": False}}),
    "yarn original beside": (
        "Llama",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 20},
    ),
    "yarn original nowhere": ("Llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
    "yarn factor null": ("Llama", {"rope_scaling": {**YARN, "factor": None}}),
    "yarn narrow": ("Llama", {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}, "head_dim": 12}),
    "yarn gemma3": (
        "Gemma3Text",
        {
            "head_dim": 24,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "dynamic": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 4.1}}),
}
SHORT, LONG = [1.0, 1.3, 1.7, 2.2], [1.5, 3.0, 9.0, 20.0]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
# Phi-3 128k, Phi-4-mini with partial rotation, the name of the first release, and another architecture.
LONGROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 80}),
    "phi4 mini": (
        "Phi3",
        {
            "rope_scaling": {**LONGROPE, "short_factor": SHORT[:3], "long_factor": LONG[:3]},
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 75,
            "tie_word_embeddings": True,
        },
    ),
    "phi3 su": (
        "Phi3",
        {
            "rope_scaling": {**LONGROPE, "type": "su", "original_max_position_embeddings": 80},
            "original_max_position_embeddings": 80,
        },
    ),
    "phi3 parameters": (
        "Phi3",
        {
            "rope_parameters": {**LONGROPE, "rope_theta": 500.0, "rope_type": "longrope", "partial_rotary_factor": 1.0},
            "original_max_position_embeddings": 80,
        },
    ),
    "llama attention factor": (
        "Llama",
        {"rope_scaling": {**LONGROPE, "attention_factor": 1.25, "original_max_position_embeddings": 90}},
    ),
    "llama factor": ("Llama", {"rope_scaling": {**LONGROPE, "factor": 32.0, "original_max_position_embeddings": 90}}),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_kinds_of_scaling_are_those_of_transformers_also_past_the_original_context(case: str, tmp_path: Path) -> None:
    assert_parts_alike(tmp_path, *SCALINGS[case], parts=[[75], [20] + [1] * 55])


@pytest.mark.parametrize("case", LONGROPES)
def test_longrope_is_that_of_transformers_up_to_the_original_context_and_refused_past_it(
    case: str, tmp_path: Path
) -> None:
    kind, options = LONGROPES[case]
    theirs = random_model(tmp_path, kind, {"hidden_size": 48, **options})
    ids = np.random.default_rng(1).integers(0, VOCAB, 75)
    decoder = load_checkpoint(tmp_path)
    assert distance(in_parts(decoder, ids, [70] + [1] * 5), their_logits(theirs, ids)) < TOLERANCE
    most = decoder.config.context
    assert 75 <= most <= 90
    with pytest.raises(PromptError, match=rf"expected 1 to {most} tokens .rope type 'longrope' is not supported"):
        decoder.new_cache(most + 1)


def test_dynamic_is_refused_past_the_context_by_name(tmp_path: Path) -> None:
    random_model(tmp_path, *SCALINGS["dynamic"])
    with pytest.raises(PromptError, match=r"expected 1 to 512 tokens .rope type 'dynamic' is not supported beyond"):
        load_checkpoint(tmp_path).new_cache(513)


def test_old_style_config_is_read_alike(tmp_path: Path) -> None:
    random_model(tmp_path, "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True})
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "architectures")}
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    old |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": {"type": "llama3", **scaling}, "torch_dtype": "float32"}
    assert "rope_parameters" in new
    assert parse(old) == parse(new)


LINEAR = {"rope_type": "linear", "factor": 4.0}
OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
FORMS: dict[str, dict[str, Any]] = {
    "scaling beside default parameters": {
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "scaling beside other parameters": {"rope_scaling": OLD_LLAMA3, "rope_parameters": LINEAR, "rope_theta": 300.0},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 300.0}, "rope_theta": 5.0},
    "theta outside": {"rope_parameters": {"type": "linear", "factor": 3}, "rope_theta": 300},
    "two kinds": {"rope_parameters": ..., "rope_scaling": {"type": "linear", "rope_type": "default", "factor": 9.0}},
    "original length outside": {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
    "original length nowhere": {
        "rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
        "max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_rope_give_their_numbers(form: str, tmp_path: Path) -> None:
    random_model(tmp_path, "Llama", {})
    assert_alike(tmp_path, rewritten(tmp_path, FORMS[form]))
