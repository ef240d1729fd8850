"""The decoder, the samplers and the chat templates against transformers: every architecture and option, in float32."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from bincompress.inference.chat import ChatTemplate
from bincompress.inference.sampling import Sampling, candidates
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.decoder import Decoder
from cpu_kernels.parallel.workers import Workers
from tests.conftest import DEMO_MODEL, SHARED, Run, tiny_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow  # PyTorch and transformers

TOLERANCE = 1e-4  # of the largest absolute logit

VOCAB = 101
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,  # by default some have one past this vocabulary
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

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

# Architectures with parts that Llama and its kin lack, which `distill` does not know; layers of every kind, and sizes
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


def random_model(folder: Path, kind: str, options: dict[str, Any]) -> Any:
    """Save a small model whose every weight is random, norms and biases included, and return it."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped products need even sizes
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options, **eager})
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.25
            middle = 1.0 if "norm" in name and "Gemma" not in kind else 0.0
            parameter.copy_(torch.randn_like(parameter) * spread + middle)
    model.save_pretrained(folder)
    return model


def their_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return result


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def in_parts(decoder: Decoder, ids: NDArray[np.int64], parts: list[int]) -> NDArray[np.float32]:
    cache = decoder.new_cache(len(ids))
    bounds = np.cumsum([0, *parts])
    return np.concatenate([decoder.logits(ids[a:b], cache) for a, b in itertools.pairwise(bounds)])


ALL = {**CASES, **BEYOND_LLAMA}
EXPERT_CASES = ["qwen3-moe dense layers", "mixtral"]


@pytest.mark.parametrize("case", ALL)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = random_model(tmp_path, *ALL[case])
    ids = np.random.default_rng(1).integers(0, VOCAB, 75)
    expected = their_logits(theirs, ids)
    decoder = load_checkpoint(tmp_path)
    assert distance(in_parts(decoder, ids, [75]), expected) < TOLERANCE
    assert distance(in_parts(decoder, ids, [33, 31, 1, 10]), expected) < TOLERANCE
    assert distance(in_parts(decoder, ids, [20] + [1] * 55), expected) < TOLERANCE


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


def test_old_style_config_is_read_alike(tmp_path: Path) -> None:
    random_model(tmp_path, *CASES["llama rope llama3"])
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "architectures")}
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    old |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": {"type": "llama3", **scaling}, "torch_dtype": "float32"}
    assert "rope_parameters" in new
    assert parse(old) == parse(new)


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
    "OLMo 3": ("Olmo3", {}),
    "OLMoE": ("Olmoe", EXPERTS),
    "Qwen2-MoE": ("Qwen2Moe", EXPERTS),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "Phi-4-mini": (
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            },
            "original_max_position_embeddings": 128,
        },
    ),
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


def rewritten(folder: Path, change: dict[str, Any], tensors: dict[str, Any] | None = None) -> Any:
    """Change a saved model's config and tensors, and return what transformers loads then."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if tensors is not None:
        kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in tensors}
        added = {k: v for k, v in tensors.items() if v is not None}
        save_file(kept | added, folder / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def assert_alike(folder: Path, theirs: Any) -> Decoder:
    ids = np.random.default_rng(5).integers(0, VOCAB, 70)
    decoder = load_checkpoint(folder)
    assert distance(in_parts(decoder, ids, [70]), their_logits(theirs.eval(), ids)) < TOLERANCE
    return decoder


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


SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.8),
    Sampling(top_p=0.01),
    Sampling(min_p=0.1),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    Sampling(temperature=0.3, top_k=10, top_p=0.5, repetition_penalty=0.8),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_filters_keep_what_transformers_keeps(settings: Sampling) -> None:
    from transformers.generation import logits_process as theirs

    filters: list[Any] = []
    if settings.repetition_penalty != 1.0:
        filters.append(theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    filters.append(theirs.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        filters.append(theirs.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        filters.append(theirs.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        filters.append(theirs.MinPLogitsWarper(settings.min_p))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal(300) * 3).astype(np.float32)
        before = rng.integers(0, 300, 25)
        scores = torch.from_numpy(logits.copy())[None]
        for each in filters:
            scores = each(torch.from_numpy(before)[None], scores)
        seen = np.zeros(300, bool)
        seen[before] = True
        ids, values = candidates(logits, seen, settings)
        ours = np.full(300, -np.inf, np.float32)
        ours[ids] = values
        assert np.allclose(ours, scores[0].numpy(), rtol=1e-6, atol=0)


LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none and tools is defined %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.seen %}
        {%- set ns.last = messages|length - loop.index %}
        {%- set ns.seen = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last and reasoning %}
            {%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL_TEMPLATE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
CHATML_TEMPLATE = """
  {% for message in messages %}
    {% if message['role'] == 'skip' %}
      {% continue %}
    {% endif %}
<|im_start|>{{ message['role'] }}
    {% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|im_end|>
{% endgeneration %}
    {% else %}
{{ message['content'] }}<|im_end|>
    {% endif %}
  {% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
{{ dict(a=1, b="<é>") | tojson(sort_keys=true, separators=(",", ":")) }}{{ strftime_now("%Y") }}
"""
TALK = [
    {"role": "system", "content": " You are terse. "},
    {"role": "user", "content": "What is <b>&amp;</b>? \n"},
    {"role": "assistant", "content": "\n\nIt is 'bold' — \"ünï\" ", "reasoning": "\nhm\n"},
    {"role": "user", "content": "Say {{ bos_token }} 你好 😀"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": ["é", 1, None, True, 1.5]}}}]


@pytest.mark.parametrize("template", [LLAMA3_TEMPLATE, QWEN_TEMPLATE, MISTRAL_TEMPLATE, CHATML_TEMPLATE])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", [TALK, TALK[1:3]])
def test_chat_bytes_equal_transformers(template: str, prompt: bool, tools: Any, messages: Any) -> None:
    from tokenizers import Tokenizer, models

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    expected = theirs.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=False,
        enable_thinking=False,
    )
    ours = ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(messages, tools, prompt, enable_thinking=False) == expected
