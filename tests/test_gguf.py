"""A GGUF file as a source: its tensors, config, tokenizer and template, and what is refused of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import CheckpointError
from bincompress.inference.chat import load_template
from bincompress.inference.load import load_decoder
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.sources.hub import open_source
from bincompress.store.export import export
from bincompress.store.store import open_store
from tests.conftest import Run, write_model
from tests.gguf_files import converted, metadata_of, write_gguf
from tests.test_declarations import config_of

pytest.importorskip("gguf")

LETTERS = ["t", *"0123456789", "\u0120"]  # U+0120: a space
WORDS = LETTERS + [f"t{number}" for number in range(96 - len(LETTERS))]
IDS = [1, 5, 9, 40, 7, 22, 90, 3, 3, 60]
TOKENS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [1] * len(WORDS),
    "tokenizer.ggml.merges": [f"t {digit}" for digit in range(10)],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def tiny(architecture: str, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and random tensors of an architecture."""
    config = config_of(architecture) | {"head_dim": 16} | changes
    config |= {"sliding_window": None} if architecture == "MistralForCausalLM" else {}
    config |= {"query_pre_attn_scalar": 256} if architecture == "Gemma3ForCausalLM" else {}
    config |= {"no_rope_layers": [1, 1]} if architecture == "SmolLM3ForCausalLM" else {}
    random = np.random.default_rng(5)
    tensors = {
        name: (random.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in parse(config).tensors().items()
    }
    return config, tensors


# Refused by name: how these lie in a GGUF file is not known here.
NOT_IN_GGUF = {
    "BitNetForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "Olmo3ForCausalLM", "GraniteMoeHybridForCausalLM",
    "Ministral3ForCausalLM", "GptOssForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM", "Lfm2ForCausalLM", "Qwen2MoeForCausalLM", "OlmoeForCausalLM",
    "Lfm2MoeForCausalLM", "CwmForCausalLM", "GemmaForCausalLM", "SeedOssForCausalLM", "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM",
    "HeliumForCausalLM", "IQuestCoderForCausalLM", "InternLM3ForCausalLM", "MiniMaxM2ForCausalLM",
}  # fmt: skip
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def fused(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put the matrices together that this architecture stores as one."""
    if config["model_type"] != "phi3":
        return tensors
    found = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        for whole, parts in FUSED.items():
            block = whole.split(".")[0]
            names = [f"model.layers.{layer}.{block}.{part}.weight" for part in parts]
            found[f"model.layers.{layer}.{whole}.weight"] = np.concatenate([found.pop(name) for name in names])
    return found


def both(
    folder: Path,
    architecture: str,
    kinds: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Path, Path]:
    """The same model as a checkpoint folder and as a GGUF file."""
    config, tensors = tiny(architecture, **changes)
    stored = fused(config, tensors)
    checkpoint = write_model(folder / "hf", stored, config)
    metadata = {key: value for key, value in (metadata_of(config) | TOKENS | (more or {})).items() if value is not None}
    return checkpoint, write_gguf(folder / "model.gguf", metadata, converted(config, stored), kinds)


def logits(checkpoint: Checkpoint) -> np.ndarray:
    decoder = load_checkpoint(checkpoint)
    found: np.ndarray = decoder.logits(IDS, decoder.new_cache(len(IDS)))
    return found


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - NOT_IN_GGUF))
def test_every_architecture_is_the_checkpoint_that_it_was_made_from(tmp_path: Path, architecture: str) -> None:
    folder, file = both(tmp_path, architecture)
    found, expected = open_source(str(file)), open_source(str(folder))
    assert set(found.tensors) == set(expected.tensors)
    for name, source in expected.tensors.items():
        ours = read_weight(found.tensors[name]).float32()
        np.testing.assert_allclose(ours, read_weight(source).float32(), rtol=0, atol=2e-7, err_msg=name)
    np.testing.assert_allclose(logits(found), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_biases_and_tied_heads(tmp_path: Path, architecture: str) -> None:
    folder, file = both(tmp_path, architecture, attention_bias=True, tie_word_embeddings=True)
    found = open_source(str(file))
    assert "lm_head.weight" not in found.tensors
    assert found.config["tie_word_embeddings"] is True
    np.testing.assert_allclose(logits(found), logits(open_source(str(folder))), rtol=0, atol=1e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_factors(theta: float, head: int, original: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    found = []
    for place in range(0, head, 2):
        wavelength = 2 * np.pi * theta ** (place / head)
        if wavelength < original / 4.0:
            found.append(1.0)
        elif wavelength > original / 1.0:
            found.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_the_factors_of_llama_3_become_its_rope_scaling(tmp_path: Path) -> None:
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    changes = {"rope_theta": 500000.0, "rope_scaling": scaling, "head_dim": 64}
    config, tensors = tiny("LlamaForCausalLM", **changes)
    folder = write_model(tmp_path / "hf", tensors, config)
    stored = converted(config, tensors) | {"rope_freqs.weight": llama3_factors(500000.0, 64, 8192, 8.0)}
    file = write_gguf(tmp_path / "model.gguf", metadata_of(config) | TOKENS, stored)
    found = open_source(str(file))
    assert found.config["rope_scaling"] == scaling
    np.testing.assert_allclose(logits(found), logits(open_source(str(folder))), rtol=0, atol=1e-5)
    wrong = stored | {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}
    file = write_gguf(tmp_path / "wrong.gguf", metadata_of(config) | TOKENS, wrong)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight: factors that are not those of Llama 3"):
        open_source(str(file))


def test_other_scaling_is_read_or_refused_by_name(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    _, file = both(tmp_path, "LlamaForCausalLM", more=linear)
    assert parse(open_source(str(file)).config).rope.factor == 4.0
    (tmp_path / "yarn").mkdir()
    yarn = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    _, file = both(tmp_path / "yarn", "Qwen2ForCausalLM", more=yarn)
    rope = parse(open_source(str(file)).config).rope
    assert (rope.kind, rope.factor) == ("yarn", 4.0)


def test_a_factor_alone_is_linear_scaling_and_none_is_none(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], float]] = [
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, 1.0),
    ]
    for number, (more, expected) in enumerate(cases):
        _, file = both(tmp_path / str(number), "LlamaForCausalLM", more=more)
        assert parse(open_source(str(file)).config).rope.factor == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5), ("logit_scale", 8.0), ("attn_logit_softcapping", 50.0), ("expert_used_count", 2),
        ("final_logit_softcapping", 30.0), ("attention.sliding_window_pattern", [True, False]),
        ("rope.scaling.yarn_log_multiplier", 0.1), ("attention.clamp_kqv", 8.0),
    ],
)  # fmt: skip
def test_metadata_that_changes_the_numbers_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    _, file = both(tmp_path, "LlamaForCausalLM", more={f"llama.{key}": value})
    with pytest.raises(CheckpointError, match=rf"llama\.{key} = .* changes the numbers"):
        open_source(str(file))


def test_all_metadata_that_is_not_read_is_counted(tmp_path: Path) -> None:
    more: dict[str, Any] = {f"qwen2.unknown_{number}": 1 for number in range(9)}
    more |= {"tokenizer.ggml.remove_extra_whitespaces": True, "qwen2.logit_scale": 1.0}
    _, file = both(tmp_path, "Qwen2ForCausalLM", more=more)
    (note,) = [note for note in open_source(str(file)).notes if "not read" in note]
    assert note.startswith("metadata that is not read: qwen2.logit_scale, qwen2.unknown_0, ")
    assert note.endswith(" and 3 more")


def test_a_text_begins_with_a_space_unless_the_file_says_no(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", *(f"w{number}" for number in range(90))]
    own = {"model": "llama", "pre": None, "tokens": words, "scores": [-float(n) for n in range(96)], "merges": None}
    for number, (prefix, expected) in enumerate([(None, [5]), (True, [5]), (False, [4])]):
        (tmp_path / str(number)).mkdir()
        changes = own | {"add_space_prefix": prefix, "add_bos_token": False, "token_type": [1] * 96}
        more = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        _, file = both(tmp_path / str(number), "LlamaForCausalLM", more=more)
        tokenizer = load_tokenizer(open_source(str(file)).assets())
        assert list(tokenizer.encode("a")) == expected


def test_the_factors_of_longrope_are_read_and_exported(tmp_path: Path) -> None:
    config, tensors = tiny("Phi3ForCausalLM", partial_rotary_factor=1.0)
    factors = {f"rope_factors_{end}.weight": np.full(8, 1.5, np.float32) for end in ("long", "short")}
    metadata = metadata_of(config) | TOKENS | {"phi3.rope.scaling.original_context_length": 64}
    file = write_gguf(tmp_path / "m.gguf", metadata, converted(config, fused(config, tensors)) | factors)
    plan = make_plan(open_source(str(file)), load_recipe(None, {}))
    assert compress(plan, str(tmp_path / "store")).complete
    out = json.loads((export(open_store(str(tmp_path / "store")), tmp_path / "out") / "config.json").read_text())
    assert out["rope_scaling"]["long_factor"] == [1.5] * 8
    assert out["original_max_position_embeddings"] == 64


def test_a_store_of_it_runs_and_its_baseline_is_the_file(tmp_path: Path, run: Run) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    more = {"tokenizer.chat_template": template, "tokenizer.ggml.eot_token_id": 2, "qwen2.unknown": 7}
    kinds = {"blk.0.ffn_up.weight": "Q8_0", "blk.1.ffn_up.weight": "Q8_0"}
    _, file = both(tmp_path, "Qwen2ForCausalLM", kinds, more, hidden_size=64)
    (tmp_path / "config.json").write_text("not of this model")
    store = tmp_path / "store"
    code, _, err = run("compress", file, store)
    assert code == 0
    assert "a GGUF file: " in err
    assert "2 tensors of Q8_0" in err
    assert "metadata that is not read: qwen2.unknown" in err
    opened = open_store(str(store))
    assert opened.report("model.layers.0.mlp.up_proj.weight")["source_format"] == "GGUF Q8_0"
    assets = opened.read_assets()
    assert load_template(assets).render([{"role": "user", "content": "t1"}]) == "<user>t1"  # type: ignore[union-attr]
    assert load_tokenizer(assets).eos_ids == {1, 2}
    words = tmp_path / "text.txt"
    words.write_text(" ".join(np.random.default_rng(0).choice(list("t0123456789"), 300)))
    options = ("--text", words, "--context", "32", "--json")
    code, out, _ = run("evaluate", store, *options, "--baseline", file)
    assert code == 0
    code, alone, _ = run("evaluate", file, *options)
    assert code == 0
    assert json.loads(out)["baseline_perplexity"] == json.loads(alone)["perplexity"]
    code, _, err = run("calibrate", file, tmp_path / "stats", "--text", words, "--samples", 2, "--context", 32)
    assert code == 0, err
    code, out, _ = run("inspect", store)
    assert "GGUF Q8_0" in out


def test_a_kept_store_gives_the_same_values_and_exports(tmp_path: Path) -> None:
    _, file = both(tmp_path, "LlamaForCausalLM", {"blk.0.attn_q.weight": "Q8_0"})
    checkpoint = open_source(str(file))
    store = str(tmp_path / "store")
    assert compress(make_plan(checkpoint, load_recipe(None, {}, ("*",))), store).complete
    loaded = load_decoder(store, 1, ActivationSettings(16)).decoder
    np.testing.assert_allclose(loaded.logits(IDS, loaded.new_cache(len(IDS))), logits(checkpoint), atol=1e-5)
    out = export(open_store(store), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_parts_of_a_model_are_read_together(tmp_path: Path) -> None:
    config, tensors = tiny("Qwen2ForCausalLM")
    stored = converted(config, tensors)
    names = list(stored)
    for number in range(2):
        part = {name: stored[name] for name in names[number::2]}
        own = metadata_of(config) | TOKENS if number == 0 else {"general.architecture": "qwen2"}
        own |= {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", own, part)
    checkpoint = open_source(str(tmp_path / "m-00001-of-00002.gguf"))
    assert len(checkpoint.tensors) == len(names)
    with pytest.raises(CheckpointError, match="part 2 of 2; give the first"):
        open_source(str(tmp_path / "m-00002-of-00002.gguf"))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf: missing"):
        open_source(str(tmp_path / "m-00001-of-00002.gguf"))
