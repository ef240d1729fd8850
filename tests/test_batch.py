"""Are several models done in one queue, and is a plan's cost told from a config alone?"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bincompress.cli import group
from bincompress.commands.running import Size
from bincompress.compression.estimate import Estimate
from bincompress.compression.manifest import read_manifest
from bincompress.compression.records import JobReport
from bincompress.compression.run import compress_all
from bincompress.errors import RecipeError
from bincompress.store.store import open_store
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.runs import plan_of, run

Tree = Callable[[Path], dict[str, bytes]]


def test_one_queue_the_largest_first(tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    larger = write_model(tmp_path / "larger", tiny_tensors(inner=320), tiny_config(inner=320))
    plans = {str(tmp_path / "a"): plan_of(tiny_model), str(tmp_path / "b"): plan_of(larger)}
    reports: list[JobReport] = []
    outcomes = compress_all(plans, on_report=reports.append)
    assert [outcome.done for outcome in outcomes.values()] == [21, 21]
    sizes = [report.bytes_read for report in reports]
    assert sizes == sorted(sizes, reverse=True)
    run(tiny_model, tmp_path / "alone")
    assert tree(tmp_path / "a") == tree(tmp_path / "alone")


@pytest.mark.slow
def test_failures_stay_with_their_store(tiny_model: Path, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["lm_head.weight"][0, 0] = float("nan")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    bad = write_model(tmp_path / "bad", tensors, tiny_config())
    manifest, events = tmp_path / "models.toml", tmp_path / "events.jsonl"
    (tmp_path / "recipe.toml").write_text("[defaults]\ngroups = 4\n")
    manifest.write_text(
        f'[[model]]\nsource = "{bad}"\nstore = "{tmp_path / "a"}"\n'
        f'[[model]]\nsource = "{tiny_model}"\nstore = "{tmp_path / "b"}"\nrecipe = "{tmp_path / "recipe.toml"}"\n'
    )
    result = CliRunner().invoke(group, ["batch", str(manifest), "--events", str(events), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [model["complete"] for model in found.values()] == [False, True]
    assert list(found[str(tmp_path / "a")]["failures"]) == ["model.layers.0.mlp.up_proj.weight"]
    assert open_store(str(tmp_path / "b")).attributes["recipe"]["defaults"]["groups"] == 4
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["event"] for line in lines].count("failed") == 1
    assert len(lines) == 42


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected .*model.* tables"),
        ("[[model]]\nsource = 'a'\n", "number 1: lacks store"),
        ("[[model]]\nsource = 'a'\nstore = 's'\nspeed = '1'\n", "unknown key 'speed'"),
        ("[[model]]\nsource = 'a'\nstore = 3\n", "store: expected a text"),
        ("[[model]]\nsource='a'\nstore='s'\n[[model]]\nsource='b'\nstore='./s'\n", "is the store of a and of b"),
        ("[[model\n", "not readable as TOML"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "models.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_manifest(tmp_path / "models.toml")


def test_a_plan_from_a_config_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(tiny_config()))
    plans = []
    for source in (tiny_model, tmp_path / "config"):
        arguments = ["compress", str(source), str(tmp_path / "store"), "--dry-run", "--json", "--rate", "1MB"]
        plans.append(json.loads(CliRunner().invoke(group, arguments).stdout))
    assert plans[0]["tensors"] == plans[1]["tensors"]
    assert plans[1]["estimate"]["core_seconds"] == pytest.approx(plans[1]["source_bytes"] / 1e6)
    result = CliRunner().invoke(group, ["compress", str(tmp_path / "config"), str(tmp_path / "store")])
    assert "no .safetensors file" in str(result.exception)


def test_the_measured_cost(tiny_model: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(group, ["compress", str(tiny_model), str(tmp_path / "store"), "--dry-run"])
    assert "21 jobs, " in found.stdout
    assert "core like it finish in an hour" in found.stdout
    assert not (tmp_path / "store").exists()


def test_cores_for_an_hour() -> None:
    assert Estimate(10, 1, 7300.0, 100.0, True).cores_for_an_hour == 3
    assert Estimate(10, 1, 7300.0, 3700.0, True).cores_for_an_hour == 0


@pytest.mark.parametrize(("text", "size"), [("800MB", 800_000_000), ("1.5 gb", 1_500_000_000), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["-5MB", "abc", "", "MB", "1XB", "inf", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a size such as 800MB or 4GB"):
        Size().convert(text, None, None)


def test_each_store_tells_what_compress_tells(tiny_model: Path, tmp_path: Path) -> None:
    """Notes before the work, bits, and what stayed unpacked and why: of several models as of one."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "config.json").write_text(json.dumps({**tiny_config(), "architectures": ["Abacus"], "model_type": "x"}))
    stores = {name: str(tmp_path / f"store-{name}") for name in ("runs", "not")}
    manifest = tmp_path / "models.toml"
    manifest.write_text(
        f'[[model]]\nsource = "{tiny_model}"\nstore = "{stores["runs"]}"\n'
        f'[[model]]\nsource = "{other}"\nstore = "{stores["not"]}"\n'
    )
    refused = CliRunner().invoke(group, ["batch", str(manifest)])
    assert "not run here" in str(refused.exception)
    assert not (tmp_path / "store-runs").exists()
    planned = CliRunner().invoke(group, ["batch", str(manifest), "--dry-run", "--rate", "1MB"])
    assert planned.exit_code == 0
    assert planned.stdout.count("embedding (1 tensor") == 2
    assert f"note: {stores['not']}: will compress and export, but not run here" in planned.stderr
    shown = CliRunner().invoke(group, ["batch", str(manifest), "--export-only"])
    assert shown.exit_code == 0
    assert f"note: {stores['not']}: will compress and export, but not run here" in shown.stderr
    assert f"note: {stores['runs']}" not in shown.stderr
    for store in stores.values():
        assert f"{store}: 21 tensors done\nbinary planes  14 tensors" in shown.stdout
    again = json.loads(CliRunner().invoke(group, ["batch", str(manifest), "--export-only", "--json"]).stdout)
    alone = json.loads(CliRunner().invoke(group, ["compress", str(tiny_model), stores["runs"], "--json"]).stdout)
    assert again[stores["runs"]] == alone
    assert len(again[stores["not"]]["notes"]) == 1
