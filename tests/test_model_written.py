"""What a loaded model writes: golden tokens, any number of threads, models beside each other, its own sampling."""

import gc
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress import load
from bincompress.compression.recipe import Recipe, load_recipe
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import default_sampling, load_decoder
from bincompress.inference.sampling import Sampling
from bincompress.model.errors import ConfigError, SamplingError
from bincompress.model.packed_linear import ActivationSettings
from tests.conftest import DEMO_MODEL
from tests.packed_models import stored


def test_what_the_packed_demo_model_says(tmp_path: Path) -> None:
    """Literal tokens of 32 greedy steps: through decoded float32 weights and through 8-bit activations."""
    import bincompress

    folder = Path(bincompress.__file__).parent / "demo_model"
    store = stored(folder, tmp_path / "store", load_recipe(None, {"groups": 8, "block": 64, "embeddings": "8bit"}))
    model = load(store, threads=1, activation_bits=16)
    ids = model.tokenizer.encode("The scheduler")
    found = {}
    for bits in (16, 8):
        decoder = load(store, threads=1, activation_bits=bits).decoder
        cache, tokens, last = decoder.new_cache(64), [], list(ids)
        for _ in range(32):
            row = decoder.next_logits(last, cache)
            top = np.sort(row)[-2:]
            last = [int(row.argmax())]
            tokens.append(last[0])
            # Where two tokens are nearly equal, rounding may choose: the golden run has no such place.
            assert bits == 8 or top[1] - top[0] > 0.01
        found[bits] = tokens
    assert found[16] == GOLDEN
    agreeing = next((i for i, (a, b) in enumerate(zip(found[16], found[8], strict=True)) if a != b), 32)
    assert agreeing >= 8


GOLDEN = [200, 200, 510, 622, 1571, 344, 259, 308, 261, 622, 1571, 613, 69, 1039, 266, 15]
GOLDEN += [222, 831, 308, 261, 622, 1571, 613, 69, 1039, 266, 200, 2474, 308, 2658, 372, 261]


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stored(DEMO_MODEL, tmp_path_factory.mktemp("demo") / "store", load_recipe(None, {}))


def written(model: Model, prompt: str, sampling: Sampling) -> str:
    return "".join(model.stream(prompt, GenerationSettings(16, sampling)))


def test_a_seed_writes_the_same_text_with_any_number_of_threads(demo_store: str) -> None:
    sampling = Sampling(temperature=0.9, seed=5)
    texts = [written(load(demo_store, threads=threads), "The scheduler", sampling) for threads in (1, 2, 3, 7)]
    assert texts == texts[:1] * 4


def test_two_loaded_models_write_beside_each_other_what_each_writes_alone(demo_store: str) -> None:
    models, prompts = [load(demo_store, threads=2) for _ in range(2)], ("The kernel", "In Python,")
    alone = [written(model, prompt, Sampling(temperature=0.0)) for model, prompt in zip(models, prompts, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            begin = threading.Barrier(2)

            def beside(model: Model, prompt: str, begin: threading.Barrier = begin) -> str:
                begin.wait(60)
                return written(model, prompt, Sampling(temperature=0.0))

            assert list(pool.map(beside, models, prompts)) == alone


def test_a_dropped_model_leaves_neither_memory_nor_threads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An arena of its own: in the process's last one, arrays of earlier tests may still be in use.
    monkeypatch.setattr("cpu_kernels.matmul.aligned_memory._last", None)
    store = stored(tiny_model, tmp_path / "store", Recipe())
    before = set(threading.enumerate())
    loaded = load_decoder(store, 3, ActivationSettings(8))
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    stream = weakref.ref(loaded.decoder.layers[0].out.matrix.stream.base)  # type: ignore[attr-defined]
    assert stream() is not None
    del loaded
    gc.collect()
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert stream() is None


@pytest.mark.parametrize(
    ("content", "temperature", "top_p"),
    [
        ({}, 0.0, 1.0),
        ({"do_sample": None, "temperature": 0.8, "top_p": 0.5}, 0.0, 0.5),
        ({"do_sample": True, "temperature": None, "top_k": -1}, 1.0, 1.0),
        ({"do_sample": True, "top_k": 20.0, "top_p": 0.0}, 1.0, 0.0),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.95}, 0.8, 0.95),
        ({"do_sample": False}, 0.0, 1.0),
    ],
)
def test_sampling_comes_from_the_models_own_settings(content: dict[str, Any], temperature: float, top_p: float) -> None:
    sampling = default_sampling({"generation_config.json": json.dumps(content).encode()})
    assert (sampling.temperature, sampling.top_p) == (temperature, top_p)
    with pytest.raises(ConfigError, match="temperature: expected a number, found 'hot'"):
        default_sampling({"generation_config.json": b'{"temperature": "hot"}'})


def test_an_option_comes_before_the_file_and_errors_name_the_file() -> None:
    def of(content: dict[str, Any], **given: Any) -> Sampling:
        return default_sampling({"generation_config.json": json.dumps(content).encode()}, given)

    assert of({"do_sample": False, "top_k": 7, "repetition_penalty": 1.5}) == Sampling(0.0, 7, repetition_penalty=1.5)
    assert of({"top_k": 7}, temperature=0.5) == Sampling(0.5, 7)
    assert of({"do_sample": True, "top_k": -5, "top_p": "x"}, top_k=0, top_p=0.9) == Sampling(top_p=0.9)
    for content in ({"top_k": -5}, {"top_k": 2.5}, {"top_p": 1.5}, {"do_sample": 1}, {"min_p": True}, {"top_k": 1e400}):
        with pytest.raises(ConfigError, match=rf"^generation_config\.json: {next(iter(content))}: expected "):
            of(content)
    with pytest.raises(SamplingError, match=r"^top_k: expected"):
        of({}, top_k=-3)
