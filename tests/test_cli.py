"""Does the command line do what the README says, with exit codes and one-line errors?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bincompress import cli
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import Run, tiny_config, tiny_tensors, write_model


def test_compress_inspect_verify(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, out, _ = run("compress", tiny_model, store, "--groups", "4", "--block", "64", "--embeddings", "8bit")
    assert code == 0
    assert "21 tensors done" in out
    assert "binary planes  14 tensors" in out
    code, out, _ = run("compress", tiny_model, store, "--groups", "4", "--block", "64", "--embeddings", "8bit")
    assert "0 tensors done, 21 already complete" in out
    code, out, _ = run("inspect", store)
    assert "model.layers.1.mlp.up_proj.weight" in out
    assert "nominal" in out
    code, out, _ = run("inspect", store, "--json")
    found = json.loads(out)
    tensor = found["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert {"method", "groups", "shape", "nominal_bits", "stored_bits", "relative_error", "seconds"} <= set(tensor)
    assert (tensor["method"], tensor["groups"], tensor["shape"]) == ("wgm", 4, [160, 64])
    assert found["total"]["status"] == "complete"
    code, out, _ = run("inspect", store, "model.layers.1.mlp.up_proj.weight", "--json")
    assert json.loads(out)["settings"]["groups"] == 4
    code, out, err = run("inspect", store, "nothing")
    assert (code, err.count("\n")) == (2, 1)
    assert run("verify", store)[0] == 0
    assert json.loads(run("verify", store, "--json")[1])["ok"]


def test_json_and_verbose(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", tiny_model, tmp_path / "store", "--json", "--verbose")
    assert code == 0
    assert json.loads(out)["done"] == 21
    assert err.count("  done  ") == 21
    assert "stored 2.8" in err  # rows of 160 columns: padding and a ragged block are counted


def test_plan_and_summary_say_what_smaller_embeddings_would_save(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    plan, smaller = (
        make_plan(open_checkpoint(tiny_model), load_recipe(None, {"embeddings": choice})) for choice in ("keep", "4bit")
    )
    line = (
        f"embeddings and output head stay as they are, {2 * 96 * 64 * 2:,} of {plan.expected_bytes:,} bytes: "
        f"--embeddings 4bit would save {plan.expected_bytes - smaller.expected_bytes:,} bytes"
    )
    assert plan.expected_bytes > smaller.expected_bytes
    assert line in run("compress", tiny_model, tmp_path / "s", "--dry-run", "--rate", "1GB")[1]
    assert line in run("compress", tiny_model, tmp_path / "s")[1]
    for chosen in (("--embeddings", "4bit"), ("--embeddings", "8bit"), ("--keep", "*embed*", "--keep", "lm_head*")):
        code, out, _ = run("compress", tiny_model, tmp_path / "s", "--dry-run", "--rate", "1GB", *chosen)
        assert (code, "would save" in out) == (0, False)


def test_dry_run_writes_nothing(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    code, out, _ = run("compress", tiny_model, tmp_path / "store", "--dry-run", "--verbose")
    assert code == 0
    assert not (tmp_path / "store").exists()
    assert "memory: at most about" in out
    plan = json.loads(run("compress", tiny_model, tmp_path / "store", "--dry-run", "--json")[1])
    run("compress", tiny_model, tmp_path / "store")
    found = json.loads(run("inspect", tmp_path / "store", "--json")[1])
    for name, tensor in found["tensors"].items():
        checksums = 8 if tensor["method"] != "keep" else 4
        assert tensor["stored_bytes"] == plan["tensors"][name]["expected_bytes"] + checksums


def test_a_failing_tensor_gives_exit_code_1(run: Run, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    model = write_model(tmp_path / "model", tensors, tiny_config())
    code, out, err = run("compress", model, tmp_path / "store")
    assert code == 1
    assert "FAILED model.layers.0.mlp.up_proj.weight: nan at row 0, column 0" in err
    assert "NOT COMPLETE: 1 tensors missing" in out
    code, _, err = run("verify", tmp_path / "store")
    assert code == 1
    code, _, err = run("export", tmp_path / "store", tmp_path / "out")
    assert (code, "not complete" in err) == (2, True)
    code, out, _ = run("compress", model, tmp_path / "store2", "--keep", "*.0.mlp.up_proj.weight")
    assert code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "nowhere/at/all", "store"],
        ["compress", "MODEL", "store", "--recipe", "missing.toml"],
        ["compress", "MODEL", "store", "--keep-weights", "missing.txt"],
        ["compress", "MODEL", "store", "--keep", "*.nothing"],
        ["compress", "MODEL", "store", "--solver", "windowed"],
        ["compress", "MODEL", "MODEL"],
        ["inspect", "nowhere"],
        ["verify", "nowhere"],
        ["export", "nowhere", "out"],
        ["report", "nowhere"],
    ],
)
def test_errors_are_one_line_and_exit_code_2(run: Run, tiny_model: Path, arguments: list[str]) -> None:
    code, out, err = run(*(str(tiny_model) if word == "MODEL" else word for word in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["nothing"], ["compress"], ["compress", "a", "b", "--block", "96"]])
def test_usage_errors(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Error" in err


def test_every_command_has_help_with_an_example() -> None:
    runner = CliRunner()
    for name in cli._COMMANDS:
        result = runner.invoke(cli.group, [name, "--help"])
        assert result.exit_code == 0
        assert "Example" in result.output, name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bincompress.cli import main; sys.argv = ['bincompress', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'numpy', 'numba', 'zarr', 'ray', 'torch'} & set(sys.modules), 'heavy import'"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_demo_and_report(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("demo", tmp_path / "demo")
    assert code == 0
    assert "verified" in out
    assert "model.layers.3.mlp.down_proj.weight" in out
    page = tmp_path / "report.html"
    code, out, _ = run("report", tmp_path / "demo", "--out", page)
    assert code == 0
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    code, _, err = run("report", tmp_path / "demo", "--tensor", "nothing")
    assert (code, "no packed tensor 'nothing'" in err) == (2, True)


def test_a_hostile_name_is_text_in_the_report(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    tiny_model.rename(hostile)
    run("compress", hostile, tmp_path / "store")
    run("report", tmp_path / "store", "--out", tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text()
