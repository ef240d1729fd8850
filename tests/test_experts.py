"""Mixtures of experts: how checkpoints store them, what is refused by name, and what the summaries show."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.errors import CheckpointError
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.sources.experts import experts_of
from bincompress.store.store import open_store
from tests.conftest import Run, write_model
from tests.expert_models import KINDS, tensors_of
from tests.test_declarations import config_of, write

PARTS = {
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
}


def fused(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's tensors with its experts as transformers 5 stores them, and its config."""
    config = parse(config_of(kind))
    tensors, (block, *parts) = tensors_of(folder), PARTS[kind]
    for layer in range(config.layers):
        experts = config.experts_of(layer)
        if experts is None:
            continue
        prefix = f"model.layers.{layer}."
        gate, up, down = (
            [tensors.pop(f"{prefix}{block}.experts.{expert}.{part}.weight") for expert in range(experts.count)]
            for part in parts
        )
        pairs = zip(gate, up, strict=True)
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        tensors[f"{prefix}mlp.experts.down_proj"] = np.stack(down)
        tensors[f"{prefix}mlp.gate.weight"] = tensors.pop(f"{prefix}{block}.gate.weight")
    return tensors, config_of(kind)


def write_fused(folder: Path, kind: str) -> tuple[Path, Path]:
    """Write the same model with a matrix an expert, and with all experts in one tensor."""
    plain = write(folder / "plain", kind)
    return plain, write_model(folder / "fused", *fused(plain, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_one_tensor_are_read_as_their_matrices(kind: str, tmp_path: Path) -> None:
    plain, whole = write_fused(tmp_path, kind)
    ids = np.random.default_rng(1).integers(0, 96, 20)
    one, other = (load_checkpoint(folder) for folder in (plain, whole))
    assert np.array_equal(one.logits(ids, one.new_cache(20)), other.logits(ids, other.new_cache(20)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_form_of_the_source(kind: str, tmp_path: Path, run: Run) -> None:
    _, whole = write_fused(tmp_path, kind)
    store, back = tmp_path / "store", tmp_path / "back"
    keep = ("--keep", "model.layers.1.mlp.experts.1.*")  # kept and packed parts of one tensor
    assert run("compress", whole, store, "--groups", 8, "--block", 64, *keep)[0] == 0
    assert run("verify", store)[0] == 0
    assert run("export", store, back)[0] == 0
    before, after = tensors_of(whole), tensors_of(back)
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        was, now = before[name].astype(np.float32), after[name].astype(np.float32)
        assert np.array_equal(was[1], now[1])
        for expert in (0, 2):
            error = np.linalg.norm(was[expert] - now[expert]) / np.linalg.norm(was[expert])
            assert 0 < error < 0.2


def test_a_store_of_experts_as_matrices_has_no_word_of_3d_tensors(tmp_path: Path, run: Run) -> None:
    model = write(tmp_path / "model", KINDS[0])
    assert run("compress", model, tmp_path / "store")[0] == 0
    assert "fused" not in open_store(str(tmp_path / "store")).attributes


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "more chosen than there are": (
        KINDS[0], {"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than the 5 experts that num_experts gives"
    ),
    "none chosen": (KINDS[0], {"num_experts_per_tok": 0}, "num_experts_per_tok: expected 1 to"),
    "a fraction chosen": (KINDS[0], {"num_experts_per_tok": 1.5}, "num_experts_per_tok: expected a whole number"),
    "two numbers of experts": (
        KINDS[0], {"num_local_experts": 7}, "num_experts 5 contradicts num_local_experts 7"
    ),
    "too many": (KINDS[1], {"num_local_experts": 1 << 20}, "num_local_experts: expected at most 4096"),
    "too many in all": (KINDS[1], {"num_local_experts": 4096, "num_hidden_layers": 17}, "at most 65536 experts"),
    "no expert": (KINDS[1], {"num_local_experts": 0}, "num_local_experts: expected 1 to"),
    "a negative number": (KINDS[1], {"num_local_experts": -2}, "num_local_experts: expected a whole number"),
    "layers that are no list": (KINDS[0], {"mlp_only_layers": "0"}, "mlp_only_layers: expected a list"),
    "layers that are no numbers": (KINDS[0], {"mlp_only_layers": [True]}, "mlp_only_layers: expected a list"),
    "no step": (KINDS[0], {"decoder_sparse_step": 0}, "decoder_sparse_step: expected 1 to"),
    "a word for a flag": (KINDS[0], {"norm_topk_prob": "yes"}, "norm_topk_prob: expected true or false"),
    "no inner rows": (KINDS[0], {"moe_intermediate_size": 0}, "moe_intermediate_size: expected 1 to"),
    "shared experts": (KINDS[0], {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
    "experts of a dense architecture": ("Qwen3ForCausalLM", {"num_experts": 8}, "num_experts = 8 is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_config_json_cannot_mean_is_refused_by_name(case: str) -> None:
    kind, change, message = CHANGES[case]
    with pytest.raises((ConfigError, UnsupportedModelError), match=message) as error:
        parse(config_of(kind) | change)
    assert "\n" not in str(error.value)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a missing expert": (
        lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
        "model.layers.1.mlp.experts.3.up_proj.weight is missing; config.json asks for it",
    ),
    "an expert of another shape": (
        lambda t: t.update({"model.layers.1.mlp.experts.2.down_proj.weight": np.zeros((64, 34), np.float32)}),
        r"model.layers.1.mlp.experts.2.down_proj.weight: shape \[64, 34\] contradicts config.json, which gives",
    ),
    "a router of another size": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight": np.zeros((4, 64), np.float32)}),
        r"model.layers.1.mlp.gate.weight: shape \[4, 64\] contradicts config.json, which gives \[5, 64\]",
    ),
    "a 3-D expert": (
        lambda t: t.update({"model.layers.1.mlp.experts.2.down_proj.weight": np.zeros((1, 64, 35), np.float32)}),
        r"model.layers.1.mlp.experts.2.down_proj.weight: shape \[1, 64, 35\] contradicts config.json",
    ),
    "no router": (
        lambda t: t.pop("model.layers.1.mlp.gate.weight"), "model.layers.1.mlp.gate.weight is missing"
    ),
    "a matrix twice": (
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": np.zeros((5, 64, 35), np.float32)}),
        "down_proj.weight: stored both as a matrix and as a part of a 3-D tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_experts_that_config_json_does_not_give_are_refused_by_name(case: str, tmp_path: Path, run: Run) -> None:
    tensors, (damage, message) = tensors_of(write(tmp_path / "whole", KINDS[0])), DAMAGE[case]
    damage(tensors)
    model = write_model(tmp_path / "model", tensors, config_of(KINDS[0]))
    code, _, errors = run("compress", model, tmp_path / "store")
    assert code == 2
    assert re.search(message, errors), errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


SHAPES: dict[str, tuple[str, Any, str]] = {
    "exchanged axes": ("gate_up_proj", lambda t: t.transpose(0, 2, 1), "rows and columns are exchanged"),
    "exchanged axes of down": ("down_proj", lambda t: t.transpose(0, 2, 1), "rows and columns are exchanged"),
    "experts last": ("down_proj", lambda t: t.transpose(1, 2, 0), r"shape \[64, 35, 5\] contradicts config.json"),
    "an expert too many": ("down_proj", lambda t: np.concatenate([t, t[:1]]), r"shape \[6, 64, 35\] contradicts"),
    "an odd number of rows": ("gate_up_proj", lambda t: t[:, 1:], r"shape \[5, 69, 64\] contradicts config.json"),
    "no rows": ("gate_up_proj", lambda t: t[:, :0], r"shape \[5, 0, 64\] contradicts config.json"),
    "two axes": ("down_proj", lambda t: t[0], "experts.0.down_proj.weight and 4 more tensors are missing"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_3d_tensors_of_other_axes_are_refused_by_name(case: str, tmp_path: Path, run: Run) -> None:
    part, change, message = SHAPES[case]
    tensors, config = fused(write(tmp_path / "plain", KINDS[0]), KINDS[0])
    name = f"model.layers.1.mlp.experts.{part}"
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    model = write_model(tmp_path / "model", tensors, config)
    code, _, errors = run("compress", model, tmp_path / "store")
    assert code == 2
    assert re.search(message, errors), errors
    assert len(errors.strip().splitlines()) == 1


def test_names_that_are_none_of_experts_are_put_together_of_nothing() -> None:
    """A store's attributes are untrusted."""
    config, prefix = {"model_type": "qwen3_moe"}, "model.layers.1.mlp.experts"
    names = [f"{prefix}.{expert}.{part}_proj.weight" for expert in (0, 1) for part in ("gate", "up", "down")]
    given = [3, None, "../x", f"{prefix}.gate_up_proj", "mlp.experts.down_proj", "model.layers.2.mlp.experts.down_proj"]
    assert experts_of(config, given, names) == {
        f"{prefix}.gate_up_proj": [f"{prefix}.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up")]
    }
    assert experts_of(config, given, names[:4]) == {}  # expert 1 has no up
    assert experts_of({"model_type": ["qwen3_moe"]}, given, names) == {}
    assert experts_of({}, given, names) == {}


def test_a_file_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    _, whole = write_fused(tmp_path, KINDS[1])
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="lie outside"):
        open_checkpoint(whole)


def test_inspect_has_a_line_for_all_experts_of_a_kind(tmp_path: Path, run: Run) -> None:
    model, store = write(tmp_path / "model", KINDS[0]), tmp_path / "store"
    run("compress", model, store, "--keep", "*experts.3.up_proj.weight")
    prefix = "model.layers.1.mlp.experts"
    output = run("inspect", store)[1]
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert f"{prefix}.2.down_proj.weight" not in lines
    found = json.loads(run("inspect", store, "--json")[1])["tensors"]
    errors = [found[f"{prefix}.{expert}.down_proj.weight"]["relative_error"] for expert in range(5)]
    assert lines[f"{prefix}.*.down_proj.weight"][1:7] == ["5", "x", "64", "x", "35", "wgm"]
    assert min(errors) < float(lines[f"{prefix}.*.down_proj.weight"][-3]) < max(errors)
    assert lines[f"{prefix}.*.up_proj.weight"][6:8] == ["keep,", "wgm"]
    assert "* stands for every expert of a layer" in output
    assert f"{prefix}.2.down_proj.weight" in run("inspect", store, "--experts")[1]
    assert "*" not in run("inspect", store, "--experts")[1]


def test_a_report_has_a_row_for_all_experts_of_a_kind(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    run("compress", write(tmp_path / "model", KINDS[1]), tmp_path / "store")
    assert run("report", tmp_path / "store", "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "block_sparse_moe.experts.*.w2.weight" in page
    assert "3 x 64 x 99" in page
