"""What does an object of JSON ask? Field by field; what is not understood is refused by name."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from bincompress.errors import BincompressError

_TYPES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_SHOWN = 60  # characters of a value in a message


class FieldError(BincompressError):
    """A field that is refused: what is wrong, and with which field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


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
        """Raise FieldError for what is in this field."""
        raise FieldError(f"{self._within}{name}: {message}", f"{self._within}{name}")

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
            raise FieldError(f"{self._within}{name[:_SHOWN]}: this parameter is not supported", name[:_SHOWN])


def _only(values: tuple[Any, ...]) -> str:
    listed = [json.dumps(value) for value in values]
    return f"; expected {' or '.join(listed)}, or nothing" if listed else ""
