"""The top-level package `jobs` of this installation, though a folder of that name may lie where the user is."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_ELSE = "bincompress_jobs"  # its name where `jobs` is somebody else's


def own_jobs(name: str) -> Any:
    """Return the module jobs.NAME that lies beside this package."""
    place = Path(__file__).resolve().parents[2] / "jobs"
    if _folder(sys.modules.get("jobs")) != place and _found("jobs") != place:
        if _ELSE not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                _ELSE, place / "__init__.py", submodule_search_locations=[str(place)]
            )
            assert spec is not None
            assert spec.loader is not None
            package = importlib.util.module_from_spec(spec)
            sys.modules[_ELSE] = package
            spec.loader.exec_module(package)
        return importlib.import_module(f"{_ELSE}.{name}")
    return importlib.import_module(f"jobs.{name}")


def _folder(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve().parent if file else None


def _found(name: str) -> Path | None:
    """Return the folder of the package that an import would find; None where one is imported already."""
    if name in sys.modules:
        return None
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
