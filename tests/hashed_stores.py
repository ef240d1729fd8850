"""How what a store says of itself is changed, for the tests of integrity."""

import json
from pathlib import Path
from typing import Any

from bincompress.store.layout import SEAL

NAME = "model.layers.1.mlp.up_proj.weight"


def change(path: Path, **changes: Any) -> None:
    """Change attributes in a zarr.json; `...` removes one."""
    node = json.loads(path.read_text())
    node["attributes"] = {k: v for k, v in {**node["attributes"], **changes}.items() if v is not ...}
    path.write_text(json.dumps(node, indent=2))


def node_at(store: Path, name: str) -> Path:
    return store / ("tensors" if "proj" in name else "plain") / name / "zarr.json"


def without_seals(store: Path) -> None:
    for path in store.rglob("zarr.json"):
        if SEAL in json.loads(path.read_text())["attributes"]:
            change(path, **{SEAL: ...})
