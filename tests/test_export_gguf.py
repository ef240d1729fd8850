"""A store as a GGUF file: what our reader, and the gguf package's, find in it is what the store holds."""

import json
import signal
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import StoreError
from bincompress.exporting.gguf import export_gguf
from bincompress.inference.chat import load_template
from bincompress.inference.load import load_decoder
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.sources.gguf.header import read_header
from bincompress.sources.gguf.splits import SPLITS
from bincompress.sources.hub import open_source
from bincompress.store.store import Store, open_store
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run, tiny_config, write_model
from tests.forked import Forked
from tests.test_gguf import IDS, NOT_IN_GGUF, fused, tiny

gguf = pytest.importorskip("gguf")

WORDS = ["t", *"0123456789", "\u0120", "t1", "t12", "\u0120t", "\u0120t1"]
MERGES = [("t", "1"), ("t1", "2"), ("\u0120", "t"), ("\u0120", "t1")]
TEXT = "t1 t12  t3t45\nt1"
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 5, "final_logit_softcapping": 30.0}


def byte_level(split: str = "qwen2", **extra: Any) -> dict[str, bytes]:
    """The files of a byte-level tokenizer as Qwen's are, with control tokens and one that a user defined."""
    alphabet = [token for token in pre_tokenizers.ByteLevel.alphabet() if token not in WORDS]
    vocab = {token: number for number, token in enumerate([*WORDS, *sorted(alphabet)])}
    made = tokenizers.Tokenizer(models.BPE(vocab, MERGES))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLITS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>", "<end>")])
    made.add_tokens([AddedToken("<x>", normalized=False)])
    for name, value in extra.items():
        setattr(made, name, value)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": "<s>{{ messages }}"}
    ends = [made.token_to_id("</s>"), made.token_to_id("<end>")]
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": ends}).encode(),
    }


def pieces(prepended: bool) -> dict[str, bytes]:
    """The files of a sentencepiece tokenizer as Llama 2's are: bytes, pieces, a prefix at each text's start."""
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: number for number, token in enumerate([*named, "\u2581", "t", *"0123456789", "\u2581t", "t1"])}
    made = tokenizers.Tokenizer(
        models.BPE(vocab, [("\u2581", "t"), ("t", "1")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] if prepended else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prepended else []),
        ]
    )
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in named[:3]])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def made_store(
    folder: Path, architecture: str, files: dict[str, bytes] | None = None, settings: Any = None, **changes: Any
) -> Store:
    """A store of a tiny random model."""
    own = GEMMA if architecture == "Gemma3ForCausalLM" else {}
    config, tensors = tiny(architecture, **{"vocab_size": 300, "intermediate_size": 96, **own, **changes})
    config |= changes
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in fused(config, tensors).items()}
    return compressed(folder, stored, config, files, settings)


def compressed(
    folder: Path, tensors: dict[str, Any], config: dict[str, Any], files: dict[str, bytes] | None, settings: Any = None
) -> Store:
    model = write_model(folder / "hf", tensors, {**config, "bos_token_id": None, "eos_token_id": None})
    for name, content in (byte_level() if files is None else files).items():
        (model / name).write_bytes(content)
    chosen = {"groups": 2, "block": 64} if settings is None else settings
    assert compress(make_plan(open_checkpoint(model), load_recipe(None, chosen)), str(folder / "store")).complete
    return open_store(str(folder / "store"))


def weights(store: Store, name: str) -> np.ndarray:
    if store.tensors()[name] == "packed":
        return dequantize(store.read_packed(name))
    weight, shape = store.read_plain(name)
    return weight.float32().reshape(shape)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - NOT_IN_GGUF))
def test_our_reader_finds_the_store_again(tmp_path: Path, architecture: str) -> None:
    store = made_store(tmp_path, architecture)
    done = export_gguf(store, tmp_path / "m.gguf")
    found = open_source(done.file)
    assert [note for note in done.notes if "llama.cpp does not use the window" not in note] == []
    ours, theirs = parse(json.loads(store.read_assets()["config.json"])), parse(found.config)
    if architecture == "MistralForCausalLM":  # which llama.cpp knows as Llama
        assert found.config["model_type"] == "llama"
    else:
        assert theirs.architecture == ours.architecture
    assert (theirs.ropes, theirs.windows) == (ours.ropes, ours.windows)
    assert theirs.query_scale == (None if ours.query_scale is None else pytest.approx(ours.query_scale))
    assert set(found.tensors) == set(store.tensors())
    for name, kind in store.tensors().items():
        expected = weights(store, name)
        read = read_weight(found.tensors[name]).float32().reshape(expected.shape)
        if kind == "packed":
            expected = expected.astype(np.float16).astype(np.float32)
        tolerance = 2**-23 if architecture.startswith("Gemma") and expected.ndim == 1 else 0.0  # 1 was added to it
        np.testing.assert_allclose(read, expected, rtol=0, atol=tolerance, err_msg=name)
    tokens, back = load_tokenizer(store.read_assets()), load_tokenizer(found.assets())
    for text in (TEXT, "<s>t1</s> t2<x>t3", "\u00e9\U0001f600"):
        assert back.encode(text) == tokens.encode(text)
    assert (back.eos_ids, back.bos_id) == (tokens.eos_ids, tokens.bos_id)
    template = load_template(found.assets())
    assert template is not None
    assert template.render([]) == "<s>[]"
    decoders = load_decoder(store.url, 1, ActivationSettings(16)).decoder, load_checkpoint(found)
    own, read = (decoder.logits(IDS, decoder.new_cache(len(IDS))) for decoder in decoders)
    assert np.abs(own - read).max() < 5e-3 * np.abs(own).max()
    theirs_too = {tensor.name for tensor in gguf.GGUFReader(done.file).tensors}
    assert theirs_too == {tensor.name for tensor in read_header(Path(done.file)).tensors}


def few_levels(levels: tuple[float, ...], block: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tiny Llama whose matrices hold a scale a block times these levels."""
    config = tiny_config(2, 256, 256) | {"vocab_size": 300}
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in parse(config).tensors().items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, ml_dtypes.bfloat16)
            continue
        scales = (2.0 ** random.integers(-6, -3, (shape[0], shape[1] // block))).repeat(block, axis=1)
        tensors[name] = (scales * random.choice(levels, shape)).astype(ml_dtypes.bfloat16)
    return config, tensors


@pytest.mark.parametrize(
    ("levels", "block", "ternary", "kind"),
    [((-1, 1), 128, "tq2_0", "Q1_0"), ((-1, 0, 1), 256, "tq2_0", "TQ2_0"), ((-1, 0, 1), 256, "tq1_0", "TQ1_0")],
)
def test_few_levels_come_out_exactly(tmp_path: Path, levels: Any, block: int, ternary: Any, kind: str) -> None:
    config, tensors = few_levels(levels, block)
    store = compressed(tmp_path, tensors, config, None, {})
    assert "packed" in store.tensors().values()
    done = export_gguf(store, tmp_path / "m.gguf", ternary=ternary)
    packed = sum(entry == "packed" for entry in store.tensors().values())
    assert done.types[kind] == packed
    assert done.exact == done.matrices
    found = open_source(done.file)
    for name, expected in tensors.items():
        read = read_weight(found.tensors[name]).float32().reshape(expected.shape)
        np.testing.assert_array_equal(read, expected.astype(np.float32), err_msg=name)
    # And in again: what is read is lossless once more.
    again = compress(make_plan(found, load_recipe(None, {})), str(tmp_path / "again"))
    assert again.complete
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(weights(open_store(str(tmp_path / "again")), name), tensors[name].astype(np.float32))


def test_q1_0_has_the_bytes_of_its_layout() -> None:
    """ggml-common.h: a scale in float16, then a bit a weight, the lowest first, set for +d."""
    from bincompress.sources.gguf.blocks import _few_bits, one_bit

    values = np.full((1, 128), -0.5, np.float32)
    values[0, [0, 9]] = 0.5
    found = one_bit(values)
    assert found.tobytes() == np.float16(0.5).tobytes() + bytes([1, 2]) + bytes(14)
    np.testing.assert_array_equal(_few_bits(found, 1).reshape(1, 128), values)
    two = np.frombuffer(np.float16(2.0).tobytes() + bytes([0b11100100]) + bytes(15), np.uint8)[None]
    assert _few_bits(two, 2)[0, :5].tolist() == [-2.0, 0.0, 2.0, 4.0, -2.0]


def test_q8_0_is_within_its_rounding(tmp_path: Path) -> None:
    store = made_store(tmp_path, "LlamaForCausalLM")
    done = export_gguf(store, tmp_path / "m.gguf", gguf_type="q8_0")
    assert set(done.types) == {"F32", "Q8_0"}
    found = open_source(done.file)
    for name in store.tensors():
        expected = weights(store, name)
        read = read_weight(found.tensors[name]).float32().reshape(expected.shape)
        # Half a step, and 127 times what its scale in float16 is off.
        step = np.abs(expected.reshape(-1, 32)).max(axis=1) / 127 if expected.ndim == 2 else np.zeros(1)
        off = np.abs(read - expected).reshape(len(step), -1).max(axis=1)
        assert (off <= step * 0.57 + 1e-6).all(), name


TOKENIZERS = {
    "normalized": (byte_level(normalizer=normalizers.NFC()), "normalized (NFC) first"),
    "gpt-2": (byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)), ""),
    "llama 2": (pieces(prepended=True), "may become other tokens"),
    "no prefix": (pieces(prepended=False), ""),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_of_other_kinds(tmp_path: Path, kind: str) -> None:
    files, note = TOKENIZERS[kind]
    store = made_store(tmp_path, "LlamaForCausalLM", files)
    done = export_gguf(store, tmp_path / "m.gguf")
    assert [found for found in done.notes if note and note in found] or (not note and not done.notes), done.notes
    ours, theirs = load_tokenizer(files), load_tokenizer(open_source(done.file).assets())
    for text in (TEXT, "t\u4e2dt", ""):
        assert theirs.encode(text) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text


WORD_LEVEL = b'{"version":"1.0","added_tokens":[],"pre_tokenizer":{"type":"Whitespace"},"model":{"type":"WordLevel","vocab":{"t0":0},"unk_token":"t0"}}'  # noqa: E501
UNKNOWN_SPLIT = byte_level(
    pre_tokenizer=pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\d+|\D+"), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
)
REFUSED: list[tuple[str, dict[str, Any], dict[str, bytes] | None, str]] = [
    ("BitNetForCausalLM", {}, None, "BitNetForCausalLM is not written as GGUF; known: Gemma3"),
    ("MixtralForCausalLM", {}, None, "MixtralForCausalLM is not written as GGUF"),
    ("Qwen3MoeForCausalLM", {}, None, "Qwen3MoeForCausalLM is not written as GGUF"),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, None, "GGUF cannot hold this SmolLM3ForCausalLM: ropes is"),
    ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 99}, None, "query_scale is 0.1005.*to who reads the file"),
    ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, None,
     "windows is 9"),
    ("LlamaForCausalLM", {}, {"tokenizer.json": WORD_LEVEL}, "a WordLevel tokenizer is not written as GGUF"),
    ("LlamaForCausalLM", {}, UNKNOWN_SPLIT, "how it splits text is not known in GGUF files"),
    ("LlamaForCausalLM", {"vocab_size": 200}, None, "264 tokens; the embedding has 200 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "files", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_gguf_cannot_hold_is_refused_before_the_work(
    tmp_path: Path, run: Run, architecture: str, changes: dict[str, Any], files: Any, message: str
) -> None:
    from bincompress.errors import BincompressError

    store = made_store(tmp_path, architecture, files, **changes)
    with pytest.raises(BincompressError, match=message):
        export_gguf(store, tmp_path / "m.gguf", on_tensor=lambda name, size: pytest.fail("work"))
    code, out, err = run("export", store.url, tmp_path / "m.gguf")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "store"]


def test_the_command_overwrites_only_when_told(tmp_path: Path, run: Run) -> None:
    store, file = made_store(tmp_path, "Qwen2ForCausalLM"), tmp_path / "m.gguf"
    file.write_bytes(b"GGUF of mine")
    code, _, err = run("export", store.url, file)
    assert code == 2
    assert "m.gguf: is there; nothing was changed: --overwrite replaces it" in err
    assert file.read_bytes() == b"GGUF of mine"
    code, out, err = run("export", store.url, file, "--overwrite", "--gguf-type", "q8_0")
    assert code == 0, err
    assert "16 Q8_0; 0 of 16 matrices hold the store's weights exactly" in out
    first = file.read_bytes()
    assert run("export", store.url, file, "--overwrite", "--gguf-type", "q8_0")[0] == 0
    assert file.read_bytes() == first
    code, _, err = run("export", store.url, tmp_path / "folder", "--gguf-type", "f16")
    assert code == 2
    assert "--gguf-type is for GGUF files; " in err
    (tmp_path / "d.gguf").mkdir()
    code, _, err = run("export", store.url, tmp_path / "d.gguf")
    assert code == 2
    assert "is a folder" in err


def test_a_weight_too_large_for_float16_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    config, tensors = tiny("LlamaForCausalLM", vocab_size=300)
    tensors["model.layers.1.mlp.up_proj.weight"][3] = 1e6
    store = compressed(tmp_path, {n: v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}, config, None)
    with pytest.raises(
        StoreError, match=r"layers.1.mlp.up_proj.weight: holds a weight of 999424; F16 holds up to 65504"
    ):
        export_gguf(store, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "store"]


KILLED = """
import os, signal, sys
from bincompress.exporting.gguf import export_gguf
from bincompress.store.store import open_store
def stop(name, size):
    if "blk.1" in name:
        os.kill(os.getpid(), signal.SIGKILL)
export_gguf(open_store(sys.argv[1]), sys.argv[2], overwrite=True, on_tensor=stop)
"""


def test_a_killed_export_leaves_the_file_as_it_was(forked: Forked, tmp_path: Path) -> None:
    store, file = made_store(tmp_path, "LlamaForCausalLM"), tmp_path / "out" / "m.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF of mine")
    done = forked(store.url, file, code=KILLED)
    assert done.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"GGUF of mine"
    assert len(list(file.parent.iterdir())) == 2
    export_gguf(store, file, overwrite=True)
    assert [path.name for path in file.parent.iterdir()] == ["m.gguf"]
    open_source(str(file))


def test_the_python_call_and_a_store_without_tokenizer(tmp_path: Path) -> None:
    import bincompress
    from bincompress.errors import BincompressError

    store = made_store(tmp_path, "LlamaForCausalLM")
    assert bincompress.export(store.url, tmp_path / "m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(BincompressError, match="are for GGUF"):
        bincompress.export(store.url, tmp_path / "folder", gguf_type="q8_0")


def test_low_rank_matrices_are_written_dequantized(tmp_path: Path) -> None:
    store = made_store(tmp_path, "LlamaForCausalLM", settings={"method": "lowrank", "rank": 24})
    done = export_gguf(store, tmp_path / "m.gguf")
    back = open_source(done.file)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = dequantize(store.read_stored(name)).astype(np.float16).astype(np.float32)
    assert np.array_equal(read_weight(back.tensors[name]).float32().reshape(expected.shape), expected)
