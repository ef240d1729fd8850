"""How is the Hub asked so that every answer, and every wait for one, ends; and did a file come as it is there?"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bincompress.errors import CheckpointError

ANSWER_SECONDS = 20.0  # for the Hub to say anything
_SHA256 = re.compile(r"[0-9a-f]{64}")


def asked(seconds: float) -> Any:
    """Return huggingface_hub, with this bound on each answer, and none of the waits that a server may ask for."""
    import huggingface_hub

    session = huggingface_hub.get_session()
    session.timeout = seconds  # its client waits for ever by itself
    hooks = session.event_hooks
    if _not_told_to_wait not in hooks["response"]:
        hooks["response"] = [*hooks["response"], _not_told_to_wait]
        session.event_hooks = hooks
    return huggingface_hub


def _not_told_to_wait(response: Any) -> None:
    """Remove what the client would sleep for, an hour if the answer says so: its own waits are 1 to 8 s, five times."""
    for name in ("retry-after", "ratelimit"):
        if name in response.headers:
            del response.headers[name]


def in_cache(repo: str, names: Iterable[str], commit: str) -> set[str]:
    """Return those of a commit's files that lie in the cache."""
    import huggingface_hub

    return {
        name for name in names if isinstance(huggingface_hub.try_to_load_from_cache(repo, name, revision=commit), str)
    }


def check_sums(repo: str, folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where a large file that has just come has not the SHA-256 by which the cache calls it.

    The client itself looks at sizes alone. What is damaged is removed from the cache, so that it is fetched again.
    """
    damaged = ""
    for name in names:
        blob = (folder / name).resolve()
        if not _SHA256.fullmatch(blob.name):
            continue  # a small file, which Git keeps, or a system without links
        try:
            with open(blob, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except BaseException:  # Ctrl-C among them: what was not checked to its end would not be checked again
            forget(folder / name)
            raise
        if found != blob.name:
            forget(folder / name)
            damaged = damaged or f"{name}: SHA-256 {found[:12]}..., the Hub says {blob.name[:12]}..."
    if damaged:
        raise CheckpointError(
            f"{repo}: came damaged, and was removed from the cache: {damaged}; run the same command again"
        )


def forget(path: Path) -> None:
    """Remove a download from the cache: the file, and the link to it by which it is found."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
