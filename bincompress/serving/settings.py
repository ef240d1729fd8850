"""How is a model served? Where it listens, who may ask, and how much of everything."""

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from bincompress.errors import BincompressError
from bincompress.sources.text import UTF_8

_LONGEST_KEY = 4096


@dataclass(frozen=True)
class ServeSettings:
    """Limits and places; times are in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    model_name: str = "model"
    api_keys: tuple[str, ...] = ()
    insecure: bool = False  # another host than this machine's without a key
    allowed_hosts: tuple[str, ...] = ()  # names by which it may be asked, beside this machine's own
    request_seconds: float = 600.0  # from a request to the end of its answer
    body_seconds: float = 30.0  # for a request's body to arrive
    stalled_seconds: float = 30.0  # that a client may take to read, or to begin a request
    closing_seconds: float = 2.5  # that answers at hand get to be finished when the server ends
    most_body: int | None = None  # None: 64 KiB and 64 bytes for each token of the context
    most_bodies: int = 64 << 20  # of requests that are being read
    most_choices: int = 16  # texts of one request: prompts times n
    most_connections: int = 1024
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.request_seconds < math.inf:
            raise BincompressError(f"--timeout: expected seconds above 0, found {self.request_seconds}")
        if not self.is_local and not self.api_keys and not self.insecure:
            raise BincompressError(
                f"--host {self.host} can be reached from other machines: give --api-key-file, "
                "or --insecure to let everyone in"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys of a file, one a line; lines that begin with # are comments."""
    try:
        lines = path.read_text(UTF_8).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BincompressError(f"{path}: the API keys cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise BincompressError(f"{path}: holds no API key; expected one a line")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or len(key) > _LONGEST_KEY:
            raise BincompressError(
                f"{path}: a key has characters that a header cannot carry; expected ASCII, no spaces"
            )
    return keys
