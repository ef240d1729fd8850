"""The JSON of a request, within bounds, and the error that refuses a request."""

import json
from typing import Any, NoReturn

from bincompress.inference.request_fields import shown

_DEEPEST = 64
_MOST_DIGITS = 4000  # far more than any number has that is asked for; Python bounds them too, in words of its own


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
