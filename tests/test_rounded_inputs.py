"""Do matrices that are trained read what the engine will give them, rounded to a few bits?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Student
from bincompress.distillation.rounded_inputs import rounded, rounded_inputs
from bincompress.distillation.settings import DistillError, DistillSettings, LayerSettings
from bincompress.inference.load import load_decoder
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from cpu_kernels.matmul.activations import LEVELS
from cpu_kernels.reference.products import quantize
from tests.conftest import Run

pytestmark = pytest.mark.slow  # PyTorch

CPU = torch.device("cpu")
TEXT = "".join(map(chr, np.random.default_rng(3).integers(33, 127, 900)))


def calibration(method: str, folder: Path) -> dict[str, Any]:
    """Return what a method needs to be calibrated on a text."""
    if method != "dbellquant":
        return {}
    (folder / "text.txt").write_text(TEXT)
    return {"sequential": folder / "text.txt", "samples": 16, "context": 32}


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("cols", [7, 128, 300])
def test_inputs_are_rounded_as_the_kernels_round_them(bits: int, cols: int) -> None:
    x = np.random.default_rng(cols).standard_normal((5, cols)).astype(np.float32)
    x[1] *= 1e4
    x[2] = 0.0
    made = quantize(x, bits, "segment")
    expected = (made.q * np.repeat(made.scale, 128, 1))[:, :cols]
    np.testing.assert_allclose(rounded(torch.from_numpy(x), LEVELS[bits]).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("method", ["xnor", "dbellquant"])  # the second scales its inputs
def test_the_student_sees_what_the_engine_computes(method: str, bits: int, letters_model: Path, tmp_path: Path) -> None:
    api.compress(letters_model, tmp_path / "store", method=method, embeddings="8bit", **calibration(method, tmp_path))
    store, config = open_store(str(tmp_path / "store")), parse(open_checkpoint(letters_model).config)
    ids = np.random.default_rng(0).integers(0, 94, 48)
    found = Student.of_store(store, config, CPU, torch.float32, False).weights()
    weights = {name: values.detach() for name, values in found.items()}
    exact = TorchDecoder(config, CPU, 48)

    def logits(decoder: TorchDecoder) -> np.ndarray:
        with torch.no_grad():
            return decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()

    inputs = rounded_inputs(store, list(config.tensors()), bits, CPU)
    engine = load_decoder(str(tmp_path / "store"), 1, ActivationSettings(bits)).decoder
    wanted = np.asarray(engine.logits(ids, engine.new_cache(48)))
    largest = np.abs(wanted).max()
    # Sums in another order move single inputs over the edge between two steps.
    assert np.abs(logits(exact.rounding(inputs)) - wanted).mean() < 2e-3 * largest
    assert np.abs(logits(exact) - wanted).mean() > 3 * np.abs(logits(exact.rounding(inputs)) - wanted).mean()


def test_the_gradient_is_as_if_nothing_were_rounded(letters_model: Path, tmp_path: Path) -> None:
    api.compress(letters_model, tmp_path / "store", groups=2, block=64)
    name = "model.layers.0.self_attn.q_proj.weight"
    inputs = rounded_inputs(open_store(str(tmp_path / "store")), [name], 6, CPU)
    assert inputs is not None
    x = torch.randn(3, 96, requires_grad=True)
    found = inputs(name, x)
    assert not torch.equal(found, x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    assert inputs("model.norm.weight", x) is x  # not packed


@pytest.mark.parametrize("by", ["layer", "model"])
def test_a_store_trained_with_rounded_inputs_says_so(by: str, letters_model: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--windows", "8", "--layer-context", "16", "--passes", "1", "--steps", "4", "--batch", "4",
               "--context", "16", "--lr", "0.01", "--lr-planes", "0.02", "--evaluate-every", "2",
               "--dtype", "float32"]  # fmt: skip
    at = [letters_model, tmp_path / "out", "--text", tmp_path / "text.txt", "--by", by]
    code, _, errors = run("train", *at, *options, "--activation-bits", "6")
    assert code == 0, errors
    attributes = open_store(str(tmp_path / "out")).attributes
    settings = attributes["training"]["layers"]["settings"] if by == "layer" else attributes["distillation"]["settings"]
    assert settings["activation_bits"] == 6


@pytest.mark.parametrize("settings", [LayerSettings, DistillSettings])
def test_other_bits_are_refused(settings: type[LayerSettings] | type[DistillSettings]) -> None:
    with pytest.raises(DistillError, match="--activation-bits 4: expected 6, 8 or 16"):
        settings(activation_bits=4)  # type: ignore[arg-type]
