"""A model's small files by name, as JSON."""

import json
from collections.abc import Mapping
from typing import Any

from bincompress.model.errors import TokenizerError
from bincompress.sources.json_files import other_kind


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """Return a file's JSON object, None if the model lacks the file; raises TokenizerError where it is not one."""
    if name not in files:
        return None
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: {pointer(files[name]) or f'not JSON: {error}'}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: expected an object, found {type(value).__name__}")
    return value


def pointer(content: bytes) -> str:
    """Return what to say of a file that is a Git LFS pointer, a page of HTML or the like, empty where it is none."""
    return other_kind(content)
