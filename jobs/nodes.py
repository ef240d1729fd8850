"""How many cores and how much memory have the nodes that are alive now?"""

import time
from typing import Any, cast

from bincompress.errors import BincompressError

PATIENCE_SECONDS = 60.0  # how long to wait for nodes when none can do what is left
_LOOK_SECONDS = 1.0


class Nodes:
    """A view of the cluster that is at most a second old: looking costs a message to the head."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._looked = float("-inf")
        self.cpus = 0
        self.largest_memory = 0  # bytes, of one node that has a core

    def look(self) -> None:
        """Bring the view up to date."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        useful = [node for node in alive if node.get("CPU", 0) >= 1]
        self.cpus = sum(int(node["CPU"]) for node in useful)
        self.largest_memory = max((int(node.get("memory", 0)) for node in useful), default=0)

    def hold(self, memory: int) -> bool:
        """Return whether some node could run a job that needs so many bytes, were it idle."""
        return self.cpus > 0 and memory <= self.largest_memory

    def none_for(self, what: str) -> BincompressError:
        """Return the error that no node has a core for what is left."""
        return BincompressError(
            f"no node of the Ray cluster has a core for {what}; start workers "
            "(`ray start --address=HEAD:6379`) and run the same command again to resume"
        )


def death_of(ray: Any, reference: Any, patience: float, what: str) -> Exception | None:
    """Wait for a task and return what it died of, None where it did not.

    Raises BincompressError once no node has had a core for so long: Ray itself would wait for ever. what: is left.
    """
    nodes = Nodes(ray)
    last_seen = time.monotonic()
    while not ray.wait([reference], timeout=_LOOK_SECONDS)[0]:
        nodes.look()
        if nodes.cpus:
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen >= patience:
            raise nodes.none_for(what)
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        return cast(Exception, error)
    return None
