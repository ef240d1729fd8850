"""Small checkpoints and settings that many tests share."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings

import bincompress
from bincompress import cli
from bincompress.compression.runner import Processes
from bincompress.methods import METHODS, make_settings
from bincompress.process.machine import usable_cpus
from bincompress.tensors.weight import Weight
from tests.fake_hub import FakeHub
from tests.forked import Forked
from tests.served import served

if TYPE_CHECKING:
    import openai

    from tests.serving import Running

settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")

# Trained models and texts that are not part of the repository. Tests of them carry `pytest.mark.needs_shared`.
SHARED = Path(__file__).resolve().parents[2] / "shared"
DEMO_MODEL = Path(bincompress.__file__).parent / "demo_model"

# The files that take longest, which therefore begin first: else one process is left with one of them at the end.
_LONGEST = (
    "test_ray", "test_products", "test_numba_private", "test_calibrate", "test_sequence", "test_compiler",
    "test_model_transformers", "test_distill_parts", "test_fuzz", "test_faults", "test_api", "test_pack", "test_train",
)  # fmt: skip


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a process for each core and one more, as the tests of clusters mostly wait; they are slow."""
    return usable_cpus() + (0 if config.option.markexpr == "not slow" else 1)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the suite's marks."""
    config.addinivalue_line("markers", f"needs_shared: reads trained models or texts in {SHARED}")
    config.addinivalue_line("markers", "slow: takes seconds (a cluster, a server, PyTorch, many kernels to compile)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without a test that is asked for: their imports alone take seconds, in each process."""
    wanted = config.option.markexpr
    if wanted not in ("not slow", "needs_shared") or not collection_path.name.startswith("test_"):
        return None
    content = collection_path.read_bytes()
    if wanted == "needs_shared":
        return b"mark.needs_shared" not in content or None
    return re.search(rb"^pytestmark = \[?pytest\.mark\.slow\b", content, re.MULTILINE) is not None or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files for the processes that take the next one each, and skip what needs folders that are not here."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))
    if not SHARED.is_dir():
        missing = pytest.mark.skip(reason=f"needs trained models and texts in {SHARED}, which is not there")
        for item in items:
            if item.get_closest_marker("needs_shared"):
                item.add_marker(missing)


DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}

# Every method and unit, for laws that hold for all: the oracle of most tests is the NumPy formula.
EVERY_METHOD = [
    make_settings("xnor", block=128),
    make_settings("xnor", block="row"),
    make_settings("xnor", block="matrix"),
    make_settings("dbllm", block=64),
    make_settings("dbllm", block="row"),
    make_settings("uniform", bits=4),
    make_settings("uniform", bits=8, block="row"),
    make_settings("wgm"),
    make_settings("wgm", block=64),
    make_settings("wgm", block=256),
    make_settings("wgm", block="row"),
    make_settings("wgm", block="matrix"),
    make_settings("wgm", lam=0.3, lam_normalized=True),
    make_settings("wgm", groups=1, block=64),
    make_settings("wgm", groups=3, block=64),
    make_settings("wgm", groups=8, block="row"),
    make_settings("wgm", groups=5, block="matrix"),
    make_settings("wgm", groups=8, block="matrix", lam=0.1, lam_normalized=True),
    make_settings("wgm", groups=4, block=128, solver="greedy"),
    make_settings("wgm", groups=4, block="matrix", solver="greedy"),
    make_settings("wgm", groups=4, block=64, solver="windowed", window=4),
    make_settings("wgm", groups=8, block="matrix", solver="windowed", window=8),
]

# As a refusal names them: these, and what a contributor has added.
KNOWN_METHODS = ", ".join(
    sorted(
        {"billm", "dbellquant", "dbllm", "keep", "lossless", "lowrank", "uniform", "wgm", "xnor"}
        | {method.name for method in METHODS}
    )
)


def as_weight(values: Any, dtype: str) -> Weight:
    """Return values rounded to a checkpoint dtype, as bit patterns."""
    rounded = np.ascontiguousarray(np.asarray(values, np.float32).astype(DTYPES[dtype]))
    return Weight(rounded.view(np.uint32 if dtype == "F32" else np.uint16), dtype)


def tiny_tensors(layers: int = 2, hidden: int = 64, inner: int = 160, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the tensors of a tiny Llama, bfloat16."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (96, hidden), "lm_head.weight": (96, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    return {
        name: (random.standard_normal(shape) * 0.05 + (len(shape) == 1)).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }


def tiny_config(layers: int = 2, hidden: int = 64, inner: int = 160) -> dict[str, Any]:
    """Return the config.json of `tiny_tensors`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden // 4, "num_hidden_layers": layers,
        "vocab_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def tiny_tokenizer(vocab: int) -> dict[str, Any]:
    """Return a tokenizer of words t0, t1, ..., as tokenizer.json."""
    words = {"type": "WordLevel", "vocab": {f"t{token}": token for token in range(vocab)}, "unk_token": "t0"}
    parts = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    rest: dict[str, Any] = dict.fromkeys(parts)
    return {"version": "1.0", **rest, "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}


def write_model(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], shards: int = 1) -> Path:
    """Write a checkpoint folder: one file, or shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(int(config.get("vocab_size", 1)))))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose weights are large enough to predict something, with a tokenizer of single letters."""
    import tokenizers

    scaled = {name: (v * (8 if v.ndim == 2 else 1)).astype(v.dtype) for name, v in tiny_tensors().items()}
    folder = write_model(tmp_path_factory.mktemp("letters") / "model", scaled, tiny_config())
    letters = {chr(33 + i): i for i in range(94)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="!"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def letters_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 random letters, to train `letters_model` on."""
    file = tmp_path_factory.mktemp("letters") / "text.txt"
    file.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 900))))
    return file


@pytest.fixture
def one_torch_thread() -> None:
    """PyTorch with one thread, as products of small matrices are slower with more."""
    import torch

    torch.set_num_threads(1)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, output and errors.

    Without the line that says that kernels are compiled: only the first test of a machine would have it.
    """

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bincompress", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines(keepends=True) if not line.startswith("compiling kernels")]
        return int(str(code or 0)), captured.out, "".join(errors)

    return call


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two worker processes for all tests that need no new ones: each takes a second to begin."""
    with Processes(2) as made:
        yield made


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Runs the command line, or some code, in a process of its own, where that is the point of a test."""
    with Forked() as made:
        yield made


RunWithHub = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_with_hub(forked: Forked, tmp_path: Path) -> RunWithHub:
    """Runs the command line with the Hub at a port of this machine and a cache of its own."""

    def run(port: int, *arguments: object, code: str = "", **more: str) -> "subprocess.CompletedProcess[str]":
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        return forked(*arguments, code=code, environment=environment | more)

    return run


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[FakeHub]:
    """A server that answers as the Hub with `tiny_model`."""
    with served(FakeHub(tiny_model)) as made:
        yield made


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in two shards."""
    return write_model(tmp_path / "model", tiny_tensors(), tiny_config(), shards=2)


@pytest.fixture(scope="session")
def tiny_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its store and its archive, which tests copy before they change them."""
    folder = tmp_path_factory.mktemp("stores")
    model = write_model(folder / "model", tiny_tensors(), tiny_config())
    for name in ("store", "archive"):
        assert bincompress.compress(model, folder / name, archive=name == "archive").complete
    return folder


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its store, and the store as one file, which tests copy before they change them."""
    folder = tmp_path_factory.mktemp("pack")
    model = write_model(folder / "model", tiny_tensors(), tiny_config())
    assert bincompress.compress(model, folder / "store", embeddings="4bit").complete
    for log in (folder / "store" / "log").glob("*/zarr.json"):  # times differ from run to run
        log.unlink()
    bincompress.pack(folder / "store", folder / "model.bincompress.zip")
    return folder


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the demo model whose embeddings are not packed, in four groups and blocks of 64 columns."""
    store = tmp_path_factory.mktemp("demo") / "store"
    assert bincompress.compress(DEMO_MODEL, store, groups=4, block=64).complete
    return store


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the demo model, all of it packed: embeddings in eight bits, the rest as in `demo_store`."""
    store = tmp_path_factory.mktemp("demo") / "store"
    assert bincompress.compress(DEMO_MODEL, store, groups=4, block=64, embeddings="8bit").complete
    return store


@pytest.fixture(scope="session")
def chat_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the demo model with a chat template."""
    from tests.chat_stores import make_store

    return make_store(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(chat_store: Path) -> "Iterator[Running]":
    """A server of `chat_store`, which runs in a thread of this process."""
    from bincompress.inference.load import load
    from tests.serving import running

    with running(chat_store, load(str(chat_store), threads=1)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: "Running") -> "Iterator[openai.OpenAI]":
    """OpenAI's own client of `server`."""
    from tests.serving import openai_client

    with openai_client(server) as made:
        yield made


@pytest.fixture
def packed(tiny_pack: Path, tmp_path: Path) -> Path:
    """A copy of the one file of `tiny_pack`."""
    return Path(shutil.copy(tiny_pack / "model.bincompress.zip", tmp_path / "m.zip"))


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Returns a function that reads a store's files, without the logs, which hold times."""

    def read(store: Path) -> dict[str, bytes]:
        files = (path for path in store.rglob("*") if path.is_file())
        found = {str(path.relative_to(store)): path.read_bytes() for path in files}
        return {name: content for name, content in found.items() if not name.startswith("log/")}

    return read
