"""Does the packed engine compute what the store says, in every form that a matrix can have?"""

from pathlib import Path

import numpy as np
import pytest

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import Override, Recipe
from bincompress.compression.run import compress
from bincompress.inference.load import load_decoder
from bincompress.methods import Settings
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.lowering import MOST_PLANES, lower
from bincompress.model.packed_linear import ActivationSettings, PackedEmbedding, StackedLinear
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.export import export
from bincompress.store.store import let_go, open_store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.prepacking import prepack_rows
from cpu_kernels.matmul.products import multiply
from cpu_kernels.reference import planes as reference
from tests.conftest import EVERY_METHOD
from tests.packed_models import EXACT, IDS, close, logits, packed_tensor, stored


def dequantized_logits(store: str, folder: Path) -> np.ndarray:
    """Logits of the dequantized weights in float32, by way of the exported checkpoint's float32 twin."""
    import safetensors.numpy

    opened = open_store(store)
    tensors = {}
    for name, kind in opened.tensors().items():
        if kind == "packed":
            tensors[name] = dequantize(opened.read_packed(name))
        else:
            weight, shape = opened.read_plain(name)
            tensors[name] = np.array(weight.float32().reshape(shape))
    folder.mkdir()
    (folder / "config.json").write_bytes(opened.read_assets()["config.json"])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return logits(load_checkpoint(folder))


@pytest.mark.parametrize("settings", EVERY_METHOD, ids=lambda s: "-".join(map(str, s.record().values())))
def test_any_method_runs(settings: Settings, tiny_model: Path, tmp_path: Path) -> None:
    recipe = Recipe(settings.method, tuple(settings.all_values().items()), embeddings="8bit")
    store = stored(tiny_model, tmp_path / "store", recipe)
    expected = dequantized_logits(store, tmp_path / "float")
    assert close(logits(load_decoder(store, 1, EXACT).decoder), expected) < 1e-5
    for per in ("segment", "token"):
        loaded = load_decoder(store, 2, ActivationSettings(8, per))  # type: ignore[arg-type]
        assert close(logits(loaded.decoder), expected) < 0.03
    assert close(logits(load_decoder(store, 1, ActivationSettings(6)).decoder), expected) < 0.15


@pytest.mark.slow
def test_every_kernel_gives_the_same_logits(tiny_model: Path, tmp_path: Path) -> None:
    from cpu_kernels.matmul.prepacking import kernels

    store = stored(tiny_model, tmp_path / "store", Recipe(embeddings="4bit"))
    settings = ActivationSettings(8)
    first, *others = (logits(load_decoder(store, 1, settings, kernel).decoder) for kernel in kernels())
    for other in others:
        assert close(other, first) < 1e-5


def test_forms_may_differ_within_one_layer(tiny_model: Path, tmp_path: Path) -> None:
    """q in planes, k in many groups, v kept as it is: one product of three forms, and each says its path."""
    overrides = (
        Override("*.k_proj.weight", (("groups", 32), ("block", "matrix"))),
        Override("*.v_proj.weight", (("method", "keep"),)),
        Override("*.up_proj.weight", (("block", 64),)),
    )
    store = stored(tiny_model, tmp_path / "store", Recipe(overrides=overrides))
    loaded = load_decoder(store, 2, ActivationSettings(8))
    assert isinstance(loaded.decoder.layers[0].qkv, StackedLinear)
    prefix = "model.layers.1.self_attn."
    assert loaded.paths[prefix + "k_proj.weight"] == "decoded float32"
    assert loaded.paths[prefix + "v_proj.weight"] == "kept bfloat16"
    assert loaded.paths[prefix + "q_proj.weight"].startswith(("lookup", "popcount"))
    assert close(logits(loaded.decoder), dequantized_logits(store, tmp_path / "float")) < 0.03
    cache = loaded.decoder.new_cache(len(IDS))
    one_by_one = np.stack([loaded.decoder.next_logits([token], cache) for token in IDS])
    assert close(one_by_one, logits(loaded.decoder)) < 1e-5


def resident(file: str) -> list[int]:
    """Return how many kilobytes of each map of a file are in this process's memory."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(file)
        elif ours and line.startswith("Rss:"):
            found.append(int(line.split()[1]))
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not tell what is in memory")
def test_of_a_packed_embedding_only_what_is_used_stays_in_memory(tiny_model: Path, tmp_path: Path) -> None:
    store = stored(tiny_model, tmp_path / "store", Recipe(embeddings="4bit"))
    planes = f"{store}/tensors/model.embed_tokens.weight/planes/c/0/0/0"
    packed = open_store(store).read_packed("model.embed_tokens.weight", check_hashes=True)
    assert any(resident(planes))
    before = packed.planes.copy()
    let_go(packed.planes)
    assert resident(planes) == [0]
    np.testing.assert_array_equal(packed.planes, before)
    let_go(before)  # not mapped: stays
    np.testing.assert_array_equal(packed.planes, before)
    del packed
    loaded = load_decoder(store, 1, ActivationSettings(8))
    assert resident(planes) == [0]
    assert loaded.decoder.embedding is not None


def test_listed_weights_count_in_products_and_embeddings(tiny_model: Path, tmp_path: Path) -> None:
    kept = {
        "model.layers.0.mlp.down_proj.weight": ((0, 0), (5, 159)),
        "model.layers.0.self_attn.v_proj.weight": ((63, 63),),
        "model.embed_tokens.weight": ((int(IDS[0]), 1), (7, 0)),
        "lm_head.weight": ((3, 3),),
    }
    store = stored(tiny_model, tmp_path / "store", Recipe(embeddings="4bit"), kept)
    expected = dequantized_logits(store, tmp_path / "float")
    assert close(logits(load_decoder(store, 1, EXACT).decoder), expected) < 1e-5
    assert close(logits(load_decoder(store, 1, ActivationSettings(8)).decoder), expected) < 0.03
    packed = open_store(store).read_packed("model.embed_tokens.weight")
    ids = np.array([7, int(IDS[0]), 7, 95])
    np.testing.assert_array_equal(PackedEmbedding(packed).rows_of(ids), dequantize(packed)[ids])


def test_products_of_planes_are_lowered_to_plain_planes() -> None:
    random = np.random.default_rng(0)
    planes = np.stack([reference.pack_bits(random.random((3, 70)) < 0.5) for _ in range(3)])
    terms = (0, 1, 3, 6, 7)
    coef = random.standard_normal((5, 3, 2)).astype(np.float32)
    lowered = lower(PackedTensor(planes, coef, terms, 64, (3, 70)))
    assert lowered is not None
    assert lowered.part.offset is not None
    assert not np.any(lowered.part.planes[:, :, -1] >> np.uint64(6))
    signs = reference.unpack_planes(lowered.part.planes, 70)
    units = np.arange(70) // 64
    weights = lowered.part.offset[:, units] + np.einsum("prc,prc->rc", lowered.part.scale[:, :, units], signs)
    np.testing.assert_allclose(weights, reference.expand(planes, coef, terms, 64, 70), atol=1e-6)
    many = tuple(range(1, MOST_PLANES + 2))
    assert lower(PackedTensor(planes, np.ones((len(many), 3, 2), np.float32), many, 64, (3, 70))) is None


def test_uniform_levels_share_one_scale(tiny_model: Path, tmp_path: Path) -> None:
    store = open_store(stored(tiny_model, tmp_path / "store", Recipe(embeddings="4bit")))
    lowered = lower(store.read_packed("lm_head.weight"))
    assert lowered is not None
    assert lowered.plane_weights == (8.0, 4.0, 2.0, 1.0)
    assert lowered.part.scale.shape == (96, 1)


def test_numbers_of_a_whole_matrix_are_factors_of_its_planes(tiny_model: Path, tmp_path: Path) -> None:
    """So that the stream holds float16 scales, all 1, and no kernel for float32 ones is compiled."""
    store = open_store(stored(tiny_model, tmp_path / "store", Recipe(values=(("groups", 8), ("block", "matrix")))))
    packed = store.read_packed("model.layers.0.mlp.up_proj.weight")
    lowered = lower(packed)
    assert lowered is not None
    assert lowered.plane_weights == tuple(packed.coef[:, 0, 0].tolist())
    assert lowered.part.as_stored
    assert (lowered.part.scale == 1).all()
    signs = reference.unpack_planes(lowered.part.planes, packed.shape[1])
    weights = np.einsum("p,prc->rc", lowered.plane_weights, signs)
    np.testing.assert_allclose(weights, dequantize(packed), atol=1e-7)


def test_archives_and_object_stores_run(tiny_model: Path, tmp_path: Path) -> None:
    expected = logits(load_decoder(stored(tiny_model, tmp_path / "a", Recipe()), 1, ActivationSettings()).decoder)
    archive = stored(tiny_model, tmp_path / "b", Recipe(), archive=True)
    np.testing.assert_array_equal(logits(load_decoder(archive, 1, ActivationSettings()).decoder), expected)
    remote = "memory://engine"
    compress(make_plan(open_checkpoint(tiny_model), Recipe()), remote)
    np.testing.assert_array_equal(logits(load_decoder(remote, 1, ActivationSettings()).decoder), expected)


def test_one_row_of_several_blocks_is_laid_out() -> None:
    planes, coef = np.array([[[5, 1 << 63, 7, 1]]], np.uint64), np.array([[[1.0, 2.0]]], np.float16)
    packed = packed_tensor(shape=[1, 200], planes=planes, coef=coef)
    lowered = lower(packed)
    assert lowered is not None
    matrix = prepack_rows([lowered.part], lowered.block, 200)
    x = np.ones((1, 200), np.float32)
    np.testing.assert_allclose(multiply(matrix, quantize(x, 8)), x @ dequantize(packed).T, rtol=1e-6)


def test_exported_and_packed_agree(tiny_model: Path, tmp_path: Path) -> None:
    store = stored(tiny_model, tmp_path / "store", Recipe())
    exported = logits(load_checkpoint(export(open_store(store), tmp_path / "out")))
    assert close(logits(load_decoder(store, 1, EXACT).decoder), exported) < 0.02


def test_kept_bfloat16_rows_are_numpys_product() -> None:
    from bincompress.model.linear import DenseLinear, widened
    from cpu_kernels.parallel.workers import Workers

    random = np.random.default_rng(0)
    for rows, cols in ((1, 1), (130, 63), (257, 200)):
        bits = (random.standard_normal((rows, cols)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        x = random.standard_normal((3, cols)).astype(np.float32)
        with Workers(2) as workers:
            for part in (x, x[:1]):
                expected = part.astype(np.float64) @ widened(bits).T.astype(np.float64)
                np.testing.assert_allclose(DenseLinear(bits, workers)(part), expected, rtol=1e-4, atol=1e-4)
