"""Which tools does a request offer, and which of them is to be called?"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bincompress.errors import BincompressError
from bincompress.inference.chat import ChatTemplate
from bincompress.inference.generate import Model
from bincompress.inference.request_fields import FieldError, Fields, shown
from bincompress.inference.tool_calls import CallForm, CallReader, call_grammar, form_of, marks_of

MOST_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """Tools that an answer may call."""

    given: list[dict[str, Any]]  # as the template gets them
    form: CallForm
    several: bool
    marks: frozenset[int]  # special tokens that the answer's text keeps
    grammar: str | None = None  # of answers that are calls alone, where they are asked for

    def reader(self) -> CallReader:
        """Return what finds the calls in one answer."""
        return CallReader(self.form, [tool["function"]["name"] for tool in self.given], self.several)


def tools_of(fields: Fields, model: Model) -> Tools | None:
    """Return the tools that a request offers; None where it offers none, or wants none to be called."""
    given = fields.take("tools", list) or []
    several = fields.take("parallel_tool_calls", bool) is not False
    if len(given) > MOST_TOOLS:
        fields.refuse("tools", f"expected at most {MOST_TOOLS}, found {len(given)}")
    tools = [_tool(each, f"tools[{number}]") for number, each in enumerate(given)]
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"} for tool in tools}
    if len(schemas) < len(tools):
        fields.refuse("tools", "expected a name of its own for each")
    choice, named = _choice(fields, schemas)
    if not tools or choice == "none":
        return None
    form = _form(model.template, fields)
    if choice == "auto":
        for number, tool in enumerate(tools):
            if tool["function"].get("strict"):
                fields.refuse(
                    f"tools[{number}].function.strict",
                    "true is enforced with tool_choice 'required' or a named function; expected false, or nothing",
                )
    tokens = {mark: model.tokenizer.number_of(mark) for mark in marks_of(form)}
    known = {mark: token for mark, token in tokens.items() if token is not None}
    grammar = None
    if choice != "auto":
        wanted = {name: schema for name, schema in schemas.items() if named in (None, name)}
        try:
            grammar = call_grammar(form, wanted, several and named is None, known)
        except BincompressError as error:
            raise FieldError(f"tools: {error}", "tools") from None
    marks = model.tokenizer.special_ids & frozenset(known.values())
    return Tools(tools, form, several, marks, grammar)


def _choice(fields: Fields, schemas: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return "none", "auto" or "required", and the one tool that is to be called, if any."""
    choice = fields.take("tool_choice", str, dict)
    if isinstance(choice, dict):
        own = Fields(choice, "tool_choice.")
        if own.take("type", str) != "function":
            own.refuse("type", "expected function")
        within = Fields(own.take("function", dict) or {}, "tool_choice.function.")
        name = within.take("name", str)
        within.finish()
        own.finish()
        if name not in schemas:
            within.refuse("name", f"expected the name of one of the tools, found {shown(name)}")
        return "required", name
    if choice not in (None, "none", "auto", "required"):
        fields.refuse("tool_choice", f"expected none, auto, required or a function, found {shown(choice)}")
    if choice == "required" and not schemas:
        fields.refuse("tool_choice", "'required' needs tools")
    return choice or "auto", None


def _form(template: ChatTemplate | None, fields: Fields) -> CallForm:
    if template is None or template.tools_variable() is None:
        fields.refuse("tools", "this model's chat template does not use tools; expected none")
    form = form_of(template.text(tools=True))
    if form is None:
        fields.refuse("tools", "this model's chat template asks for calls in a form that is not known; expected none")
    return form


def _tool(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        Fields({}).refuse(place, f"expected an object, found {shown(given)}")
    own = Fields(given, f"{place}.")
    kind = own.take("type", str)
    if kind not in (None, "function"):
        own.refuse("type", f"expected function, found {shown(kind)}")
    function = Fields(own.take("function", dict) or {}, f"{place}.function.")
    own.finish()
    name = function.take("name", str)
    if name is None or not NAME.fullmatch(name):
        function.refuse("name", "expected 1 to 64 letters, digits, dots, dashes or underscores")
    found = {"name": name}
    for key, wanted in (("description", str), ("parameters", dict), ("strict", bool)):
        value = function.take(key, wanted)
        if value is not None:
            found[key] = value
    function.finish()
    return {"type": "function", "function": found}
