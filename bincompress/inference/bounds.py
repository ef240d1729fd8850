"""How much may a chat template do? Time, and what its values may take, so that none hangs or fills the memory.

A template's loops and macros tell `Budget.tick` that they go on, and what makes text or lists asks first: `sandbox`.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError

_SECONDS = 1.0  # of this thread's own CPU time; templates of real models take milliseconds
_LONGEST = 1 << 24  # characters of one text
_MOST_ITEMS = 1 << 20  # of a list, with all that is in it
_MOST_BYTES = 1 << 28  # of everything that is made while one prompt is rendered
_WIDEST = 1 << 12  # characters of padding or indentation
_LARGEST_BITS = 1 << 17  # of a whole number
_LARGEST_POWER = 4096
_NESTED = 100  # levels of lists in lists
_SIZED = (str, list, tuple)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d{1,20})?(?:\.(\*|\d{1,20}))?")

# Filters and methods of texts whose numbers are widths or counts.
_WIDTHS = {"center", "indent", "tojson", "batch", "slice", "ljust", "rjust", "zfill", "expandtabs", "lipsum", "round"}
# Filters that look at a value's items and no deeper; the others may write it out.
_SHALLOW = {
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map",
    "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice",
}  # fmt: skip


class Budget(threading.local):
    """What the template that a thread is rendering has left."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin with a template."""
        self._until = time.thread_time() + _SECONDS
        self._bytes = _MOST_BYTES

    def tick(self, characters: int = 0) -> None:
        """Note that a loop or a macro goes on and has written so much; raises SecurityError when time is up."""
        if time.thread_time() > self._until:
            raise SecurityError(f"takes longer than {_SECONDS:g} s; expected a template that ends")
        self.take(characters)

    def take(self, size: int) -> None:
        """Note that so many bytes are made; raises SecurityError where it is too much."""
        self._bytes -= size
        if self._bytes < 0:
            raise SecurityError(f"makes more than {_MOST_BYTES:,} bytes of values; expected a text that fits a context")

    def made(self, value: Any) -> Any:
        """Return a value that was made, with its size noted."""
        if isinstance(value, str | bytes | list | tuple | dict | int):
            self.take(sys.getsizeof(value) if sys.getsizeof(value) > 100 else 0)
        return value

    def writable(self, value: Any) -> Any:
        """Return a value that may be written out as text: a list in a list, in a list ... may be endless."""
        if isinstance(value, list | tuple | dict):
            self.take(weight_of(value))
        elif isinstance(value, str):
            self.take(len(value))
        return value

    def joined(self, *values: Any) -> str:
        """Return `a ~ b`."""
        parts = [str(self.writable(value)) for value in values]
        _check_length("", sum(map(len, parts)))
        return str(self.made("".join(parts)))

    def collected(self, value: Any) -> Any:
        """Return a list or the like that a template has put together, where all that is in it is not too much."""
        weight_of(value)
        return value


def weight_of(value: Any) -> int:
    """Return how many characters and items a value has, what is in it twice counted twice; raises SecurityError."""
    items, total, waiting = 0, 0, [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, str):
            total += len(node)
        elif isinstance(node, list | tuple | dict):
            items += len(node)
            if items > _MOST_ITEMS or depth > _NESTED:
                raise SecurityError(f"a list of more than {_MOST_ITEMS:,} items or {_NESTED} levels is out of bounds")
            waiting += [(item, depth + 1) for item in (node.values() if isinstance(node, dict) else node)]
    return total + items


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError where left + right, left * right, left ** right or left % right would be too much."""
    if operator == "**" and (abs(left) > _LARGEST_POWER or abs(right) > _LARGEST_POWER):
        raise SecurityError(f"power {left!r:.40} ** {right!r:.40} is out of bounds")
    if operator == "%" and isinstance(left, str):
        check_percent(left, (right,))
    if operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
        _check_length(left, len(left) + len(right))
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(one, _SIZED) and isinstance(times, int):
                _check_length(one, len(one) * times)
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _LARGEST_BITS:
            raise SecurityError("a whole number of so many digits is out of bounds")


def check_percent(form: str, values: tuple[Any, ...]) -> None:
    """Raise SecurityError where `form % values` asks for more than a text is wide."""
    widths = [int(width) for found in _PERCENT.findall(form) for width in found if width.isdecimal()]
    if any("*" in found for found in _PERCENT.findall(form)):
        widths += [abs(value) for value in _flat(values) if type(value) is int]
    _check_widths(form, widths)


def check_spec(spec: str) -> None:
    """Raise SecurityError where a field of `str.format` asks for more than a text is wide."""
    _check_widths(spec, [int(found[:20]) for found in re.findall(r"\d+", spec)])


def _check_widths(form: str, widths: list[int]) -> None:
    if max([0, *widths]) > _WIDEST:
        raise SecurityError(f"format {form!r:.40} is out of bounds; expected widths of at most {_WIDEST}")


def _flat(values: tuple[Any, ...]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else (value,))]


def _check_length(value: Any, length: int) -> None:
    limit = _LONGEST if isinstance(value, str) else _MOST_ITEMS
    if length > limit:
        what = "characters" if isinstance(value, str) else "items"
        raise SecurityError(f"repetition or sum of {length:,} {what} is out of bounds; expected at most {limit:,}")


def check_call(name: str, value: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raise SecurityError where a filter, or a text's method, would make too much of a value."""
    given = (*arguments, *named.values())
    if name in _WIDTHS:
        for argument in given:
            if type(argument) is int and abs(argument) > _WIDEST:
                raise SecurityError(f"{name}: {argument!r:.40} is out of bounds; expected at most {_WIDEST}")
            if isinstance(argument, str) and len(argument) > _WIDEST:
                raise SecurityError(f"{name}: a text of {len(argument):,} characters; expected at most {_WIDEST:,}")
    if name == "indent" and isinstance(value, str):
        _check_length("", len(value) + (value.count("\n") + 1) * max([4, *(_size(argument) for argument in given)]))
    if name == "expandtabs":
        _check_length("", len(value) + value.count("\t") * max([8, *(_size(argument) for argument in given)]))
    texts = [argument for argument in given if isinstance(argument, str)]
    if name == "replace" and isinstance(value, str) and len(texts) > 1:
        _check_length("", len(value) + (value.count(texts[0]) + 1) * len(texts[1]))
    if name == "join" and isinstance(value, list | tuple | dict):
        _check_length("", weight_of(value) + len(value) * max([0, *map(len, texts)]))
    if name == "format" and isinstance(value, str):
        check_percent(value, given)
    if name == "int" and isinstance(value, str) and len(value) > _WIDEST:
        raise SecurityError(f"int: a text of {len(value):,} characters; expected at most {_WIDEST:,}")


def _size(argument: Any) -> int:
    return len(argument) if isinstance(argument, str) else argument if type(argument) is int else 0


def bounded_filter(name: str, own: Callable[..., Any], budget: Budget) -> Callable[..., Any]:
    """Return a filter that looks at what it is given first, and notes what it makes."""
    at = 1 if getattr(own, "jinja_pass_arg", None) is not None else 0  # before the value stands jinja's own

    @wraps(own)
    def call(*arguments: Any, **named: Any) -> Any:
        value = arguments[at] if len(arguments) > at else None
        check_call(name, value, arguments[at + 1 :], named)
        if name not in _SHALLOW:
            budget.writable(value)
        return budget.made(own(*arguments, **named))

    return call
