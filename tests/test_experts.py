"""Mixtures of experts: how they are stored, what is refused, who chooses, and what a calibration says of them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bincompress.calibration.collect import choose_samples
from bincompress.calibration.statistics import open_statistics
from bincompress.errors import CheckpointError
from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.experts import ExpertLayer
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.sources.experts import experts_of
from bincompress.store.store import open_store
from cpu_kernels.decoder.routing import choose_experts, mix_experts
from cpu_kernels.reference.routing import choose_experts as choose_experts_plainly
from cpu_kernels.reference.routing import mix_experts as mix_experts_plainly
from tests.conftest import Run, write_model
from tests.test_declarations import WORDS, config_of, write

KINDS = ("Qwen3MoeForCausalLM", "MixtralForCausalLM")
PARTS = {
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
}


def tensors_of(folder: Path) -> dict[str, Any]:
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in safetensors.numpy.load_file(path).items()
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


def test_routers_are_kept_as_they_are(tmp_path: Path, run: Run) -> None:
    model = write(tmp_path / "model", KINDS[1])
    code, output, _ = run("compress", model, tmp_path / "store")
    assert code == 0
    assert "2 of 2 layers have 3 experts each, 2 for each token; 18 of 18 matrices of experts are packed" in output
    assert "router of experts" in output
    name = "model.layers.1.block_sparse_moe.gate.weight"
    stored = open_store(str(tmp_path / "store")).read_plain(name)[0]
    assert np.array_equal(stored.bits, read_weight(open_checkpoint(model).tensors[name]).bits)


@pytest.mark.parametrize(("experts", "count"), [(1, 1), (3, 2), (8, 2), (60, 4), (128, 8), (300, 4)])
def test_the_largest_are_chosen(experts: int, count: int) -> None:
    logits = np.random.default_rng(experts).standard_normal((50, experts)).astype(np.float32) * 3
    for normalized in (0, 1):
        chosen, weights = np.zeros((50, count), np.int64), np.zeros((50, count), np.float32)
        choose_experts(logits, normalized, 0, 20, chosen, weights)
        choose_experts(logits, normalized, 20, 50, chosen, weights)
        expected, shares = choose_experts_plainly(logits, count, bool(normalized))
        assert np.array_equal(chosen, expected)
        assert np.abs(weights - shares).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "count"), [(4, 2), (8, 2), (60, 4), (64, 1), (128, 1), (128, 2), (128, 8), (9, 9)])
def test_equal_probabilities_are_chosen_as_torch_chooses(experts: int, count: int) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(experts + count)
    for levels in (1, 2, 3, 6):
        logits = random.integers(0, levels, (300, experts)).astype(np.float32)
        chosen, weights = np.empty((300, count), np.int64), np.empty((300, count), np.float32)
        choose_experts(logits, 0, 0, 300, chosen, weights)
        expected = torch.topk(torch.softmax(torch.from_numpy(logits), -1), count, -1).indices
        assert np.array_equal(chosen, np.sort(expected.numpy(), axis=1))


def test_a_router_that_is_not_finite_chooses_within_bounds() -> None:
    for value in (np.nan, np.inf, -np.inf):
        logits = np.full((4, 16), value, np.float32)
        logits[1:3, ::2] = np.arange(8)
        chosen, weights = np.full((4, 3), -1, np.int64), np.empty((4, 3), np.float32)
        choose_experts(logits, 1, 0, 4, chosen, weights)
        assert ((chosen >= 0) & (chosen < 16)).all()
        assert (np.diff(chosen, axis=1) > 0).all()


def test_what_experts_made_is_added_up() -> None:
    random = np.random.default_rng(2)
    made, weights = (random.standard_normal(shape).astype(np.float32) for shape in ((21, 13), (7, 3)))
    places, result = random.permutation(21).reshape(7, 3), np.full((7, 13), np.nan, np.float32)
    mix_experts(made, places, weights, 0, 4, result)
    mix_experts(made, places, weights, 4, 7, result)
    assert np.abs(result - mix_experts_plainly(made, places, weights)).max() < 1e-6


FORMS: dict[str, tuple[object, ...]] = {
    "planes": (),
    "one kept": ("--keep", "*experts.1.*"),
    "a gate kept": ("--keep", "*experts.2.w1.weight"),
    "other planes": ("--recipe", "RECIPE"),
    "listed": ("--keep-weights", "LIST"),
    "many terms": ("--groups", 64, "--block", "matrix"),
    "scaled": ("--method", "dbellquant", "--stats", "STATS"),
}
RECIPE = """
[[tensor]]
pattern = "*experts.0.*"
groups = 4
block = 64
"""


@pytest.mark.parametrize("form", FORMS)
def test_tokens_one_by_one_and_together_agree(form: str, tmp_path: Path, run: Run) -> None:
    model, store = write(tmp_path / "model", KINDS[1]), tmp_path / "store"
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "text").write_text(WORDS)
    (tmp_path / "list").write_text("model.layers.0.block_sparse_moe.experts.1.w2.weight 3 5\n")
    if form == "scaled":
        run("calibrate", model, tmp_path / "stats", "--text", tmp_path / "text", "--samples", 8, "--context", 40)
    places = {"RECIPE": tmp_path / "recipe.toml", "LIST": tmp_path / "list", "STATS": tmp_path / "stats"}
    options = [places.get(str(option), option) for option in FORMS[form]]
    assert run("compress", model, store, *options)[0] == 0
    ids = np.random.default_rng(8).integers(0, 96, 30)
    found = []
    for bits in (16, 8):
        for threads in (1, 3):
            decoder = load_decoder(str(store), threads, ActivationSettings(bits)).decoder
            cache = decoder.new_cache(30)
            together = decoder.logits(ids, decoder.new_cache(30))
            single = np.concatenate([decoder.logits(ids[i : i + 1], cache) for i in range(30)])
            assert np.median(np.abs(together - single).max(axis=1)) < 1e-4 * np.abs(together).max()
            layer = decoder.layers[0].experts
            assert layer is not None
            at_once = form in ("planes", "other planes") and bits == 8  # all experts in one call
            everything = np.arange(3)
            assert (layer._gate_ups.has(everything) and layer._downs.has(everything)) is at_once or form == "scaled"
            found.append(together)
            decoder.workers.close()
        assert np.array_equal(found[-2], found[-1])
    # Eight bits of activations move routers whose margins are small: half of the tokens keep their experts.
    assert np.median(np.abs(found[0] - found[2]).max(axis=1)) < 0.1 * np.abs(found[0]).max()


def unused_expert(folder: Path) -> Path:
    """Write a model whose router never chooses expert 4."""
    tensors = tensors_of(write(folder / "whole", KINDS[0]))
    router = tensors["model.layers.1.mlp.gate.weight"]
    # What the router reads is the token's vector, whose items are all positive: nothing else is added to it.
    router[4] = -1000 * np.abs(router[4])
    tensors["model.layers.0.mlp.down_proj.weight"] *= 0
    tensors["model.embed_tokens.weight"] = np.abs(tensors["model.embed_tokens.weight"])
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0
    return write_model(folder / "model", tensors, config_of(KINDS[0]))


def test_a_calibration_counts_the_tokens_of_each_expert(tmp_path: Path, run: Run) -> None:
    model, text, stats = unused_expert(tmp_path), tmp_path / "text", tmp_path / "stats"
    text.write_text(WORDS)
    code, output, _ = run("calibrate", model, stats, "--text", text, "--samples", 9, "--context", 40, "--json")
    assert code == 0
    counts = json.loads(output)["experts"]["1"]
    assert sum(counts) == 2 * 9 * 40
    assert counts[4] == 0
    found = open_statistics(str(stats))
    prefix = "model.layers.1.mlp.experts"
    assert [found.tokens(f"{prefix}.{expert}.down_proj.weight") for expert in range(5)] == counts
    assert found.read(f"{prefix}.4.gate_proj.weight").hessian.max() == 0
    assert found.read(f"{prefix}.0.gate_proj.weight").hessian.max() > 0
    output = run("calibrate", model, stats, "--text", text, "--samples", 9, "--context", 40)[1]
    assert "of 5 experts saw fewer tokens than the 64 columns of their inputs, 1 of them none at all" in output
    assert "4 (0)" in output


METHODS: dict[str, tuple[object, ...]] = {
    "wgm": ("--compensate",),
    "xnor": ("--method", "xnor", "--compensate", "--refine", 1),
    "billm": ("--method", "billm"),
    "dbellquant": ("--method", "dbellquant"),
    "spread bits": ("--compensate", "--target-bits", 3.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_rounded_without_compensation(method: str, tmp_path: Path, run: Run) -> None:
    model, text, stats = unused_expert(tmp_path), tmp_path / "text", tmp_path / "stats"
    text.write_text(WORDS)
    run("calibrate", model, stats, "--text", text, "--samples", 9, "--context", 40)
    code, output, errors = run("compress", model, tmp_path / "store", "--stats", stats, *METHODS[method])
    assert code == 0, errors + output
    assert "none at all" in output
    store = open_store(str(tmp_path / "store"))
    for part in ("gate_proj", "down_proj"):
        assert store.report(f"model.layers.1.mlp.experts.4.{part}.weight")["relative_error"] < 0.7


def test_statistics_of_an_expert_are_those_of_its_own_tokens(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, stats = write(tmp_path / "model", KINDS[0]), tmp_path / "text", tmp_path / "stats"
    text.write_text(WORDS)
    assert run("calibrate", model, stats, "--text", text, "--samples", 3, "--context", 24)[0] == 0
    decoder, checkpoint = load_checkpoint(model), open_checkpoint(model)
    seen: dict[int, list[Any]] = {}
    choose = ExpertLayer.choose

    def watched(self: ExpertLayer, x: Any) -> Any:
        chosen, weights = choose(self, x)
        for expert in range(5):
            seen.setdefault(expert, []).append(x[(chosen == expert).any(axis=1)])
        return chosen, weights

    monkeypatch.setattr(ExpertLayer, "choose", watched)
    for sample in choose_samples(checkpoint, WORDS, 3, 24):
        decoder.states(sample, decoder.new_cache(24))
    found = open_statistics(str(stats))
    for expert, inputs in seen.items():
        x = np.concatenate(inputs).astype(np.float64)
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert found.tokens(name) == len(x)
        expected = x.T @ x / len(x)
        assert np.abs(found.read(name).hessian - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--sequential", "TEXT", "--samples", 2, "--context", 16, "--compensate"),
            "--sequential does not know mix",
        ),
        (("--keep-weights", "auto"), "--keep-weights auto does not know mixtures of experts yet"),
    ],
)
def test_what_does_not_know_experts_says_so_before_the_work(
    options: tuple[object, ...], message: str, tmp_path: Path, run: Run
) -> None:
    model, text = write(tmp_path / "model", KINDS[0]), tmp_path / "text"
    text.write_text(WORDS)
    given = [text if option == "TEXT" else option for option in options]
    code, _, errors = run("compress", model, tmp_path / "store", *given)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "store").exists()


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
