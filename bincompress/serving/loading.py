"""Does the model fit with what it is to do at once, and what is to be known of it?"""

from bincompress.errors import BincompressError
from bincompress.inference.generate import Model
from bincompress.inference.scheduler import Limits
from bincompress.model.cache import cache_bytes
from bincompress.process.machine import free_memory, size_text
from bincompress.reporting.inspection import inspect as inspect_store
from bincompress.store.store import open_store


def check_fits(store: str, model: Model, limits: Limits, context: int | None) -> None:
    """Refuse a context beyond the model's, and more texts at once than there is memory for.

    Raises BincompressError or TooLittleMemoryError.
    """
    config = model.decoder.config
    if context is not None and context > config.context:
        raise BincompressError(f"--context {context:,}: expected at most {config.context:,}, the model's limit")
    each = cache_bytes(config, min(limits.context, config.context), model.defaults.cache)
    free, limit = free_memory()
    if limits.parallel * each > free:
        raise BincompressError(
            f"{store}: {limits.parallel} texts of {min(limits.context, config.context):,} tokens need "
            f"{size_text(limits.parallel * each)} for their keys and values, {size_text(free)} are free "
            f"({limit}); give a smaller --parallel or --context"
        )


def facts_of(store: str, model: Model) -> dict[str, object]:
    """Return what is known of a store: its architecture, weights, bytes, and stored bits a weight."""
    total = inspect_store(open_store(store))["total"]
    binary = total["binary"]
    return {
        "family": model.decoder.config.declaration.model_type,
        "weights": total["weights"],
        "bytes": total["stored_bytes"],
        "bits": f"{total['stored_bits']:.2f} bits",
        "binary_bits": binary["stored_bits"] if binary["tensors"] else None,
        "trained": bool(total["trained"]),
    }
