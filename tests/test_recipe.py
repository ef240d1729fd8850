"""Do settings reach the tensors they are meant for, and is a mistake in them refused before any work?"""

from pathlib import Path
from typing import Any

import pytest

from bincompress.compression.plan import make_plan, packed_bytes
from bincompress.compression.recipe import load_kept_weights, load_recipe
from bincompress.errors import RecipeError
from bincompress.methods import Settings, make_settings
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import KNOWN_METHODS


def planned(model: Path, recipe_text: str = "", **options: object) -> dict[str, Any]:
    path = None
    if recipe_text:
        path = model / "recipe.toml"
        path.write_text(recipe_text)
    plan = make_plan(open_checkpoint(model), load_recipe(path, options))
    return {t.source.name: t.settings for t in plan.tensors}


def test_linears_are_packed_and_the_rest_is_kept(tiny_model: Path) -> None:
    methods = {name: settings.method for name, settings in planned(tiny_model).items()}
    assert methods["model.layers.0.mlp.up_proj.weight"] == "wgm"
    kept = {name for name, method in methods.items() if method == "keep"}
    assert kept == {name for name in methods if "norm" in name or "embed" in name or "lm_head" in name}


def test_embeddings_and_head_become_uniform_planes(tiny_model: Path) -> None:
    found = planned(tiny_model, embeddings="4bit")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (found[name].method, found[name].bits) == ("uniform", 4)


def test_later_overrides_win_and_options_win_over_defaults(tiny_model: Path) -> None:
    text = """
    [defaults]
    groups = 4
    block = 64
    [[tensor]]
    pattern = "*.down_proj.weight"
    groups = 8
    [[tensor]]
    pattern = "model.layers.0.mlp.down_proj.weight"
    method = "keep"
    """
    found = planned(tiny_model, text, block="row")
    assert found["model.layers.0.mlp.up_proj.weight"] == make_settings("wgm", groups=4, block="row")
    assert found["model.layers.1.mlp.down_proj.weight"] == make_settings("wgm", groups=8, block="row")
    assert found["model.layers.0.mlp.down_proj.weight"].method == "keep"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[defaults]\ngruops = 2", "unknown key 'gruops'; known: .*groups"),
        ("[defaults]\ngroups = 'two'", "groups: expected int, found 'two'"),
        ("[defaults]\ngroups = true", "groups: expected int, found True"),
        ("[default]\n", "unknown key 'default'"),
        ("[[tensor]]\ngroups = 2", "expected a pattern"),
        ("[[tensor]]\npattern = '*.nothing'\ngroups = 2", r"matches none of the \d+ tensors, such as lm_head"),
        ("defaults = 3", "expected a .defaults. table"),
        ("not toml", "not readable as TOML"),
        ("[defaults]\nmethod = 'wgn'", f"unknown method 'wgn'; known: {KNOWN_METHODS}$"),
        ("[defaults]\ngroups = 0", "groups: expected 1 to 32768, found 0"),
        ("[defaults]\ngroups = 32769", "groups: expected 1 to 32768, found 32769"),
        ("[defaults]\nblock = 100", "block: expected one of 64, 128, 256, row, matrix, found 100"),
        ("[defaults]\nlambda = -1.0", "lambda: expected at least 0, found -1.0"),
        ("[defaults]\nsolver = 'best'", "solver: expected one of exact, greedy, windowed, found 'best'"),
        ("[defaults]\nsolver = 'windowed'", r"window 512: 2 groups in a block of 128 weights need a window of 1 to 64"),
        ("[defaults]\nembeddings = '3bit'", "embeddings: expected one of keep, 4bit, 8bit, lossless"),
        ("[[tensor]]\npattern = '*.norm.weight'\nmethod = 'wgm'", "only matrices can be packed"),
        ("[[tensor]]\npattern = 'lm_head*'\nmethod = 'uniform'\nblock = 'matrix'", "1 to 8 bits per row or row-block"),
        ('[defaults]\nmethod = "lowrank"\nbits = 9.5', r"bits: expected 0\.1 to 4, found 9\.5"),
    ],
)
def test_mistakes_are_refused_by_name(tiny_model: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(tiny_model, text)


def test_kept_weights_are_checked(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    path = tiny_model / "kept.txt"

    def plan() -> None:
        make_plan(checkpoint, load_recipe(None, {}), load_kept_weights(path))

    for text, message in [
        ("model.layers.0.mlp.up_proj.weight 1", "expected 'tensor row column'"),
        ("model.layers.0.mlp.up_proj.weight -1 3", "expected 'tensor row column'"),
        ("model.layers.9.mlp.up_proj.weight 1 3", "which the checkpoint does not have"),
        ("model.layers.0.mlp.up_proj.weight 160 3", r"\(160, 3\) lies outside its shape \[160, 64\]"),
        ("lm_head.weight 1 3", "the whole tensor is kept already"),
    ]:
        path.write_text(text + "\n")
        with pytest.raises(RecipeError, match=message):
            plan()
    path.write_text("# super weights\n\nmodel.layers.0.mlp.up_proj.weight 1 3 # one\n")
    assert load_kept_weights(path) == {"model.layers.0.mlp.up_proj.weight": ((1, 3),)}


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        (make_settings("wgm"), 2.25),
        (make_settings("xnor"), 1.125),
        (make_settings("uniform", bits=4), 4.25),
        (make_settings("wgm", groups=4), 3.5),
    ],
)
def test_expected_bits(settings: Settings, bits: float) -> None:
    assert 8 * packed_bytes(settings, 256, 1024) / (256 * 1024) == bits
