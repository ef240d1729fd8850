"""Which JSON schemas can a text be held to? What would not be enforced is refused by name, not ignored."""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from bincompress.model.errors import PromptError

_MOST_FILE = 1 << 20
_MOST_BYTES = 64 << 10  # of a schema without its annotations
_MOST_SCHEMAS = 2048  # within a schema, itself included
_MOST_PROPERTIES = 256  # of one object
_LONGEST = 1024  # characters of a text that a value may have to equal, or of a pattern
_DEEPEST = 64
_LARGEST = 1 << 53  # that floats hold exactly
_LARGEST_MULTIPLE = 1000  # the automaton of multiples of n has n states

# How often whitespace may stand where JSON allows it: a model that has gone astray would write it without end.
_OPTIONS = {"whitespace_pattern": r"[\x20\x0A]{1,32}"}

_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
_SINGLE = frozenset(["items", "additionalProperties", "additionalItems"])
_ENFORCED = frozenset([
    "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength",
    "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "$ref", *_LISTS, *_MAPS, *_SINGLE,
])  # fmt: skip
# What says something to readers and holds no value to anything.
_ANNOTATIONS = frozenset([
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$id", "discriminator",
])  # fmt: skip
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_DRAFTS = re.compile(r"https?://json-schema\.org/draft(-0[67]|/20(19-09|20-12))/schema#?")


class SchemaError(PromptError):
    """A JSON schema is not one, or asks for what cannot be enforced."""


def json_grammar(schema: Any) -> str:
    """Return the grammar of the JSON values that a schema allows, in llguidance's form.

    schema: a JSON schema of drafts 6 to 2020-12 as parsed JSON; its annotations are left out. A list's or an object's
    values come in the order of the schema. Raises SchemaError naming the place of what is not supported.
    """
    return json.dumps({"grammars": [{"json_schema": checked_schema(schema)}]})


def checked_schema(schema: Any) -> dict[str, Any]:
    """Return a schema without its annotations, with the options of its grammar; raise SchemaError as `json_grammar`."""
    plain = _Walk().schema(schema, "schema", 0)
    if isinstance(plain, bool):
        plain = {} if plain else _refuse("schema", "false allows no value; expected a schema that does")
    try:
        size = len(json.dumps(plain, allow_nan=False).encode("utf-8", "replace"))
    except ValueError:
        _refuse("schema", "expected finite numbers")
    if size > _MOST_BYTES:
        _refuse("schema", f"{size:,} bytes without its annotations; expected at most {_MOST_BYTES:,}")
    return {**plain, "x-guidance": _OPTIONS}


def read_schema(path: Path) -> Any:
    """Return the JSON schema of a file; raise SchemaError where it is none, or one that is not supported."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE + 1)
        if len(content) > _MOST_FILE:
            raise SchemaError(f"{path}: more than {_MOST_FILE:,} bytes; expected a JSON schema")
        schema = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path}: not JSON: {str(error)[:100]}") from None
    try:
        json_grammar(schema)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None
    return schema


class _Walk:
    """Copies a schema, and counts."""

    def __init__(self) -> None:
        self._schemas = 0

    def schema(self, given: Any, place: str, depth: int) -> Any:
        """Return a schema without its annotations."""
        self._schemas += 1
        if self._schemas > _MOST_SCHEMAS:
            _refuse("schema", f"more than {_MOST_SCHEMAS:,} schemas in it; expected fewer")
        if depth > _DEEPEST:
            _refuse(place, f"nested in more than {_DEEPEST} levels")
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            _refuse(place, f"expected an object, found {type(given).__name__}")
        found = {}
        for name, value in given.items():
            if name in _ANNOTATIONS:
                if name == "$schema" and not (isinstance(value, str) and _DRAFTS.fullmatch(value)):
                    _refuse(f"{place}.$schema", f"expected draft 6, 7, 2019-09 or 2020-12, found {value!r:.80}")
                continue
            if name not in _ENFORCED:
                _refuse(f"{place}.{name:.60}", "this keyword is not supported")
            found[name] = self._value(name, value, f"{place}.{name}", depth)
        return found

    def _value(self, name: str, value: Any, place: str, depth: int) -> Any:
        if name in _SINGLE and not (name == "items" and isinstance(value, list)):
            return self.schema(value, place, depth + 1)
        if name in _LISTS or name == "items":
            if not isinstance(value, list) or not value:
                _refuse(place, "expected a list of schemas")
            return [self.schema(each, f"{place}[{number}]", depth + 1) for number, each in enumerate(value)]
        if name in _MAPS:
            if not isinstance(value, dict) or len(value) > _MOST_PROPERTIES:
                _refuse(place, f"expected an object of at most {_MOST_PROPERTIES} schemas")
            for each in value:
                _check_text(each, place)
            return {each: self.schema(own, f"{place}.{each:.60}", depth + 1) for each, own in value.items()}
        _check_plain(name, value, place)
        return value


def _check_plain(name: str, value: Any, place: str) -> None:
    if name in _NUMBERS:
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            _refuse(place, f"expected a number of at most {_LARGEST:,} either way, found {value!r:.40}")
        if name == "multipleOf" and not _is_bounded_multiple(value):
            _refuse(place, f"expected up to {_LARGEST_MULTIPLE} in its smallest decimal place, found {value!r:.40}")
    elif name == "$ref":
        if not isinstance(value, str) or not value.startswith("#"):
            _refuse(place, f"expected a place in this schema, such as #/$defs/name, found {value!r:.80}")
    elif name == "enum" and isinstance(value, list) and not value:
        _refuse(place, "allows no value; expected at least one")
    for text in _texts_in(value):
        _check_text(text, place)


def _is_bounded_multiple(value: float) -> bool:
    digits = f"{value:.12f}".rstrip("0").replace(".", "").lstrip("0") if 0 < value < math.inf else ""
    return bool(digits) and int(digits) <= _LARGEST_MULTIPLE


def _texts_in(value: Any) -> list[str]:
    """Return the texts in a value, keys included."""
    found, waiting = [], [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, dict):
            found += list(node)
            waiting += list(node.values())
        elif isinstance(node, list):
            waiting += node
    return found


def _check_text(text: str, place: str) -> None:
    if len(text) > _LONGEST:
        _refuse(place, f"a text of {len(text):,} characters; expected at most {_LONGEST:,}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        _refuse(place, "a text with a lone surrogate, which UTF-8 cannot hold")


def _refuse(place: str, what: str) -> NoReturn:
    raise SchemaError(f"{place}: {what}")
