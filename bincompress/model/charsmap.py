"""Is a tokenizer.json one that the tokenizers library can read without ending the process?

Its `Precompiled` normalizers hold a trie whose first four bytes say how long it is. The library takes so much memory
without looking, up to 8 GB, and aborts where there is not so much. Source: spm_precompiled, parse.
"""

import base64
import binascii
import json
import re
from typing import Any

from bincompress.model.errors import TokenizerError

_KEY = "precompiled_charsmap"
_MAYBE = re.compile(rb"precompiled_charsmap|\\u00[4-7]")  # or its letters escaped, which no writer does


def check_charsmaps(data: bytes) -> None:
    """Raise TokenizerError where a precompiled map of characters in tokenizer.json is not as long as it says."""
    if _MAYBE.search(data) is None:
        return
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json: cannot be read: {error}") from None
    waiting: list[Any] = [found]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if node.get(_KEY) is not None and not _is_sound(node[_KEY]):
                raise TokenizerError(
                    f"tokenizer.json: {_KEY}: {node[_KEY]!r:.40} is not a trie and its texts; download the file again"
                )
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _is_sound(charsmap: Any) -> bool:
    if not isinstance(charsmap, str):
        return False
    try:
        content = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, ValueError):
        return False
    size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or size % 4 or size > len(content) - 4:
        return False
    try:
        content[4 + size :].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
