"""What does a request ask? Its JSON within bounds, field by field; what is not understood is refused by name."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

_TYPES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_DEEPEST = 64
_MOST_DIGITS = 4000  # far more than any number has that is asked for; Python bounds them too, in words of its own
_SHOWN = 60  # characters of a value in a message


class RequestError(Exception):
    """A request that is refused: the status, what is wrong, and with which field."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        """retry_after: seconds."""
        super().__init__(message)
        self.status = status
        self.message = _encodable(message)
        self.param = None if param is None else _encodable(param)
        self.retry_after = retry_after


def _encodable(text: str) -> str:
    """Return a text with lone surrogates, which JSON can hold and UTF-8 cannot, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raise RequestError where it is none."""
    try:
        found = json.loads(
            body.decode("utf-8"), parse_constant=_no_number, parse_int=_whole, object_pairs_hook=_once_each
        )
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: byte {body[error.start]:#04x} at {error.start}") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if _is_deep(found):
        raise RequestError(400, "the body is nested too deeply")
    if not isinstance(found, dict):
        raise RequestError(400, f"the body: expected an object, found {shown(found)}")
    return found


def _is_deep(found: Any) -> bool:
    """Return whether lists and objects are nested in more than _DEEPEST levels."""
    level = [found]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise RequestError(400, f"the body: a number of {len(digits):,} digits; expected at most {_MOST_DIGITS}")
    return int(digits)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; of two fields of one name, one would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise RequestError(400, f"the body: {shown(twice)} is there twice in one object")
    return found


def shown(value: Any) -> str:
    """Return the beginning of a value for a message."""
    text = repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
    text = {"dict": "an object", "list": "a list", "True": "true", "False": "false", "None": "null"}.get(text, text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class Fields:
    """An object's fields, which are taken one by one; null is as good as absent, and `finish` refuses the rest."""

    def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._within = within

    def refuse(self, name: str, message: str) -> NoReturn:
        """Refuse the request for what is in this field."""
        raise RequestError(400, f"{self._within}{name}: {message}", f"{self._within}{name}")

    def take(self, name: str, *kinds: type) -> Any:
        """Return a field's value, or None; it is of one of these types."""
        value = self._values.pop(name, None)
        if value is None:
            return None
        for kind in kinds:
            if kind is float and type(value) is int and abs(value) < 1 << 53:
                return float(value)
            if kind is int and type(value) is float and value.is_integer():
                return int(value)  # JSON knows one kind of numbers
            if type(value) is kind:
                return value
        self.refuse(name, f"expected {' or '.join(_TYPES[kind] for kind in kinds)}, found {shown(value)}")

    def number(self, name: str, least: float, most: float, whole: bool = False) -> Any:
        """Return a number within bounds, or None."""
        value = self.take(name, int if whole else float)
        if value is not None and not least <= value <= most:
            upper = f"{most:,}" if most < math.inf else "more"
            self.refuse(name, f"expected {least:,} to {upper}, found {shown(value)}")
        return value

    def given(self, name: str) -> bool:
        """Return whether the field is there."""
        return name in self._values

    def neutral(self, name: str, *values: Any) -> None:
        """Refuse a field that is not supported, unless it says what happens anyway."""
        value = self._values.pop(name, None)
        if value is not None and not any(type(value) is type(each) and value == each for each in values):
            self.refuse(name, f"{shown(value)} is not supported" + _only(values))

    def finish(self) -> None:
        """Refuse what was not taken."""
        for name in self._values:
            raise RequestError(400, f"{self._within}{name[:_SHOWN]}: this parameter is not supported", name[:_SHOWN])


def _only(values: tuple[Any, ...]) -> str:
    listed = [json.dumps(value) for value in values]
    return f"; expected {' or '.join(listed)}, or nothing" if listed else ""
