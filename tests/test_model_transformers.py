"""The decoder against transformers: every architecture and option, in float32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bincompress.model.checkpoint_source import load_checkpoint
from cpu_kernels.parallel.workers import Workers
from tests.conftest import DEMO_MODEL, SHARED, Run, tiny_tokenizer
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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow  # PyTorch and transformers

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama every head its keys": ("Llama", {"num_key_value_heads": 6}),
    "llama one head of keys": ("Llama", {"num_key_value_heads": 1}),
    "llama head_dim": ("Llama", {"head_dim": 40}),
    "llama attention bias": ("Llama", {"attention_bias": True}),
    "llama mlp bias": ("Llama", {"mlp_bias": True}),
    "llama rope theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}),
    "llama rope linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama rope llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral window": ("Mistral", {"sliding_window": 9}),
    "mistral wide window": ("Mistral", {"sliding_window": 40, "head_dim": 16}),
    "mistral no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "qwen2 window unused": ("Qwen2", {"use_sliding_window": False, "sliding_window": 10, "max_window_layers": 0}),
    "qwen2 layer types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 bias tied": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
}

# Architectures with parts that Llama and its kin lack; layers of every kind, and sizes
# that no kernel's step divides.
GEMMA3 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": False}
BEYOND_LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3 pattern": ("Gemma3Text", {"num_hidden_layers": 7, "head_dim": 18, "sliding_window": 5}),
    "gemma3 rope linear": (
        "Gemma3Text",
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "gemma3 soft cap bias untied": (
        "Gemma3Text",
        {**GEMMA3, "final_logit_softcapping": 2.5, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3 odd": (
        "Gemma3Text",
        {
            **GEMMA3,
            "hidden_size": 45,
            "intermediate_size": 71,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 10,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3 bias": ("SmolLM3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "smollm3 listed": (
        "SmolLM3",
        {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 11, "num_key_value_heads": None},
    ),
    "smollm3 layer types": (
        "SmolLM3",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2 odd": (
        "Olmo2",
        {"hidden_size": 50, "intermediate_size": 67, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "olmo2 bias": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": None}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.015625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite plain": ("Granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {}),
    "phi3 window": ("Phi3", {"sliding_window": 13, "num_key_value_heads": None}),
    "phi3 partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.75}},
    ),
    "phi3 odd": (
        "Phi3",
        {"hidden_size": 50, "intermediate_size": 67, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "qwen3-moe": ("Qwen3Moe", QWEN3_MOE),
    "qwen3-moe normalized": ("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-moe dense layers": (
        "Qwen3Moe",
        {**QWEN3_MOE, "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "qwen3-moe window": ("Qwen3Moe", {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 11}),
    "qwen3-moe odd": (
        "Qwen3Moe",
        {
            **QWEN3_MOE,
            "hidden_size": 50,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "moe_intermediate_size": 19,
            "num_experts": 7,
            "num_experts_per_tok": 7,
            "head_dim": 14,
        },
    ),
    "qwen3-moe no experts": ("Qwen3Moe", {"num_experts": 0}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 13}),
    "mixtral odd": (
        "Mixtral",
        {
            "hidden_size": 50,
            "intermediate_size": 67,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
        },
    ),
    "granite rope": ("Granite", {"rope_parameters": LLAMA3, "residual_multiplier": 0.5}),
    "bitnet": ("BitNet", {}),
    "bitnet bias tied odd": (
        "BitNet",
        {
            "hidden_size": 50,
            "intermediate_size": 67,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}


ALL = {**CASES, **BEYOND_LLAMA}
EXPERT_CASES = ["qwen3-moe dense layers", "mixtral"]


@pytest.mark.parametrize("case", ALL)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    assert_parts_alike(tmp_path, *ALL[case], parts=[[75], [33, 31, 1, 10], [20] + [1] * 55])


def test_threads_do_not_change_logits(tmp_path: Path) -> None:
    random_model(tmp_path, *CASES["llama head_dim"])
    ids = np.random.default_rng(2).integers(0, VOCAB, 300)
    with Workers(3) as workers:
        one, three = load_checkpoint(tmp_path), load_checkpoint(tmp_path, workers)
        assert np.array_equal(in_parts(one, ids, [300]), in_parts(three, ids, [300]))


def test_float16_cache_is_close(tmp_path: Path) -> None:
    theirs = random_model(tmp_path, *CASES["qwen3"])
    ids = np.random.default_rng(3).integers(0, VOCAB, 60)
    decoder = load_checkpoint(tmp_path)
    cache = decoder.new_cache(60, "float16")
    assert 2 * cache.keys[0].nbytes == decoder.new_cache(60).keys[0].nbytes
    ours = np.concatenate([decoder.logits(ids[:40], cache), decoder.logits(ids[40:], cache)])
    assert distance(ours, their_logits(theirs, ids)) < 5e-3


@pytest.mark.parametrize("case", ["llama tied", "gemma3", "smollm3", "olmo2", "granite", "phi3", *EXPERT_CASES])
def test_an_export_is_a_checkpoint_of_transformers(case: str, tmp_path: Path, run: Run) -> None:
    random_model(tmp_path / "model", *ALL[case])
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(VOCAB)))
    assert run("compress", tmp_path / "model", tmp_path / "store", "--groups", 8, "--block", 64)[0] == 0
    assert run("export", tmp_path / "store", tmp_path / "back")[0] == 0
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.random.default_rng(10).integers(0, VOCAB, 40)
    ours = in_parts(load_checkpoint(tmp_path / "back"), ids, [40])
    assert distance(ours, their_logits(theirs.eval(), ids)) < TOLERANCE


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_experts_in_one_tensor_are_those_of_transformers(case: str, tmp_path: Path, run: Run) -> None:
    """As a model of transformers 5 has them in memory: read, packed, and written in this form for it to load."""
    theirs = random_model(tmp_path / "model", *ALL[case])
    folder = tmp_path / "model"
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(VOCAB)))
    ids = np.random.default_rng(10).integers(0, VOCAB, 40)
    plain = in_parts(load_checkpoint(folder), ids, [40])
    (folder / "model.safetensors").unlink()
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors)
    assert np.array_equal(in_parts(load_checkpoint(folder), ids, [40]), plain)
    assert run("compress", folder, tmp_path / "store", "--groups", 8, "--block", 64)[0] == 0
    assert run("export", tmp_path / "store", tmp_path / "back")[0] == 0
    again, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = in_parts(load_checkpoint(tmp_path / "back"), ids, [40])
    assert distance(ours, their_logits(again.eval(), ids)) < TOLERANCE


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 2": ("Gemma2", {}),
    "Granite MoE with a shared expert": ("GraniteMoeShared", EXPERTS | {"shared_intermediate_size": 40}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_architectures_that_do_not_run_are_compressed_for_export_alone(kind: str, tmp_path: Path, run: Run) -> None:
    original = random_model(tmp_path / "model", *OTHERS[kind])
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(VOCAB)))
    given = ("compress", tmp_path / "model", tmp_path / "store", "--groups", 8, "--block", 64)
    code, _, refused = run(*given)
    assert (code, "will compress and export, but not run here: config.json: " in refused) == (2, True)
    assert run(*given, "--export-only")[0] == 0
    assert run("export", tmp_path / "store", tmp_path / "back")[0] == 0
    theirs, found = type(original).from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    changed = 0
    for name, before in original.state_dict().items():
        error = float((theirs.state_dict()[name] - before).norm() / before.norm())
        assert error < 0.1, name  # eight groups of magnitudes in bfloat16
        changed += error > 0
    assert changed > 3


def test_a_tied_head_with_other_values_is_used_and_said(tmp_path: Path) -> None:
    random_model(tmp_path, "Llama", {})
    decoder = assert_alike(tmp_path, rewritten(tmp_path, {"tie_word_embeddings": True}))
    assert not decoder.config.tied
    assert "lm_head.weight is used" in decoder.config.notes[0]


def test_a_tied_head_with_the_same_values_is_tied(tmp_path: Path) -> None:
    model = random_model(tmp_path, "Llama", {"tie_word_embeddings": True})
    table = model.model.embed_tokens.weight.detach().clone()
    decoder = assert_alike(tmp_path, rewritten(tmp_path, {}, {"lm_head.weight": table}))
    assert decoder.config.tied
    assert id(decoder.head) == id(decoder.embedding)
    assert decoder.config.notes == ()


def test_a_head_in_place_of_tied_embeddings_is_both(tmp_path: Path) -> None:
    model = random_model(tmp_path, "Llama", {"tie_word_embeddings": True})
    table = model.model.embed_tokens.weight.detach().clone()
    moved = {"lm_head.weight": table, "model.embed_tokens.weight": None}
    decoder = assert_alike(tmp_path, rewritten(tmp_path, {}, moved))
    assert id(decoder.head) == id(decoder.embedding)


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "module.model."])
@pytest.mark.parametrize("tied", [False, True])
def test_names_with_other_prefixes_are_recognised(prefix: str, tied: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    theirs = random_model(tmp_path, "Qwen3", {"head_dim": 16, "tie_word_embeddings": tied})
    moved: dict[str, Any] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        head = prefix.removesuffix("model.") if prefix.endswith(".model.") else ""
        moved[name] = None
        moved[head + name if name == "lm_head.weight" else prefix + name.removeprefix("model.")] = tensor
    rewritten(tmp_path, {"architectures": ["Qwen3Model"]}, {"vision.patch.weight": torch.zeros(3, 4), **moved})
    assert_alike(tmp_path, theirs)


@pytest.mark.parametrize(
    "folder",
    [DEMO_MODEL, pytest.param(SHARED / "models" / "doclm-29m", marks=pytest.mark.needs_shared)],
    ids=["4m", "29m"],
)
def test_logits_of_a_trained_model(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = np.random.default_rng(4).integers(2, 4096, 90)
    expected = their_logits(theirs, ids)
    decoder = load_checkpoint(folder)
    assert distance(in_parts(decoder, ids, [90]), expected) < TOLERANCE
    assert distance(in_parts(decoder, ids, [70] + [1] * 20), expected) < TOLERANCE
