"""The values of every type of tensor in a GGUF file, against the gguf package's own."""

from pathlib import Path

import numpy as np
import pytest

from bincompress.sources.checkpoint import read_weight
from bincompress.sources.hub import open_source
from tests.gguf_files import converted, entry, metadata_of, numbers, raw, tensor, write_gguf
from tests.test_gguf import TOKENS, tiny

gguf = pytest.importorskip("gguf")

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
