"""The page to chat on: one file that asks nothing of elsewhere, under a policy that lets nothing else run."""

import base64
import hashlib
import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import bincompress
from bincompress.inference.load import load
from tests.serving import running

pytestmark = pytest.mark.slow
PAGE = Path(bincompress.__file__).parent / "serving" / "page.html"


class Elements(html.parser.HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(PAGE.read_text("utf-8"))
    return parser.found


def test_the_page_is_served_under_a_strict_policy(chat_store: Path) -> None:
    with running(chat_store, load(str(chat_store), threads=1)) as server:
        status, headers, content = server.raw("/")
        facts = server.ask("/facts")[1]
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert content == PAGE.read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.S)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inner).digest()).decode()}'"
    assert headers["x-content-type-options"] == "nosniff"
    used = set(re.findall(r"\bmodel\.(\w+)", PAGE.read_text("utf-8")))
    assert len(used) == 10
    assert used <= set(facts)


def test_nothing_is_asked_of_elsewhere(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        # Attributes that the policy forbids: handlers and styles of single elements.
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style")], tag
    assert "://" not in PAGE.read_text("utf-8")
    assert "innerHTML" not in PAGE.read_text("utf-8")


def test_controls_have_names_and_ids_are_there(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    text = PAGE.read_text("utf-8")
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\bat\("(\w+)"\)', text)) <= set(ids)
    labelled = re.findall(r"<label[^>]*>.*?</label>", text, re.S)
    for tag, attributes in elements:
        if tag in ("input", "select", "textarea"):
            own = f'id="{attributes["id"]}"'
            assert attributes.get("aria-label") or any(own in label for label in labelled), own
    assert dict(elements)["html"] == {"lang": "en"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which is not there")
def test_the_script_is_well_formed(tmp_path: Path) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", PAGE.read_text("utf-8"), re.S)
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)
