"""Does a store go to the Hub and come back, with real huggingface_hub calls, against a server that answers as it?"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import RevisionNotFoundError

import bincompress
from bincompress.compression.recipe import load_recipe
from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.reporting.card import read_evaluation, recipe_toml
from bincompress.store.hub import CARD, FILE, _check, located, upload
from bincompress.store.store import open_store
from tests.conftest import RunWithHub, tiny_config, tiny_tensors, write_model
from tests.fake_hub import BASE, UploadHub
from tests.hostile_packs import hostile_packs
from tests.served import served


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with served(UploadHub()) as made:
        yield made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    model = write_model(folder / "model", tiny_tensors(), tiny_config())
    bincompress.compress(model, folder / "store", groups=3)
    return folder / "store"


@pytest.mark.slow
def test_a_store_goes_to_the_hub_and_runs_from_there(
    hub: UploadHub, run_with_hub: RunWithHub, store: Path, tmp_path: Path
) -> None:
    def call(*arguments: object, code: int = 0, **more: str) -> str:
        done = run_with_hub(hub.server_port, *arguments, HF_TOKEN="hf_x", **more)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    (tmp_path / "e.json").write_text(
        json.dumps({"text": "held/out.txt", "tokens": 99, "perplexity": 12.5, "baseline_perplexity": 10.0,
                    "kl_divergence": 0.25, "top1_agreement": 0.75})
    )  # fmt: skip
    push = ("push", store, "me/tiny", "--base-model", BASE, "--evaluation", tmp_path / "e.json")
    card = call(*push, "--dry-run")
    assert list(hub.repos) == [BASE]
    for line in ("base_model: team/base", "base_model_relation: quantized", "license: apache-2.0", "groups = 3",
                 "| out.txt | 99 | 12.5000 | 10.0000 | 1.250 | 0.25000 | 75.00% |",
                 "bincompress verify me/tiny --source team/base --sample 20"):  # fmt: skip
        assert line in card
    hub.fails = 1
    assert "cut off; run the same command again" in call(*push, "--private", "--revision", "test", code=2)
    call(*push, "--private", "--revision", "test")
    assert (hub.private["me/tiny"], hub.branches[-1]) == (True, "test")
    files = hub.repos["me/tiny"]
    assert set(files) == {"README.md", "config.json", "tokenizer.json", FILE}
    assert files["README.md"].decode() == card
    assert f"`{hashlib.sha256(files[FILE]).hexdigest()}`" in card
    assert files["config.json"] == open_store(str(store)).read_assets()["config.json"]
    hub.asked.clear()
    call(*push)  # nothing has changed
    assert "PUT" not in hub.asked
    assert not any("/commit/" in line for line in hub.asked)

    expected = call("generate", store, "t1 t2", "--max-tokens", "4")
    assert call("generate", "me/tiny", "t1 t2", "--max-tokens", "4") == expected
    assert "every tensor is as it was written" in call("verify", "me/tiny@main")
    assert call("generate", "me/tiny", "t1 t2", "--max-tokens", "4", HF_HUB_OFFLINE="1") == expected
    listed = json.loads(call("models", "--json"))["models"]
    assert [(one["name"], one["kind"]) for one in listed] == [("me/tiny", "store")]
    assert "are free by that" in call("models", "--remove", "me/tiny")
    assert call("models") == "no models in the cache\n"
    assert "not in the cache" in call("models", "--remove", "me/tiny", code=2)


@pytest.mark.slow
def test_what_is_refused(hub: UploadHub, run_with_hub: RunWithHub, store: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = run_with_hub(hub.server_port, *arguments, HF_TOKEN="hf_x")
        assert (done.returncode, [line for line in done.stderr.splitlines() if "error: " in line]) != (0, [])
        return done.stderr.splitlines()[-1]

    hub.repos["me/other"] = {"README.md": b"# mine"}
    hub.repos["me/damaged"] = {FILE: b"PK\3\4" + bytes(5000)}
    assert "has a README.md that bincompress did not write" in refused("push", store, "me/other")
    assert hub.repos["me/other"] == {"README.md": b"# mine"}
    assert "exists and is public" in refused("push", store, "me/other", "--private")
    assert "has no model.bincompress.zip on the Hub" in refused("generate", "me/other", "x")
    assert "came damaged, and was removed from the cache" in refused("generate", "me/damaged", "x")
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size == 5004]
    assert "no such store here, and the Hub says" in refused("generate", "me/missing", "x")
    for arguments in (("push", store, "tiny"), ("push", store, "a/b@main"), ("push", store, "../x")):
        assert "expected the name of a model on the Hub" in refused(*arguments)
    assert "no such store" in refused("push", tmp_path / "missing", "me/tiny")


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert located("me/tiny") == "me/tiny"
    for name in ("./missing", "../missing", "a/b/c", "missing", "s3://a/b", str(tmp_path / "x")):
        assert located(name) == name


@pytest.mark.parametrize(
    "given",
    [
        {}, {"method": "dbllm", "block": 64, "embeddings": "8bit"}, {"method": "billm", "refine": 2},
        {"method": "wgm", "groups": 5, "block": "matrix", "lam": 0.1, "lam_normalized": True, "embeddings": "4bit"},
        {"method": "dbellquant", "planes": 1, "scale_bits": 8}, {"method": "xnor", "compensate": True, "planes": 3},
    ],
)  # fmt: skip
def test_the_recipe_of_a_card_gives_the_same_recipe(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "r.toml").write_text(
        '[[tensor]]\npattern = "*up*"\nmethod = "billm"\n[[tensor]]\npattern = "a.*"\nblock = 64\n'
    )
    recipe = load_recipe(tmp_path / "r.toml", given, ["*q_proj*"])
    (tmp_path / "card.toml").write_text(recipe_toml(recipe.record()))
    assert load_recipe(tmp_path / "card.toml", {}).record() == recipe.record()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"text": "a", "tokens": 1}', '{"text": "a", "tokens": 1, "perplexity": "1"}']
)
def test_an_evaluation_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(BincompressError, match=r"e\.json: (not readable|expected what)"):
        read_evaluation(tmp_path / "e.json")


class Branches:
    """The calls of the Hub's client that `upload` makes, over files by branch."""

    def __init__(self, **files: dict[str, bytes]) -> None:
        self.files, self.committed = files, ""

    def create_repo(self, *_: Any, **__: Any) -> None:
        pass

    def model_info(self, repo: str, *, revision: str | None = None, timeout: float) -> Any:
        if (revision or "main") not in self.files:
            raise RevisionNotFoundError("no such branch", response=MISSING)
        names = [SimpleNamespace(rfilename=name) for name in self.files[revision or "main"]]
        return SimpleNamespace(private=False, siblings=names)

    def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
        self.files.setdefault(branch, dict(self.files["main"]))

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None = None) -> str:
        path = self.folder / (revision or "main") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[revision or "main"][name])
        return str(path)

    def create_commit(self, repo: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        self.committed = revision or "main"
        return SimpleNamespace(commit_url="url")

    folder = Path()


MISSING: Any = httpx.Response(404, request=httpx.Request("GET", "http://127.0.0.1"))
MINE = {CARD: b"# by hand"}
OURS = {CARD: b"---\nlibrary_name: bincompress\n---\n"}


@pytest.mark.parametrize(
    ("files", "revision", "overwrite", "taken"),
    [
        ({"main": {}, "dev": MINE}, "dev", False, False),  # only main was looked at once
        ({"main": OURS, "dev": MINE}, "dev", False, False),
        ({"main": {}, "dev": MINE}, "dev", True, True),
        ({"main": MINE, "dev": {}}, "dev", False, True),
        ({"main": MINE, "dev": OURS}, "dev", False, True),
        ({"main": MINE}, "new", False, True),  # which begins with a copy of main's card
        ({"main": MINE, "dev": MINE}, "dev", False, True),  # the same, after an upload that was interrupted
        ({"main": MINE, "dev": {}}, None, False, False),
        ({"main": MINE, "dev": {}}, "main", False, False),
        ({"main": OURS, "dev": MINE}, None, False, True),
    ],
)
def test_the_card_of_the_branch_that_is_written_to_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, dict[str, bytes]], revision: str | None,
    overwrite: bool, taken: bool,
) -> None:  # fmt: skip
    hub = Branches(**files)
    hub.folder = tmp_path
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    (tmp_path / FILE).write_bytes(b"x")

    def push() -> None:
        upload("me/x", tmp_path / FILE, "card", {}, revision=revision, private=False, overwrite=overwrite)

    before = set(hub.files)
    if taken:
        push()
        assert hub.committed == (revision or "main")
        return
    with pytest.raises(
        StoreError, match=r"has a README\.md that bincompress did not write; nothing was uploaded"
    ) as no:
        push()
    assert (hub.committed, set(hub.files)) == ("", before)
    assert ("(branch dev)" in str(no.value)) == (revision == "dev")


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("x"), RecursionError(), struct.error("short")])
def test_a_download_that_cannot_be_checked_does_not_stay_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    blob, link = tmp_path / "blob", tmp_path / FILE

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("bincompress.store.hub.verify", fail)
    monkeypatch.setattr("bincompress.store.hub._opened", lambda path: path)
    for kind, raised in ((error, DamagedError), (KeyboardInterrupt(), KeyboardInterrupt)):
        error = kind
        blob.write_bytes(b"x")
        link.symlink_to(blob)
        with pytest.raises(raised):
            _check("me/x", link)
        assert not blob.exists()
        assert not link.is_symlink()


@pytest.mark.parametrize("case", ["cut64", "digits5000"])
def test_a_hostile_download_is_removed(tmp_path: Path, case: str) -> None:
    (tmp_path / FILE).write_bytes(hostile_packs()[case][0])
    with pytest.raises(DamagedError, match="came damaged, and was removed from the cache"):
        _check("me/x", tmp_path / FILE)
    assert not (tmp_path / FILE).exists()
