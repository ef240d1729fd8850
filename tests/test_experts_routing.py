"""Mixtures of experts: which experts are chosen, and do tokens one by one give what they give together?"""

from pathlib import Path

import numpy as np
import pytest

from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.store import open_store
from cpu_kernels.decoder.routing import choose_experts, mix_experts
from cpu_kernels.reference.routing import choose_experts as choose_experts_plainly
from cpu_kernels.reference.routing import mix_experts as mix_experts_plainly
from tests.conftest import Run
from tests.expert_models import KINDS
from tests.test_declarations import WORDS, write


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
