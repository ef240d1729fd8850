"""Does --fit choose what fits, say what it chose, and does the process then stay under the size?"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bincompress.api import compress, fit, load, plan
from bincompress.compression.fit import needed_memory
from bincompress.errors import BincompressError, RecipeError
from bincompress.inference import load as loading
from bincompress.model.store_source import store_config
from bincompress.store.store import open_store
from tests.conftest import DEMO_MODEL, Run

_PEAK = r"""
import re, sys
from pathlib import Path
from bincompress import cli
sys.argv = ["bincompress", "generate", sys.argv[1], "The kernel", "--max-tokens", "200", "--threads", "2"]
cli.main()
# Not ru_maxrss, which has that of the process that began this one.
print("PEAK", 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
"""


def test_more_bytes_buy_planes_first_and_then_embeddings() -> None:
    most = fit(DEMO_MODEL, 1 << 40)
    assert (most.planes, most.settings["embeddings"]) == (4, "keep")
    found, order = most, []
    for _ in range(11):  # one byte less than each takes
        size = found.needed - 1
        found = fit(DEMO_MODEL, size)
        assert found.needed <= size
        order.append((found.planes, found.settings["embeddings"]))
        if order[-1] == (1, "4bit"):
            break
    assert order[:2] == [(4, "8bit"), (4, "4bit")]
    assert order == sorted(order, key=lambda one: (-one[0], ["keep", "8bit", "4bit"].index(one[1])))
    assert order[-1] == (1, "4bit")


def test_a_longer_context_takes_more() -> None:
    assert fit(DEMO_MODEL, 1 << 40, context=512).needed < fit(DEMO_MODEL, 1 << 40, context=1024).needed


def test_what_cannot_fit_is_refused_with_the_least(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("compress", DEMO_MODEL, tmp_path / "store", "--fit", "10MB")
    assert code == 2
    assert (
        "--fit 10 MB: with one plane and 4bit embeddings, the least there is, running the model takes about" in errors
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "options", [("--groups", "4"), ("--embeddings", "8bit"), ("--target-bits", "2"), ("--method", "xnor"),
                ("--export-only",), ("--context", "999999")],
)  # fmt: skip
def test_what_it_chooses_cannot_be_given_too(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    code, _, errors = run("compress", DEMO_MODEL, tmp_path / "store", "--fit", "400MB", *options)
    assert (code, "--fit" in errors or "--context 999,999" in errors) == (2, True)
    assert not (tmp_path / "store").exists()


def test_settings_of_a_method_stay_possible() -> None:
    with pytest.raises(RecipeError, match="compensation"):
        fit(DEMO_MODEL, 1 << 40, refine=4)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_process_stays_under_the_size(run: Run, tmp_path: Path) -> None:
    size = fit(DEMO_MODEL, 1 << 40, context=256).needed
    code, _, errors = run("compress", DEMO_MODEL, tmp_path / "store", "--fit", f"{size}B", "--context", "256")
    assert code == 0
    assert "4 planes, 16-bit embeddings" in errors
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "store")]
    subprocess.run(command, capture_output=True, check=True)  # compiles what is not compiled yet
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split("PEAK")[1]) < size


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_loading_counts_what_fit_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    settings: dict[str, Any] = {"groups": groups, "embeddings": "8bit"}
    compress(DEMO_MODEL, tmp_path / "store", **settings)
    store = open_store(str(tmp_path / "store"))
    assets = store.read_assets()
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: SimpleNamespace(rss=0))
    counted = loading._more(store, store_config(store, assets), assets)
    foreseen = needed_memory(plan(DEMO_MODEL, **settings).plan, loading._SHORT_CONTEXT)
    assert counted == pytest.approx(foreseen, abs=20_000)  # checksums, and what planes of odd widths are filled up with
    linear = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 768)
    assert foreseen > 157_000_000 + linear * groups // 8  # bytes of a plane for each group


def test_terms_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    compress(DEMO_MODEL, tmp_path / "store")
    node = tmp_path / "store" / "tensors" / "model.layers.0.mlp.up_proj.weight" / "zarr.json"
    content = json.loads(node.read_text())
    content["attributes"]["terms"] = ["a", None]
    node.write_text(json.dumps(content))
    with pytest.raises(BincompressError, match=r"up_proj"):
        load(str(tmp_path / "store"))
