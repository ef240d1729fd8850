"""Is anybody at the address of a Ray cluster? Ray itself asks for minutes, and does not say whom."""

import os
import socket
import tempfile
from pathlib import Path

from bincompress.errors import BincompressError

_CONNECT_SECONDS = 10.0


def check_address(address: str | None) -> None:
    """Raise BincompressError, saying where the address comes from, if no one answers there."""
    where, found = _source(address)
    host, _, port = found.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise BincompressError(
            f"no Ray cluster answers at {found}, the address in {where} ({error.strerror or error}); start one "
            "(`ray start --head`), correct it, or give `--address local` for a cluster of this run's own"
        ) from None


def begins_one(address: str | None) -> bool:
    """Return whether ray.init begins a cluster of this run's own."""
    return _source(address)[1] in ("", "local")


def _source(address: str | None) -> tuple[str, str]:
    """Return where ray.init takes the address from, and the address; empty where it begins a cluster of its own."""
    if address not in (None, "auto"):
        return "--address", str(address)
    if os.environ.get("RAY_ADDRESS"):
        return "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    if os.environ.get("RAY_TMPDIR") is None and not file.exists():
        file = Path("/tmp/ray/ray_current_cluster")
    try:
        return f"the file {file}, which an earlier cluster left", file.read_text("utf-8").strip()
    except (OSError, ValueError):
        return "", ""
