"""What is each tensor to the model? Names of the common families, and shapes against config.json."""

from typing import Any

import pytest

from bincompress.model.config import parse
from bincompress.model.roles import Kept, Roles, declared_roles, kept_lines
from tests.test_model_config import LLAMA

CONFIG = {"vocab_size": 5000, "hidden_size": 256, "num_local_experts": 24, "max_position_embeddings": 777}

ROUTERS = (
    "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate",
    "model.layers.0.feed_forward.gate", "model.layers.0.ffn.gate", "model.layers.0.mlp.gate.wg",
    "model.layers.0.feed_forward.router", "transformer.blocks.0.ffn.router.layer", "layers.3.moe.gate",
    "model.layers.0.mlp.router.classifier", "model.layers.1.mlp.moe_gate", "model.layers.1.moe.gating",
    "model.layers.0.mlp.expert_gate", "encoder.block.1.layer.1.mlp.router.classifier", "h.2.moe.gate_network",
)  # fmt: skip
EMBEDDINGS = (
    "model.embed_tokens", "transformer.wte", "transformer.wpe", "gpt_neox.embed_in", "model.tok_embeddings",
    "tok_embeddings", "backbone.embeddings", "rwkv.embeddings", "shared", "model.embed_tokens_per_layer",
    "model.decoder.embed_positions", "bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "transformer.word_embeddings",
    "transformer.embedding.word_embeddings", "model.embeddings.word_embeddings", "emb", "backbone.embedding",
    "language_model.model.embed_tokens", "token_embd", "pos_embed", "roberta.embeddings.word_embeddings",
)  # fmt: skip
HEADS = (
    "lm_head", "embed_out", "output", "transformer.output_layer", "output_layer", "head", "score", "classifier",
    "v_head.summary", "qa_outputs", "cls.predictions.decoder", "value_head", "medusa_head.0.1", "reward_head",
    "language_model.lm_head", "model.lm_head", "classifier.out_proj", "regression_head", "v_head", "pre_classifier",
)  # fmt: skip
LINEARS = (
    "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up_proj",
    "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "gpt_neox.layers.0.attention.query_key_value",
    "gpt_neox.layers.0.mlp.dense_h_to_4h", "layers.0.attention.wo", "layers.0.feed_forward.w1",
    "model.layers.0.block_sparse_moe.experts.3.w2", "model.layers.0.mlp.experts.7.down_proj",
    "model.layers.0.mlp.shared_expert.up_proj", "encoder.layer.0.attention.output.dense", "decoder.layers.0.fc1",
    "model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.0.self_attn.kv_b_proj",
    "backbone.layers.0.mixer.out_proj", "model.layers.0.mlp.shared_experts.gate_proj", "rwkv.blocks.0.attention.output",
    "transformer.layers.0.self_attention.dense", "model.decoder.layers.0.self_attn.out_proj", "lm.blocks.0.ffn.gate",
)  # fmt: skip
BESIDE = (
    "vision_tower.encoder.layers.0.mlp.fc1", "visual.blocks.0.attn.qkv", "model.vision_model.layers.0.fc2",
    "multi_modal_projector.linear_1", "model.mm_projector.0", "audio_tower.layers.0.fc1", "connector.proj",
)  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("rows", [1, 8, 24, 64])
def test_routers(name: str, rows: int) -> None:
    role = Roles(CONFIG).of(f"{name}.weight", (rows, 256))
    assert (role.kind, role.reason) == ("other", "router or gate of experts")


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("shape", [(5000, 256), (96, 64), (4992, 200)])
def test_embeddings(name: str, shape: tuple[int, int]) -> None:
    assert Roles(CONFIG).of(f"{name}.weight", shape).kind == "embedding"
    assert Roles({}).of(f"{name}.weight", shape).kind == "embedding"


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", [(5000, 256), (1, 256), (2, 64), (96, 64)])
def test_heads(name: str, shape: tuple[int, int]) -> None:
    assert Roles({}).of(f"{name}.weight", shape).kind == "head"


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_are_packed(name: str) -> None:
    assert Roles(CONFIG).of(f"{name}.weight", (1024, 256)).kind == "linear"


@pytest.mark.parametrize("name", BESIDE)
def test_towers_and_projectors_are_kept(name: str) -> None:
    assert Roles(CONFIG).of(f"{name}.weight", (1024, 256)).reason == "vision, audio or a projector of theirs"


@pytest.mark.parametrize(
    ("name", "shape", "kind", "reason"),
    [
        ("some.table.weight", (5000, 64), "embedding", "vocabulary"),
        ("some.matrix.weight", (64, 5000), "head", "vocabulary"),
        ("a.table.weight", (777, 64), "embedding", "positions"),
        ("layers.0.odd.weight", (1, 64), "other", "at most 16 rows"),
        ("layers.0.odd.weight", (640, 3), "other", "at most 16 rows"),
        ("layers.0.mlp.experts.gate_up_proj", (8, 64, 64), "other", "fused experts in one 3-D tensor"),
        ("layers.0.conv.weight", (8, 64, 4), "other", "a 3-D tensor; only matrices"),
        ("layers.0.mixer.A_log", (64, 64), "other", "not called weight"),
        ("layers.0.norm.weight", (64,), "other", "vectors"),
        ("layers.0.q_norm.weight", (64, 64), "other", "norm"),
        ("scale", (), "other", "vectors"),
        ("none.weight", (0, 64), "other", "vectors"),
    ],
)
def test_shapes(name: str, shape: tuple[int, ...], kind: str, reason: str) -> None:
    role = Roles(CONFIG).of(name, shape)
    assert role.kind == kind
    assert reason in role.reason


def test_sizes_of_the_text_part_count() -> None:
    nested: dict[str, Any] = {"text_config": {"vocab_size": 5000}}
    assert Roles(nested).of("x.y.weight", (5000, 64)).kind == "embedding"


def test_a_registered_architecture_declares_its_roles() -> None:
    config = parse(LLAMA | {"vocab_size": 64})  # as many as there are columns: shapes tell nothing here
    roles = Roles(LLAMA, declared_roles(config))
    kinds = {name: roles.of(name, shape).kind for name, shape in config.tensors().items()}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "head"
    assert {kind for name, kind in kinds.items() if "_proj" in name} == {"linear"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"other"}
    assert roles.of("mtp.fc.weight", (64, 64)).reason == "not a part of the decoder that runs"
    tied = declared_roles(parse(LLAMA | {"tie_word_embeddings": True}))
    assert tied["model.embed_tokens.weight"].reason == "embedding, and output head"


def test_the_summary_names_groups_reasons_and_shares() -> None:
    def tensors(experts: int) -> list[Kept]:
        packed = [Kept("layers.0.q.weight", 900, ""), Kept("layers.1.q.weight", 900, "")]
        kept = [Kept(f"layers.{i}.mlp.experts", experts, "fused experts") for i in range(2)]
        return [*packed, *kept, Kept("embed.weight", 20, "embedding"), *_VECTORS]

    assert kept_lines(tensors(20)) == [
        "kept    2.1%  layers.*.mlp.experts: fused experts (2 tensors, 40 weights)",
        "kept    1.1%  embed.weight: embedding (1 tensor, 20 weights)",
        "kept    0.5%  norms, biases and other vectors (2 tensors, 10 weights)",
    ]
    loud = kept_lines(tensors(200))
    assert loud[0] == "NOTE: 19.3% of the weights stay unpacked (430 of 2,230), for these reasons:"
    assert len(loud) == 4
    assert kept_lines([]) == []


_VECTORS = [Kept(f"{name}.weight", 5, "norms, biases and other vectors") for name in ("a", "b")]
