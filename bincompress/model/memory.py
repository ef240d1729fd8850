"""How much memory does a process take that runs a model? Counted before it does, from what its tensors take."""

from collections.abc import Mapping, Sequence

from bincompress.model.cache import cache_bytes
from bincompress.model.config import ModelConfig
from bincompress.model.lowering import MOST_PLANES

# Resident in `bincompress generate` of a 0.5B model with two threads, beside what is counted: 141 to 154 MB, measured
# as docs/guide/choose-bits.md says.
BASE_BYTES = 157_000_000
_TOKENIZER_SHARE = 4.3  # bytes in memory for each of tokenizer.json's
_MAPPED_SHARE = 0.15  # of a table in the store's files: pages around the rows that were used last


def process_bytes(config: ModelConfig, sizes: Mapping[str, int], tokenizer: int, context: int) -> tuple[int, int]:
    """Return the bytes of what is loaded for a model and of the rest of the process.

    sizes: bytes of each tensor as it is laid out; of an embedding that is not the output head too, which stays in the
    store's files, a part counts. tokenizer: bytes of tokenizer.json. context: tokens whose keys and values are held, in
    16 bits.
    """
    table = config.declaration.names.embedding
    matrices = sum(size if config.tied or name != table else int(_MAPPED_SHARE * size) for name, size in sizes.items())
    return matrices + cache_bytes(config, context, "float16"), BASE_BYTES + int(_TOKENIZER_SHARE * tokenizer)


def planes_beside(planes: int, terms: int) -> int:
    """Return how many planes more than the stored ones the kernels read: each term is one, also where terms share some.

    planes: stored. terms: that are multiplied, without an offset. Matrices with more than the kernels multiply are
    decoded from what is stored.
    """
    return max(0, terms - planes) if terms <= MOST_PLANES else 0


def planes_beside_stored(terms: Sequence[int]) -> int:
    """Return `planes_beside` of a stored tensor, whose terms are bit masks over its planes."""
    return planes_beside(max(terms, default=0).bit_length(), sum(term != 0 for term in terms))
