"""Is a tensor's report, which nothing but its seal vouches for, one that can be shown and added up?"""

import math
from typing import Any

_WHOLE = ("groups", "stored_bytes", "weights")
_NUMBERS = ("nominal_bits", "stored_bits", "relative_error", "squared_error", "squared_norm")
_LARGEST = 1e200  # far from where sums over tensors overflow
LARGEST_WHOLE = 1 << 62
_LARGEST_BITS = 1e9
_MOST_NUMBERS = 1 << 16  # of a list, such as a histogram's counts
_LARGEST_COUNT = 1 << 48
_LONGEST = 1 << 16  # characters of a note


def report_problem(report: Any) -> str:
    """Return what is wrong with a tensor's report; empty where it is as a run writes it."""
    if not isinstance(report, dict):
        return f"report: {report!r:.40}; expected an object"
    if not isinstance(report.get("method"), str):
        return f"report: method: {report.get('method')!r:.40}; expected a name"
    for key in (*_WHOLE, *_NUMBERS):
        value = report.get(key)
        if not _is_number(value) or (key in _WHOLE and not isinstance(value, int)):
            return f"report: {key}: {value!r:.40}; expected a number"
    if max(report["nominal_bits"], report["stored_bits"]) > _LARGEST_BITS:
        return f"report: more than {_LARGEST_BITS:g} bits a weight"
    for key, value in report.items():
        parts = value.values() if isinstance(value, dict) else [value]
        if not all(_is_plain(part) or _is_list(part) for part in parts):
            return f"report: {key!r:.60}: {value!r:.40}; expected a text, a number or a list of numbers"
    kept = report.get("histogram")
    if kept is not None and not _is_histogram(kept):
        return f"report: histogram: {kept!r:.40}; expected low, high and counts"
    zeros = report.get("plane_zeros", [0.0])
    if not _is_list(zeros):
        return f"report: plane_zeros: {zeros!r:.40}; expected a list of numbers"
    saved = report.get("additions_saved", 0)
    return "" if _is_number(saved) else f"report: additions_saved: {saved!r:.40}; expected a number"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number from 0 that can be added up."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= (LARGEST_WHOLE if isinstance(value, int) else _LARGEST)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and _is_number(abs(value)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_NUMBERS and all(_is_number(part) for part in value)


def _is_histogram(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_list(value.get("counts")):
        return False
    if not all(isinstance(count, int) and count < _LARGEST_COUNT for count in value["counts"]):
        return False
    low, high = value.get("low"), value.get("high")
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    return bool(numbers and math.isfinite(low) and math.isfinite(high) and low < high)  # type: ignore[arg-type,operator]
