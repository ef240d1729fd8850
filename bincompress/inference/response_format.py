"""What form does a field ask an answer to have? A grammar of JSON by a schema."""

from typing import Any

from bincompress.errors import BincompressError
from bincompress.inference.json_schema import json_grammar
from bincompress.inference.request_fields import FieldError, Fields, shown

_ANY_OBJECT = {"type": "object"}


def response_format(fields: Fields) -> str | None:
    """Return the grammar that OpenAI's `response_format` asks for, if any."""
    given = fields.take("response_format", dict)
    if given is None:
        return None
    own = Fields(given, "response_format.")
    kind = own.take("type", str)
    schema: Any = _ANY_OBJECT if kind == "json_object" else None
    if kind == "json_schema":
        within = Fields(own.take("json_schema", dict) or {}, "response_format.json_schema.")
        schema = within.take("schema", dict)
        # Whatever `strict` says, the answer is held to the schema.
        for name, wanted in (("name", str), ("description", str), ("strict", bool)):
            within.take(name, wanted)
        within.finish()
        if schema is None:
            within.refuse("schema", "expected a JSON schema")
    elif kind not in ("text", "json_object"):
        own.refuse("type", f"expected text, json_object or json_schema, found {shown(kind)}")
    own.finish()
    return None if schema is None else schema_grammar(schema, "response_format")


def ollama_format(fields: Fields) -> str | None:
    """Return the grammar that Ollama's `format` asks for, if any: "json", or a schema."""
    given = fields.take("format", str, dict)
    if given in (None, ""):
        return None
    if isinstance(given, str) and given != "json":
        fields.refuse("format", f"expected 'json' or a JSON schema, found {shown(given)}")
    return schema_grammar(_ANY_OBJECT if given == "json" else given, "format")


def schema_grammar(schema: Any, name: str) -> str:
    """Return a schema's grammar; raise FieldError where it is not supported."""
    try:
        return json_grammar(schema)
    except BincompressError as error:
        raise FieldError(str(error), name) from None
