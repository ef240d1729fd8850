"""A GGUF file as a source: its tensors, config, tokenizer and template, and what is refused of it."""

import json
import struct
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
from tests.gguf_files import converted, entry, metadata_of, raw, tensor, text, write_gguf
from tests.test_declarations import config_of

gguf = pytest.importorskip("gguf")

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
    "Lfm2MoeForCausalLM",
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


TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"]


@pytest.mark.parametrize("kind", TYPES)
def test_types_that_the_package_writes(tmp_path: Path, kind: str) -> None:
    config, tensors = tiny("LlamaForCausalLM", hidden_size=256, intermediate_size=256, head_dim=64)
    stored = converted(config, tensors)
    kinds = {name: kind for name, value in stored.items() if value.ndim == 2}
    file = write_gguf(tmp_path / "model.gguf", metadata_of(config) | TOKENS, stored, kinds)
    checkpoint = open_source(str(file))
    number = gguf.GGMLQuantizationType[kind]
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        source = checkpoint.tensors[name]
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], number), number)  # a row alone
        np.testing.assert_array_equal(read_weight(source).float32(), expected.reshape(256, 256))
        assert source.dtype == (kind if kind in ("F16", "BF16") else "F32")
    (note,) = checkpoint.notes
    assert f"{len(kinds)} tensors of {kind}" in note


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M"]
)
def test_types_that_are_only_read(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(1).integers(0, 256, (96, 256 // weights * size)).astype(np.uint8)
    with np.errstate(all="ignore"):  # some of these random scales are infinite
        expected = gguf.quants.dequantize(blocks, number)
    data = raw(
        [entry("general.architecture", "qwen2"), *numbers("qwen2")],
        [tensor("token_embd.weight", (96, 256), int(number))],
        data=0,
    )
    (tmp_path / "m.gguf").write_bytes(data + blocks.tobytes())
    values = read_weight(open_source(str(tmp_path / "m.gguf")).tensors["model.embed_tokens.weight"]).float32()
    np.testing.assert_array_equal(values, expected)


def numbers(arch: str, **changes: Any) -> list[bytes]:
    own = {
        "context_length": 128, "embedding_length": 256, "block_count": 1, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    return [entry(f"{arch}.{key.replace('__', '.')}", value) for key, value in (own | changes).items()]


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


ARCH = entry("general.architecture", "qwen2")
OWN = [ARCH, *numbers("qwen2")]
EMBEDDING = tensor("token_embd.weight", (4, 256))

WRONG: list[tuple[bytes, str]] = [
    (b"", "not readable|not a GGUF file"),
    (b"PK\x03\x04" + bytes(100), r"not a GGUF file: it begins with b'PK"),
    (b"GGUF\x03", "truncated: 5 bytes"),
    (raw(OWN, [EMBEDDING], version=1), "GGUF version 1; expected version 2 or 3"),
    (raw(OWN, [EMBEDDING], version=3 << 24), "big-endian byte order, which is not read"),
    (raw(OWN, [EMBEDDING], counts=(1 << 62, 7)), "4,611,686,018,427,387,904 tensors; expected at most"),
    (raw(OWN, [EMBEDDING], counts=(1, 1 << 40)), "1,099,511,627,776 keys"),
    (raw(OWN, [EMBEDDING], data=0)[:-60], "in the middle of its entries"),
    (raw([ARCH, ARCH], [EMBEDDING]), "the key 'general.architecture' twice"),
    (raw(OWN, [EMBEDDING, EMBEDDING]), "the tensor 'token_embd.weight' twice"),
    (raw([text("a" * 70000)], []), "a key of 70,000 bytes"),
    (raw([struct.pack("<Q", 1 << 60)], []), "a key of 1,152,921,504,606,846,976 bytes"),
    (raw([text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)], []), "1,152,921,504,606,846,976 texts"),
    (raw([text("k") + struct.pack("<IIQ", 9, 4, 1 << 61)], []), "in the middle of its entries"),
    (raw([text("k") + struct.pack("<IIQ", 9, 9, 1)], []), "an array of type 9"),
    (raw([text("k") + struct.pack("<I", 99)], []), "type 99 is not known"),
    (raw([text(b"\xff\xfe")], []), "is not UTF-8"),
    (raw([text("k") + struct.pack("<IB", 7, 3)], []), "3 as a truth"),
    (raw([*OWN, entry("general.alignment", 3)], [EMBEDDING]), "general.alignment 3; expected a power of two"),
    (raw([*OWN, entry("general.alignment", 0)], [EMBEDDING]), "general.alignment 0"),
    (raw(OWN, [tensor("token_embd.weight", (4, 256), 0, 1 << 40)]), "lie outside the .* of the file"),
    (raw(OWN, [tensor("token_embd.weight", (4, 256), 0, 4)]), "begins at byte 4, no multiple of 32"),
    (raw(OWN, [EMBEDDING, tensor("output_norm.weight", (256,), 0, 1024)]), "'output_norm.weight' overlaps 'token_embd"),
    (raw(OWN, [tensor("token_embd.weight", (4, 256), 99)]), "tensors of type 99 are not read"),
    (raw(OWN, [tensor("token_embd.weight", (4, 250), 8)]), "250 columns; Q8_0 has blocks of 32"),
    (raw(OWN, [tensor("token_embd.weight", (1 << 40, 1 << 40))]), "lie outside"),
    (raw(OWN, [tensor("token_embd.weight", (1, 1, 1, 1, 1))]), "5 dimensions"),
    (raw(OWN, [tensor("token_embd.weight", (0, 4))]), "dimensions .4, 0."),
    (raw(OWN, [tensor("../../etc/passwd", (4, 4))]), "token_embd.weight is missing"),
    (raw(OWN, [EMBEDDING, tensor("blk.0.../x.weight", (4,), 0, 4096)], 8192), "not a tensor of Qwen2ForCausalLM"),
    (raw([entry("general.architecture", "rwkv7")], []), "architecture 'rwkv7' is not read from GGUF files"),
    (raw([], []), "architecture None is not read"),
    (raw([ARCH], [EMBEDDING]), "qwen2.embedding_length: expected a whole number, found None"),
    (raw([*OWN, entry("qwen2.attention.key_length", "x")], [EMBEDDING]), "key_length: expected a whole number"),
    (raw([*numbers("qwen2", **{"attention.head_count": 0}), ARCH], [EMBEDDING]), "head_count is 0"),
    (raw([*OWN, *map(entry, ("qwen2.attention.key_length", "qwen2.rope.dimension_count"), (64, 32))], [EMBEDDING]),
     "32 of 64 columns of a head; expected all"),
    (raw([*OWN, entry("tokenizer.ggml.model", "rwkv")], [EMBEDDING]), "tokenizer.ggml.tokens: expected a list"),
    (raw([*OWN, entry("tokenizer.ggml.tokens", ["a"] * 5)], [EMBEDDING]), "5 tokens; token_embd.weight has 4 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG, ids=range(len(WRONG)))
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, run: Run, content: bytes, message: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as found:
        open_source(str(file))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 1000
    code, out, err = run("compress", file, tmp_path / "store")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert not (tmp_path / "store").exists()


def tokenizer_of(tmp_path: Path, **changes: Any) -> Any:
    own = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    _, file = both(tmp_path, "Qwen2ForCausalLM", more=own)
    return load_tokenizer(open_source(str(file)).assets())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "never-heard-of"}, "pre: 'never-heard-of': how this tokenizer splits text is not known; known: "),
        ({"model": "bert"}, "model: 'bert' is not read"),
        ({"token_type": [1]}, "token_type: expected 96 numbers, one a token, found 1"),
        ({"merges": ["a b c"]}, "merges: 'a b c'; expected two parts"),
        ({"merges": ["nope t1"]}, "no tokenizer can be made of it"),
        ({"bos_token_id": 96}, "bos_token_id: 96; expected one of 96 tokens"),
        ({"add_bos_token": "yes"}, "add_bos_token: expected a truth"),
        ({"merges": None, "model": "llama"}, "scores: expected 96 numbers, one a token, found None"),
        (
            {"merges": None, "model": "llama", "tokens": ["a" * 20000, "b"], "scores": [0.0, 1.0]},
            "a token of 20,000 characters is too long",
        ),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_of(tmp_path, **changes)


def test_a_quantized_bias_in_another_order_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    own = [entry("general.architecture", "llama"), *numbers("llama")]
    file.write_bytes(raw(own, [EMBEDDING, tensor("blk.0.attn_q.bias", (256,), 8, 4096)], 8192))
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.bias': a quantized bias of heads in another order"):
        open_source(str(file))


def test_a_token_that_no_template_can_hold_is_refused(tmp_path: Path) -> None:
    words = ["{'a': 1}", *WORDS[1:-1], "01"]
    with pytest.raises(CheckpointError, match="no tokenizer can be made of it: Cannot build Piece"):
        tokenizer_of(tmp_path, tokens=words, merges=["0 1"], add_bos_token=True)


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    file = tmp_path / "m.gguf"
    file.write_bytes(raw(OWN, [EMBEDDING]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = run("compress", file, tmp_path / "store")
    assert code == 2
    assert "pip install 'bincompress[gguf]'" in err


def test_a_folder_with_a_gguf_file_says_which_to_give(tmp_path: Path, run: Run) -> None:
    (tmp_path / "m.gguf").write_bytes(raw(OWN, [EMBEDDING]))
    code, _, err = run("compress", tmp_path, tmp_path / "store")
    assert code == 2
    assert f"give the GGUF file itself: {tmp_path / 'm.gguf'}" in err
