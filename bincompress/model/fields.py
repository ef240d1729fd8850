"""Single values of config.json, which is untrusted: read by name, checked, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from bincompress.model.errors import ConfigError

LARGEST = 1 << 24  # no size of a known model comes near; far larger ones would exhaust the memory
LARGEST_POSITION = 1 << 31
_LARGEST_NUMBER = 1e30  # its products with other such fields are still numbers


def count(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """Return a whole number of zero or more; the default where the field is absent or null."""
    value = raw.get(field)
    if value is None:
        value = default
    if type(value) is not int or value < 0:
        raise ConfigError(f"config.json: {field}: expected a whole number, found {shown(value)}")
    return value


def size(raw: Mapping[str, Any], field: str, default: int | None = None, limit: int = LARGEST) -> int:
    """Return a whole number of 1 to the limit; the default where the field is absent or null."""
    value = count(raw, field, default)
    if not 0 < value <= limit:
        raise ConfigError(f"config.json: {field}: expected 1 to {limit}, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value as config.json has it, in at most 80 characters."""
    not_finite = value.get("__float__") if isinstance(value, dict) and len(value) == 1 else None
    return not_finite if isinstance(not_finite, str) else f"{value!r:.80}"  # see sources/json_files.py


def number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """Return a positive number of 1e-30 to 1e30; the default where the field is absent or null."""
    value = raw.get(field)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {field}: expected a positive number, found {shown(value)}")
    if not 1 / _LARGEST_NUMBER <= value <= _LARGEST_NUMBER:
        raise ConfigError(
            f"config.json: {field}: expected a number from {1 / _LARGEST_NUMBER:g} to {_LARGEST_NUMBER:g}, found "
            f"{value!r:.80}"
        )
    return float(value)


def flag(raw: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """Return true or false; the default where the field is absent, false where it is null."""
    value = raw.get(field, default)
    if value not in (None, True, False) or type(value) is int:
        raise ConfigError(f"config.json: {field}: expected true or false, found {shown(value)}")
    return bool(value)
