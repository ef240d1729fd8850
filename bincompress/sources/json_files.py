"""JSON files of a checkpoint: objects, and nothing that is no JSON."""

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bincompress.errors import CheckpointError

_LIMIT = 256 << 20  # bytes
_LFS = b"version https://git-lfs"
POINTER = "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file again"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; raises CheckpointError where it is missing or not one.

    Infinity and NaN, which Python reads and JSON does not have, become {"__float__": "Infinity"} and the like, as
    transformers 5 writes them, so that what is made of the object is JSON again.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a file")
        size = found.st_size
        if size > _LIMIT:
            raise CheckpointError(f"{path}: {size:,} bytes; expected at most {_LIMIT:,}")
        content = path.read_bytes()
        value = _finite(json.loads(content))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; expected a Hugging Face checkpoint (config.json, *.safetensors)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_other_kind(path)
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


_PAGE = "a page of HTML, not the file; download the file again (on the Hub: from its resolve/ address)"
_KINDS = (  # how files begin that have another name than what they hold
    (b"PK\x03\x04", "a zip file, as torch.save and archives make it"),
    (b"\x80\x02", "a pickle of PyTorch"),
    (b"GGUF", "a GGUF file; name it .gguf"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (
        b"<!doctype html",
        _PAGE,
    ),
    (b"<html", _PAGE),
    (b"<?xml", "an XML page, such as a server's refusal; download the file again"),
)


def other_kind(content: bytes) -> str:
    """Return what a file is that begins with these bytes and is no JSON or safetensors; empty where it is not known."""
    if begins_a_pointer(content):
        return POINTER
    begin = content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((says for mark, says in _KINDS if content.startswith(mark) or begin.startswith(mark)), "")


def begins_a_pointer(content: bytes) -> bool:
    """Return whether these first bytes are those of a Git LFS pointer, as a clone without git-lfs leaves them."""
    return content.startswith(_LFS)


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError where a file is a Git LFS pointer."""
    _refuse(path, lambda begin: POINTER if begins_a_pointer(begin) else "")


def refuse_other_kind(path: Path) -> None:
    """Raise CheckpointError where a file that cannot be read is a page of HTML, a zip file or another known kind."""
    _refuse(path, other_kind)


def _refuse(path: Path, kind: Callable[[bytes], str]) -> None:
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
    except OSError:
        return
    if says := kind(begin):
        raise CheckpointError(f"{path}: {says}")
