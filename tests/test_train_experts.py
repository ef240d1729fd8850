"""Are the matrices of experts trained, each on the tokens that chose it, and is it what the engine runs?"""

from pathlib import Path

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation import memory
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Student, teacher_weights
from bincompress.distillation.settings import DistillSettings, LayerSettings
from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from tests.test_declarations import WORDS, write

pytestmark = pytest.mark.slow  # PyTorch

CPU = torch.device("cpu")
KINDS = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"]
LAYERS = LayerSettings(windows=12, context=16, passes=4, batch=4, lr_planes=0.02)
MODEL = DistillSettings(
    steps=4, batch=4, context=16, lr=0.01, lr_planes=0.02, planes=True, evaluate_every=2, validation_share=0.2
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unquantized_model_is_the_engines(kind: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", kind)
    checkpoint, ids = open_checkpoint(model), np.random.default_rng(1).integers(0, 96, 40)
    config = parse(checkpoint.config)
    weights, decoder = teacher_weights(checkpoint, config, CPU, torch.float32), TorchDecoder(config, CPU, 40)
    with torch.no_grad():
        found = decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()
    engine = load_checkpoint(model)
    expected = np.asarray(engine.logits(ids, engine.new_cache(40)))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_experts_learn_and_run(kind: str, tmp_path: Path) -> None:
    model, out = write(tmp_path / "model", kind), tmp_path / "out"
    (tmp_path / "text.txt").write_text(WORDS)
    found = api.train(model, str(out), tmp_path / "text.txt", block=64, layers=LAYERS, model=MODEL, device="cpu")
    start, end = (sum(getattr(report, key) for report in found.layers) for key in ("held_out_start", "held_out"))
    assert end < 0.97 * start
    assert found.model["best"] <= found.model["start"]
    report = api.inspect(out)["tensors"]
    names = parse(open_checkpoint(model).config).names
    router = names.of_layer(1, f"{names.router}.weight")
    assert report[router]["method"] == "keep"
    opened, config, ids = open_store(str(out)), parse(open_checkpoint(model).config), np.arange(2, 50)
    weights = {k: v.detach() for k, v in Student.of_store(opened, config, CPU, torch.float32, False).weights().items()}
    decoder = TorchDecoder(config, CPU, 48)
    with torch.no_grad():
        expected = decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()
    engine = load_decoder(str(out), 1, ActivationSettings(16)).decoder
    logits = np.asarray(engine.logits(ids, engine.new_cache(48)))
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
    api.compress(model, tmp_path / "start", block=64)
    changed = [
        name
        for name in opened.tensors()
        if ".experts." in name
        and opened.tensors()[name] == "packed"
        and opened.complete_attributes(name)["hashes"]
        != open_store(str(tmp_path / "start")).complete_attributes(name)["hashes"]
    ]
    assert len(changed) > 5


def test_the_memory_of_a_layer_counts_all_experts() -> None:
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
    }  # fmt: skip
    found = memory.of_layers(parse(raw), LayerSettings(windows=8, dtype="bf16"))
    weights = 128 * 3 * 768 * 2048  # of one layer's experts
    assert 32 * weights < found < 38 * weights
