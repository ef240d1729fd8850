"""Several recipes from one reading: the bytes of single runs, each tensor read once, resumed after a kill."""

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import bincompress
from bincompress.compression import job as jobs
from bincompress.compression.records import Job, failed_report
from bincompress.errors import BincompressError, RecipeError
from bincompress.methods import KEEP
from bincompress.sources.checkpoint import read_weight
from bincompress.store.store import open_store
from bincompress.tensors.weight import TensorSource, Weight
from jobs.runner import absolute
from tests.conftest import Run
from tests.forked import Forked

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def recipes(tmp_path: Path) -> list[Path]:
    """Two recipes: one that packs embeddings, one that keeps a layer."""
    found = [tmp_path / "one.toml", tmp_path / "two.toml"]
    found[0].write_text('[defaults]\nembeddings = "4bit"\ngroups = 1\nblock = 64\n')
    found[1].write_text(
        '[defaults]\ngroups = 2\nblock = 64\n[[tensor]]\npattern = "*.0.*_proj.weight"\nmethod = "keep"\n'
    )
    return found


def bytes_of(tree: Tree, store: Path) -> dict[str, bytes]:
    """A store's bytes, without the times of its log."""
    return {name: content for name, content in tree(store).items() if not name.startswith("log/")}


def test_the_bytes_are_those_of_single_runs_and_each_tensor_is_read_once(
    tiny_model: Path, tmp_path: Path, recipes: list[Path], run: Run, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for recipe in recipes:
        code, _, err = run("compress", tiny_model, tmp_path / "single" / recipe.stem, "--recipe", recipe)
        assert code == 0, err
    read, real = Counter[str](), read_weight

    def counted(source: TensorSource) -> Weight:
        read[source.name] += 1
        return real(source)

    monkeypatch.setattr(jobs, "read_weight", counted)
    both = [part for recipe in recipes for part in ("--recipe", recipe)]
    code, out, err = run("compress", tiny_model, tmp_path / "several" / "{recipe}", *both)
    assert code == 0, err
    assert set(read.values()) == {1}
    assert len(read) == len(open_store(str(tmp_path / "several" / "one")).tensors())
    for recipe in recipes:
        assert f"{tmp_path / 'several' / recipe.stem}: {len(read)} tensors done" in out
        expected = bytes_of(tree, tmp_path / "single" / recipe.stem)
        assert bytes_of(tree, tmp_path / "several" / recipe.stem) == expected
    code, out, _ = run("compress", tiny_model, tmp_path / "several" / "{recipe}", *both)
    assert code == 0
    assert out.count(f": 0 tensors done, {len(read)} already complete") == 2


def test_statistics_serve_all_recipes(
    letters_model: Path, tmp_path: Path, recipes: list[Path], run: Run, tree: Tree
) -> None:
    text = tmp_path / "text"
    text.write_text("abcdefgh the quick brown fox " * 40)
    assert run("calibrate", letters_model, tmp_path / "stats", "--text", text, "--samples", 2, "--context", 32)[0] == 0
    for recipe in recipes:
        recipe.write_text(recipe.read_text().replace("block = 64", "block = 64\ncompensate = true"))
    stats = str(tmp_path / "stats")
    stores = {str(tmp_path / "several" / recipe.stem): recipe for recipe in recipes}
    done = bincompress.compress_several(letters_model, stores, stats=stats)
    assert all(result.complete for result in done.values())
    for recipe in recipes:
        single = tmp_path / "single" / recipe.stem
        bincompress.compress(letters_model, single, recipe=recipe, stats=stats)
        assert bytes_of(tree, tmp_path / "several" / recipe.stem) == bytes_of(tree, single)


KILLED = """
import os, signal, sys
import bincompress
from bincompress.compression import job
stores = dict(pair.split("=") for pair in sys.argv[2:])
done = []
real = job._done
def stopped(*arguments):
    done.append(real(*arguments))
    if len(done) == 9:  # in the midst of one tensor's two stores
        os.kill(os.getpid(), signal.SIGKILL)
    return done[-1]
job._done = stopped
bincompress.compress_several(sys.argv[1], stores)
"""


def test_a_killed_run_is_resumed(
    forked: Forked, tiny_model: Path, tmp_path: Path, recipes: list[Path], tree: Tree
) -> None:
    stores = {str(tmp_path / recipe.stem): recipe for recipe in recipes}
    pairs = [f"{store}={recipe}" for store, recipe in stores.items()]
    ended = forked(tiny_model, *pairs, code=KILLED)
    assert ended.returncode == -signal.SIGKILL
    done = bincompress.compress_several(tiny_model, stores)
    assert [result.unchanged for result in done.values()] == [5, 4]
    for store, recipe in stores.items():
        bincompress.compress(tiny_model, tmp_path / "single" / recipe.stem, recipe=recipe)
        assert bytes_of(tree, Path(store)) == bytes_of(tree, tmp_path / "single" / recipe.stem)


def test_jobs_of_one_tensor_travel_and_fail_together() -> None:
    source = TensorSource("a", "BF16", (2, 2), "folder/file", 0, 8)
    both = jobs.of_one_tensor([Job(store, "a", source, KEEP, peak_memory=n) for n, store in enumerate("xy")])
    assert [(job.store, job.peak_memory, [other.store for other in job.others]) for job in both] == [("x", 1, ["y"])]
    sent = absolute(both[0])
    assert all(Path(job.store).is_absolute() and Path(job.source.file).is_absolute() for job in (sent, *sent.others))
    assert [(report.store, report.status) for report in failed_report(both[0], "why").each()] == [
        ("x", "failed"), ("y", "failed"),
    ]  # fmt: skip


def test_a_batch_takes_a_list_of_recipes(tiny_model: Path, tmp_path: Path, recipes: list[Path], run: Run) -> None:
    manifest = tmp_path / "models.toml"
    listed = ", ".join(f'"{recipe}"' for recipe in recipes)
    manifest.write_text(f'[[model]]\nsource = "{tiny_model}"\nstore = "{tmp_path}/b-{{recipe}}"\nrecipe = [{listed}]\n')
    code, _, err = run("batch", manifest)
    assert code == 0, err
    found = [open_store(str(tmp_path / f"b-{recipe.stem}")).attributes for recipe in recipes]
    assert [each["recipe"]["defaults"]["groups"] for each in found] == [1, 2]
    manifest.write_text(f'[[model]]\nsource = "{tiny_model}"\nstore = "{tmp_path}/b"\nrecipe = [{listed}]\n')
    code, _, err = run("batch", manifest)
    assert code == 2
    assert "number 1: " in err
    assert "2 recipes need a store each: put {recipe} into its name" in err
    manifest.write_text(f'[[model]]\nsource = "{tiny_model}"\nstore = "{tmp_path}/b"\nrecipe = [3]\n')
    assert "recipe: expected a text, found [3]" in run("batch", manifest)[2]


def test_what_cannot_be_told_apart_is_refused_before_the_work(
    tiny_model: Path, tmp_path: Path, recipes: list[Path], run: Run
) -> None:
    both = [part for recipe in recipes for part in ("--recipe", recipe)]
    code, out, err = run("compress", tiny_model, tmp_path / "s", *both)
    assert (code, out) == (2, "")
    assert "2 recipes need a store each: put {recipe} into its name" in err
    other = tmp_path / "other" / "one.toml"
    other.parent.mkdir()
    other.write_text(recipes[0].read_text())
    code, _, err = run("compress", tiny_model, tmp_path / "s-{recipe}", "--recipe", recipes[0], "--recipe", other)
    assert code == 2
    assert "s-one: is the store of " in err
    code, _, err = run("compress", tiny_model, tmp_path / "s-{recipe}", *both, "--sequential", recipes[0])
    assert code == 2
    assert "--sequential calibrates on what one store's own layers give: run it once for each recipe" in err
    recipes[1].write_text('[defaults]\ngroups = "many"\n')  # of the second, before the first is begun
    with pytest.raises((BincompressError, RecipeError)):
        bincompress.compress_several(tiny_model, {str(tmp_path / f"s-{r.stem}"): r for r in recipes})
    assert not list(tmp_path.glob("s-*"))
    code, out, _ = run("compress", tiny_model, tmp_path / "s-{recipe}", "--recipe", recipes[0], "--dry-run")
    assert code == 0
    assert "reads " in out
