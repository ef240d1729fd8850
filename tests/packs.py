"""A packed store and how one is put together by hand, for the tests of packed stores."""

import io
import zlib
from pathlib import Path
from typing import Any

from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store import zip_format

UP = "tensors/model.layers.1.mlp.up_proj.weight"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_zip(entries: dict[str, bytes]) -> bytes:
    """Return a file of the form, from these entries in this order."""
    out, found = io.BytesIO(), []
    for name, content in entries.items():
        entry = zip_format.Entry(name, out.tell(), len(content), zlib.crc32(content))
        out.write(entry.header + content)
        found.append(entry)
    out.write(zip_format.directory(found))
    return out.getvalue()


def logits(store: str | Path) -> Any:
    decoder = load_decoder(str(store), 1, ActivationSettings()).decoder
    return decoder.next_logits([1, 5, 9, 2], decoder.new_cache(8))
