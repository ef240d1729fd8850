"""Do imports go one way, does a module know only what it needs, do functions stay short? Read from the sources."""

import ast
import dataclasses
import graphlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from bincompress import methods

ROOT = Path(__file__).resolve().parents[1]
TOP_PACKAGES = ("bincompress", "cpu_kernels", "jobs")

# A part of bincompress imports only parts before it.
ORDER = [
    "errors",
    "process",
    "tensors",
    "methods",
    "sources",
    "store",
    "model",
    "calibration",
    "compression",
    "inference",
    "exporting",
    "scoring",
    "lm_eval",
    "reporting",
    "serving",
    "distillation",
    "api",
    "commands",
    "cli",
    "__main__",
]

# Imports of later parts, with the reason: each happens within a function, when it is called.
LATER_IN_FUNCTIONS = {
    ("bincompress.sources.shapes", "model"): "a folder of config.json alone: its architecture knows the shapes",
    ("bincompress.model.runnable", "inference"): "a plan tells what generating and chatting will refuse",
}
LATER_FOR_TYPES = {
    ("bincompress", "api"): "type checkers see its functions, which are imported when they are asked for",
}
LONGEST = {"bincompress": 60, "cpu_kernels": 100, "jobs": 60}
LONGER: dict[str, str] = {}

METHODS = tuple(method.name for method in methods.METHODS)

When = Literal["import", "function", "types"]


@dataclasses.dataclass(frozen=True)
class Import:
    """A module that another imports, and when."""

    by: str
    of: str
    when: When


@cache
def modules() -> dict[str, Path]:
    found = {}
    for top in TOP_PACKAGES:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(name: str, path: Path) -> list[Import]:
    """Return what a module imports of this repository."""
    known = modules()

    def visit(node: ast.AST, when: When) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = when
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "function"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "types"
            if isinstance(child, ast.Import):
                yield from (Import(name, alias.name, when) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                # Relative ones are used in jobs alone, which may be imported under another name.
                assert not child.level or name.startswith("jobs"), f"{name}: relative imports are not used here"
                module = ".".join(filter(None, ["jobs" if child.level else "", child.module or ""]))
                for alias in child.names:
                    full = f"{module}.{alias.name}"
                    yield Import(name, full if full in known else module, when)
            yield from visit(child, inner)

    return [found for found in visit(tree_of(path), "import") if found.of.split(".")[0] in TOP_PACKAGES]


@cache
def all_imports() -> list[Import]:
    return [found for name, path in modules().items() for found in imports_of(name, path)]


def part(module: str) -> str | None:
    """Return which part of bincompress a module belongs to; the package itself holds its version alone."""
    names = module.split(".")
    return names[1] if names[0] == "bincompress" and len(names) > 1 else None


def goes_later(found: Import) -> bool:
    """Return whether an import within bincompress goes against the order."""
    by, of = part(found.by), part(found.of)
    if not found.by.startswith("bincompress") or of is None or by == of:
        return False
    return by is None or ORDER.index(of) > ORDER.index(by)


def test_every_part_has_its_place_in_the_order() -> None:
    parts = {part(module) for module in modules()} - {None}
    assert parts - set(ORDER) == set()


def test_parts_import_only_parts_before_them() -> None:
    assert [found for found in all_imports() if found.when == "import" and goes_later(found)] == []


def test_later_parts_are_imported_within_functions_only_where_listed() -> None:
    for when, listed in (("function", LATER_IN_FUNCTIONS), ("types", LATER_FOR_TYPES)):
        found = {(each.by, part(each.of)) for each in all_imports() if each.when == when and goes_later(each)}
        assert found == set(listed), f"{when}: an import is not listed, or a listed one is gone"


def test_kernels_know_nothing_but_kernels() -> None:
    others = [f for f in all_imports() if f.by.startswith("cpu_kernels") and not f.of.startswith("cpu_kernels")]
    assert others == []


def test_jobs_are_imported_by_their_place_alone() -> None:
    """A folder of that name may lie where the user is: see process/own_jobs.py."""
    assert [
        found for found in all_imports() if found.of.split(".")[0] == "jobs" and not found.by.startswith("jobs")
    ] == []


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.when != "types":
            graph.setdefault(found.by, set()).add(found.of)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert "bincompress.errors" in order


def test_packages_of_kernels_have_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        by, of = (".".join(name.split(".")[:2]) for name in (found.by, found.of))
        if by.startswith("cpu_kernels") and by != of:
            graph.setdefault(by, set()).add(of)
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order[:2] == ["cpu_kernels.errors", "cpu_kernels.jit"]


def documentation(tree: ast.Module) -> set[int]:
    """Return the nodes that are docstrings, by identity."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, holders)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def names_of_methods(name: str, path: Path) -> Iterator[str]:
    """Yield where a module names a method: in a string that is no docstring, or by importing its file."""
    tree = tree_of(path)
    documents = documentation(tree)
    # "uniform" is a word of its own, so it counts only where it is all that the string says.
    words = ("uniform", "lossless")  # which are plain English, too; and reports say of a tensor that it is lossless
    named = re.compile(rf"^uniform$|\b({'|'.join(method for method in METHODS if method not in words)})\b")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in documents:
            continue
        if named.search(node.value):
            yield f"{name}:{node.lineno}: {node.value!r}"
    for found in imports_of(name, path):
        if found.of in {f"bincompress.methods.{method}" for method in METHODS}:
            yield f"{name}: imports {found.of}"


def test_no_module_outside_methods_names_a_method() -> None:
    others = {name: path for name, path in modules().items() if part(name) != "methods"}
    assert [place for name, path in others.items() for place in names_of_methods(name, path)] == []


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield every function's full name and its lines, from `def` to its end."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                yield name, node.end_lineno - node.lineno + 1
            yield from functions(node, name)
        else:
            yield from functions(node, prefix)


def test_functions_are_short() -> None:
    lengths = {
        function: lines for name, path in modules().items() for function, lines in functions(tree_of(path), name)
    }
    longer = {name: lines for name, lines in lengths.items() if lines > LONGEST[name.split(".")[0]]}
    assert set(longer) - set(LONGER) == set(), longer
    assert set(LONGER) - set(longer) == set(), "short by now: take it out of the list"


@pytest.mark.parametrize("package", TOP_PACKAGES)
def test_packages_tell_type_checkers_that_they_have_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]


def test_kernels_have_no_cached_properties() -> None:
    """Before Python 3.12 these share one lock, which an interrupt can leave held: other threads then wait forever."""
    found = [name for name, path in modules().items() if part(name) == "cpu_kernels" or name.startswith("cpu_kernels.")]
    assert [name for name in found if "cached_property" in modules()[name].read_text(encoding="utf-8")] == []
