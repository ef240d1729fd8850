"""How callers hear of what is being done, where a count says it all."""

from collections.abc import Callable

OnCount = Callable[[int, int], None]  # pieces done, pieces in all


def uncounted(done: int, total: int) -> None:
    """Take no notice."""
