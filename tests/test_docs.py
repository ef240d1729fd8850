"""Do the pages tell of things that are there: links, commands, options, benchmarks, Python?"""

import ast
import functools
import re
import shlex
import textwrap
from pathlib import Path

import click
import pytest

from bincompress.cli import group

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = group.list_commands(click.Context(group))
# So many command lines at least, so that a page of another shape does not pass without a look.
LEAST = {"README.md": 6, "docs/guide/compress.md": 11, "docs/guide/distil.md": 5, "docs/guide/run.md": 4}

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_BLOCK = re.compile(r"(?:^ {4}.*\n(?:[ \t]*\n(?= {4}))?)+", re.M)


def content(name: str) -> str:
    """Return a page without its comments."""
    return re.sub(r"<!--.*?-->", "", (ROOT / name).read_text("utf-8"), flags=re.S)


def blocks(name: str) -> list[str]:
    """Return the indented blocks of a page."""
    return [textwrap.dedent(found[0]) for found in _BLOCK.finditer(content(name)) if found[0].startswith("    ")]


def inline(name: str) -> list[str]:
    """Return what stands between backticks, on one line each."""
    prose = _BLOCK.sub("", re.sub(r"```.*?```", "", content(name), flags=re.S))
    return [" ".join(found.split()) for found in _CODE.findall(prose)]


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    return {slug(found) for found in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)}


def verb(name: str) -> click.Command:
    """Return a command of bincompress."""
    found = group.get_command(click.Context(group), name)
    assert found is not None, f"bincompress has no command {name!r}"
    return found


@functools.cache
def options_of(name: str) -> set[str]:
    """Return the options of a command."""
    return {option for parameter in verb(name).params for option in parameter.opts if option.startswith("-")}


@functools.cache
def all_options() -> set[str]:
    """Return the options of all commands together."""
    return {"--help", "--debug"}.union(*(options_of(name) for name in COMMANDS))


def command_lines(name: str) -> list[str]:
    """Return the command lines of bincompress that stand in a page's blocks."""
    parts = [part for block in blocks(name) for line in block.splitlines() for part in line.split("&&")]
    return [part for part in parts if re.match(r"\s*bincompress [a-z]", part)]


def parse(line: str) -> None:
    """Read a command line as bincompress does, without running it; raises click's errors."""
    words = shlex.split(line, comments=True)
    words = words[words.index("bincompress") + 1 :]
    if words[:1] == ["--debug"]:
        words = words[1:]
    if words and words[0] not in ("--help", "--version") and "..." not in words:
        with verb(words[0]).make_context(words[0], words[1:]):
            pass


def test_the_pages_are_there() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/format.md", "docs/guide/compress.md"} <= set(NAMES)


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    readme = blocks("README.md")
    assert "pip install . && bincompress demo\n" in readme
    assert "pip install -e '.[test]' && pytest\n" in readme


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    for target in _LINK.findall(content(name)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists(), f"{name}: {target}"
        assert found.is_relative_to(ROOT), f"{name}: {target}"
        assert not anchor or anchor in anchors(found), f"{name}: {target}; there are {sorted(anchors(found))}"


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_parse(name: str) -> None:
    shown = command_lines(name)
    assert len(shown) >= LEAST.get(name, 0)
    for line in shown:
        parse(line)
    for text in inline(name):
        if text.startswith(("bincompress ", "python -m bincompress ")):
            words = shlex.split(text)
            words = words[words.index("bincompress") + 1 :]
            if words[0].startswith("-"):
                continue
            given = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
            assert given <= options_of(words[0]) | {"--help"}, f"{name}: {text}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_options_that_are_named_exist(name: str) -> None:
    for text in inline(name):
        if text.split()[0] in ("lm_eval", "pip", "pytest", "python", "ruff"):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            assert option in all_options(), f"{name}: {text}"


@pytest.mark.parametrize("name", NAMES)
def test_figures_name_programs_that_exist(name: str) -> None:
    if name == "docs/figures.md":
        assert content(name).count("Figures: `") > 8
    commands = re.findall(r"Figures:\s+`([^`]+)`", content(name))
    commands += [text for text in inline(name) if text.startswith(("python -m benchmarks", "python benchmarks"))]
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python", command
        if words[1:3] == ["-m", "bincompress"]:
            parse(shlex.join(words[2:]))
            continue
        file = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        assert (ROOT / file).is_file(), f"{name}: {command}"
        source = (ROOT / file).read_text("utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, f"{name}: {command}: {option}"


@pytest.mark.parametrize("name", NAMES)
def test_python_is_python(name: str) -> None:
    shown = [block for block in blocks(name) if re.match(r"(import|from) \w", block)]
    assert shown or name != "docs/python.md"
    for block in shown:
        ast.parse(block)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_texts_parse(name: str) -> None:
    lines = [line.strip() for line in (verb(name).help or "").splitlines()]
    examples = [line for line in lines if line.startswith("bincompress ")]
    assert examples, f"{name}: its help has no example"
    for line in examples:
        parse(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bincompress compress ./model ./store --bit-width 3", "No such option"),
        ("bincompress compress ./model ./store --block 65", "expected one of"),
        ("bincompress calibrate ./model ./stats", "Missing parameter: text"),
        ("bincompress compress ./model", "Missing parameter: store"),
        ("bincompress verify ./store ./other", "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_is_found(line: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        parse(line)
