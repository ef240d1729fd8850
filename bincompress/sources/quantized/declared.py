"""What quantization_config says: untrusted, so every value is checked as it is read."""

from collections.abc import Iterator, Mapping
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.tensors.weight import TensorSource

WHERE = "config.json: quantization_config"
FLOATS = ("F32", "F16", "BF16")
_LARGEST = 1 << 24


class Reading(Mapping[str, Any]):
    """An object of quantization_config that remembers what was asked of it, so that nothing is left out silently."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Begin with nothing read."""
        self._given, self._read = given, set[str]()

    def __getitem__(self, name: str) -> Any:
        """Return a field."""
        self._read.add(name)
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all fields."""
        return iter(self._given)

    def __len__(self) -> int:
        """Return how many fields there are."""
        return len(self._given)

    def left_over(self, idle: tuple[str, ...]) -> list[str]:
        """Return the fields with a value that nothing asked for, but for those that change no value of a weight."""
        given = self._given.items()
        empty: tuple[Any, ...] = (None, False, [], {})
        return sorted(
            ascii(name)[1:-1][:60] for name, value in given if name not in {*self._read, *idle} and value not in empty
        )


def whole(declared: Mapping[str, Any], *names: str, default: int | None = None, least: int = 1) -> int:
    """Return a whole number by the first of these names that is there."""
    name = next((name for name in names if declared.get(name) is not None), names[0])
    value = declared.get(name, default)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= _LARGEST:
        raise CheckpointError(f"{WHERE}: {name}: expected a whole number from {least}, found {value!r:.60}")
    return value


def one_of(declared: Mapping[str, Any], name: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """Return a value that has to be one of these."""
    value = declared.get(name, default)
    value = default if value is None else value
    if not any(type(value) is type(entry) and value == entry for entry in known):
        listed = ", ".join(repr(entry) for entry in known)
        raise CheckpointError(f"{WHERE}: {name} = {value!r:.60} is not read; known: {listed}")
    return value


def names(declared: Mapping[str, Any], *fields: str) -> list[str]:
    """Return a list of names by the first of these fields that is there."""
    field = next((field for field in fields if declared.get(field)), fields[0])
    value = declared.get(field) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise CheckpointError(f"{WHERE}: {field}: expected a list of names, found {value!r:.60}")
    return value


def absent(declared: Mapping[str, Any], *fields: str) -> None:
    """Raise CheckpointError where a field is given that changes what the tensors mean and is not read."""
    for field in fields:
        if declared.get(field):
            raise CheckpointError(f"{WHERE}: {field} = {declared[field]!r:.60} is not read")


def pair(value: Any, field: str) -> tuple[int, int]:
    """Return the rows and columns of a block."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n <= _LARGEST for n in value):
        raise CheckpointError(f"{WHERE}: {field}: expected rows and columns of a block, found {value!r:.60}")
    return value[0], value[1]


def check(part: TensorSource, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]], why: str) -> TensorSource:
    """Return a part of a quantized tensor; raises CheckpointError where its dtype or shape is another."""
    if part.dtype not in dtypes:
        raise CheckpointError(f"{part.name}: dtype {part.dtype}; expected {' or '.join(dtypes)} ({why})")
    if part.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise CheckpointError(f"{part.name}: shape {list(part.shape)}; expected {expected} ({why})")
    return part


def scale_shapes(rows: int, cols: int, block: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return the shapes that scales of such blocks may have."""
    counts = (-(-rows // block[0]), -(-cols // block[1]))
    if counts == (1, 1):
        return [(), (1,), (1, 1)]
    return [counts, (rows,)] if counts == (rows, 1) else [counts]


def block_words(block: tuple[int, int], rows: int, cols: int) -> str:
    """Return what one scale is of, for a summary."""
    if block[0] >= rows and block[1] >= cols:
        return "one scale"
    if block[0] == 1:
        return "a scale a row" if block[1] >= cols else f"groups of {block[1]}"
    return f"blocks of {block[0]} x {block[1]}"
