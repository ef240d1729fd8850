"""A method is one file: does a module from outside, with one declaration, reach every part of the program?"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest

import bincompress
from bincompress.calibration.statistics import Statistics
from bincompress.compression.allocation import run_trials, spread, spreadable, trial_jobs, trials_of
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.errors import RecipeError
from bincompress.methods import METHODS, make_settings
from bincompress.methods.declaration import Option
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from tests.conftest import KNOWN_METHODS, Run

# Everything that the program is told of the method: the sign of every weight, times a share of the mean magnitude.
OUTSIDE = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bincompress.methods.declaration import Binarized, Method, Settings, Size, option
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.quantize.packing import pack_signs, words_for


@dataclass(frozen=True)
class ShareSettings(Settings):
    method: ClassVar[str] = "share"
    share: float = option(0.5, "share of the mean magnitude", flag="--share-of-mean", least=0, most=1)

    def problem(self, shape):
        return "share of a whole matrix: choose a row" if self.block == "matrix" else ""


def binarize(weight, settings, inputs=None):
    rows, cols = weight.shape
    planes = np.empty((1, rows, words_for(cols)), np.uint64)
    pack_signs(weight.flat, cols, planes[0])
    block = settings.block_columns(cols)
    values = weight.float32()
    starts = np.arange(0, cols, block)
    sizes = np.diff(np.append(starts, cols))
    means = np.add.reduceat(np.abs(values), starts, axis=1) / sizes
    numbers = (settings.share * means[None]).astype(np.float16)
    stands_for = np.where(values >= 0, 1, -1) * np.repeat(numbers[0].astype(np.float32), sizes, axis=1)
    error, norm = (float(np.sum(part.astype(np.float64) ** 2)) for part in (values - stands_for, values))
    tensor = PackedTensor(planes, numbers, (1,), block, (rows, cols))
    return Binarized(tensor, error, norm, 1.0, 1, {"shared": settings.share})


METHOD = Method(
    summary="a share of the mean magnitude",
    settings=ShareSettings,
    binarize=binarize,
    size=lambda settings: Size(1, 1),
)
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the method as a user's own module would."""
    (tmp_path / "outside_method.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    METHODS.append(importlib.import_module("outside_method").METHOD)
    _forget_command()
    yield
    METHODS.pop()
    sys.modules.pop("outside_method")
    _forget_command()


def _forget_command() -> None:
    """Let the options of `compress` be made anew, as every process does once."""
    for name in ("bincompress.commands.compress", "bincompress.commands.method_options"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("outside")
def test_a_method_from_outside_goes_all_the_way(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = ("--method", "share", "--share-of-mean", "0.75", "--block", "64")
    status, out, _ = run("compress", tiny_model, store, *options, "--dry-run", "--json", "--rate", "1GB")
    planned = json.loads(out)["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert (status, planned["method"]) == (0, "share")
    assert planned["expected_bytes"] == 8 * 160 + 2 * 160  # a word of 64 signs and a scale for each row
    assert run("compress", tiny_model, store, *options)[0] == 0
    found = json.loads(run("inspect", store, "--json")[1])
    report = found["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert (report["method"], report["shared"]) == ("share", 0.75)
    assert found["total"]["binary"]["tensors"] == 14
    assert run("verify", store)[0] == 0
    assert run("compress", tiny_model, store, *options)[1].startswith(f"{store}: 0 tensors done, 21 already complete")
    attributes = open_store(str(store)).complete_attributes("model.layers.0.mlp.up_proj.weight")
    assert attributes["settings"] == {"method": "share", "block": 64, "share": 0.75}
    assert open_store(str(store)).attributes["recipe"]["defaults"]["share"] == 0.75
    assert run("report", store, "--out", tmp_path / "page.html")[0] == 0
    assert "share" in (tmp_path / "page.html").read_text()


@pytest.mark.usefixtures("outside")
def test_its_options_stand_in_the_help_and_its_checks_are_obeyed(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    from bincompress.commands.compress import command

    text = click.testing.CliRunner().invoke(command, ["--help"]).output
    assert "--share-of-mean" in text
    assert "share of the mean magnitude" in " ".join(text.split())
    for options, message in (
        (("--share-of-mean", "2"), "share-of-mean: expected 0 to 1, found 2.0"),
        (("--block", "matrix"), "share of a whole matrix: choose a row"),
        (("--groups", "4"), "groups is a setting of wgm, and no tensor has such a method"),
    ):
        status, _, error = run("compress", tiny_model, tmp_path / "no", "--method", "share", *options)
        assert (status, message in error) == (2, True), error
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("outside")
def test_bits_are_spread_around_it(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("tokens of a text " * 400)
    statistics = collected(tiny_model, tmp_path / "stats")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[defaults]\nmethod = 'xnor'\ncompensate = true\n[[tensor]]\npattern = '*.mlp.*'\nmethod = 'share'\n"
    )
    plan = make_plan(open_checkpoint(tiny_model), load_recipe(recipe, {}), statistics=statistics)
    tensors = {tensor.source.name: tensor for tensor in spreadable(plan)}
    assert not any(".mlp." in name for name in tensors)  # it offers no trials, so its tensors keep their settings
    trials = {job.name: trials_of(tensors[job.name], run_trials(job)) for job in trial_jobs(plan, tensors.values())}
    chosen = make_plan(plan.checkpoint, spread(plan, trials, 2.0), statistics=statistics)
    assert {t.settings.method for t in chosen.tensors if ".mlp." in t.source.name} == {"share"}


def collected(model: Path, url: Path) -> Statistics:
    from tests.test_calibrate import collect

    return collect(model, url)


@pytest.mark.usefixtures("outside")
def test_it_is_called_from_python(tiny_model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "share", "share": 0.25}  # a setting that type checkers do not know
    result = bincompress.compress(tiny_model, tmp_path / "store", **given)
    assert result.complete
    assert result.tensors["model.layers.0.mlp.up_proj.weight"]["shared"] == 0.25


def test_every_declaration_is_whole() -> None:
    for method in METHODS:
        assert method.summary[0].islower() or method.summary[0].isupper()
        assert all(isinstance(option, Option) and option.text for option in method.options().values())
        made = make_settings(method.name)
        assert made.record()["method"] == method.name
        json.dumps(made.record())
        size = method.size(made)
        assert size.planes >= 1 <= size.coefficients
        assert np.isfinite(method.scratch_bytes(made, "F32"))


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("wgn", {}, f"unknown method 'wgn'; known: {KNOWN_METHODS}$"),
        ("wgm", {"planes": 2}, "wgm has no setting 'planes'; it has block, compensate, groups"),
        ("wgm", {"groups": 2.0}, r"groups: expected int, found 2\.0"),
        ("wgm", {"compensate": 1}, "compensate: expected bool, found 1"),
        ("xnor", {"block": True}, "block: expected one of 64, 128, 256, row, matrix, found True"),
        ("dbellquant", {"epsilon": float("nan")}, "epsilon: expected 0 to 1, found nan"),
        ("dbellquant", {"activation_bits": 7}, "activation-bits: expected one of 6, 8, 16, found 7"),
        ("dbellquant", {"smoothing": float("inf")}, "smoothing: expected 0 to 1000, found inf"),
    ],
)
def test_settings_are_typed(method: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_settings(method, **values)
