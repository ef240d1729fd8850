"""Which forms can a packed tensor have in a store?"""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from bincompress.tensors import low_rank, packed
from bincompress.tensors.low_rank import LowRankTensor, assemble_low_rank
from bincompress.tensors.packed import PackedTensor

Stored = PackedTensor | LowRankTensor

ARRAYS = (*packed.ARRAYS, *low_rank.ARRAYS, *packed.LISTED)  # of any form, in the order in which they are read


def is_low_rank(attributes: Mapping[str, Any]) -> bool:
    """Return whether a packed tensor with these attributes has the low-rank form."""
    return "rank" in attributes


def always(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the arrays that a packed tensor with these attributes has in any case."""
    return low_rank.ARRAYS if is_low_rank(attributes) else packed.ALWAYS


def assemble(attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Stored:
    """Return the packed tensor of a store's attributes and arrays, by their names in it.

    Raises ValueError where they do not fit together or to the format, KeyError or TypeError where an attribute is
    missing or of another kind.
    """
    return assemble_low_rank(attributes, arrays) if is_low_rank(attributes) else packed.assemble(attributes, arrays)
