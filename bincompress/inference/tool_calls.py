"""How do models write calls of tools? A form for each family, found by what a chat template says to the model."""

import json
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bincompress.inference.json_schema import checked_schema

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's templates take no other


@dataclass(frozen=True)
class CallForm:
    """How a family writes calls: JSON objects with a name and arguments, between two marks.

    sign: what a template's text holds whose model writes so. begin, end: the marks; without `begin` an answer that is a
    JSON object is a call. arguments: the key of the arguments. is_list: the objects stand in one list.
    """

    family: str
    sign: str
    begin: str
    end: str
    arguments: str = "arguments"
    is_list: bool = False


# The first whose sign is found decides. A form that is not here is refused: its calls would come as plain text.
_UNKNOWN_SIGNS = ("<function=", "[ARGS]", "<|tool_calls_section_begin|>", "<arg_key>")
FORMS = (
    CallForm("Mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", "", is_list=True),
    CallForm("Granite 3", "<|tool_call|>", "<|tool_call|>", "", is_list=True),
    CallForm("Hermes, Qwen, SmolLM3", "<tool_call>", "<tool_call>", "</tool_call>"),
    CallForm("Llama 3", '"parameters": dictionary of argument name', "", "", arguments="parameters"),
)
_LLAMA_MARK = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote: the tool's name, and the arguments as a JSON text."""

    name: str
    arguments: str
    id: str

    def as_object(self) -> dict[str, Any]:
        """Return it as an object of JSON, in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def form_of(template: str) -> CallForm | None:
    """Return the form of calls that a chat template's text tells its model, or None where it is not known."""
    plain = template.replace('\\"', '"')
    if any(sign in plain for sign in _UNKNOWN_SIGNS):
        return None
    return next((form for form in FORMS if form.sign in plain), None)


def marks_of(form: CallForm) -> tuple[str, ...]:
    """Return the texts that mark calls; where one is a special token it has to be kept in the text."""
    return tuple(mark for mark in (form.begin or _LLAMA_MARK, form.end) if mark)


def written(form: CallForm, calls: Sequence[Mapping[str, Any]]) -> str:
    """Return calls (name and arguments each) as the model itself would write them."""
    objects = [_object(form, call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]
    if form.is_list:
        return f"{form.begin}[{', '.join(objects)}]{form.end}"
    return "\n".join(f"{form.begin}\n{each}\n{form.end}" if form.begin else each for each in objects)


def _object(form: CallForm, name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "{form.arguments}": {arguments}}}'


def call_grammar(form: CallForm, tools: Mapping[str, Any], several: bool, tokens: Mapping[str, int]) -> str:
    """Return the grammar of answers that are calls and nothing else.

    tools: the schema of the arguments by a tool's name. several: calls may follow each other. tokens: of the marks that
    are one token. Raises SchemaError.
    """
    rules = []
    for number, schema in enumerate(tools.values()):
        plain = checked_schema(schema if "type" in schema else {**schema, "type": "object"})
        rules.append(f"arguments{number}: %json {json.dumps(plain)}")
    heads = [_object(form, name, "\0").split("\0") for name in tools]
    calls = [f"{json.dumps(head)} arguments{n} {json.dumps(tail)}" for n, (head, tail) in enumerate(heads)]
    begin, end = (_mark(mark, tokens) for mark in (form.begin, form.end))
    more = ' (", " object)*' if form.is_list else ' ("\\n" call)*'
    if form.is_list:
        start = f'{begin} "[" object{more if several else ""} "]"'
    else:
        start = f"call{more if several else ''}"
        between = ('"\\n"', '"\\n"') if form.begin else ("", "")
        rules.append(f"call: {begin} {between[0]} object {between[1]} {end}")
    return "\n".join([f"start: {start}", *rules, f"object: {' | '.join(calls)}"])


def _mark(mark: str, tokens: Mapping[str, int]) -> str:
    if mark not in tokens:
        return json.dumps(mark) if mark else ""
    return f"<[{tokens[mark]}]>"


class CallReader:
    """Parts an answer, as it comes, into text and calls; what is no call of a known tool stays text."""

    def __init__(self, form: CallForm, names: Iterable[str], several: bool = True) -> None:
        """names: of the tools. several: without it the first call is the only one that is given."""
        self._form = form
        self._names = frozenset(names)
        self._several = several
        self._held = ""  # what may be part of a call
        self._within = False
        self._begun = False
        self.count = 0  # calls so far

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return text and calls that are complete."""
        self._held += text
        if not self._form.begin:
            return self._of_bare()
        given = ""
        calls: list[ToolCall] = []
        while True:
            if not self._within:
                before, mark, after = self._held.partition(self._form.begin)
                if not mark:
                    keep = _kept(self._held, self._form.begin)
                    given += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    return given, calls
                given += before.rstrip()
                self._held, self._within = after, True
            if not self._form.end:
                return given, calls  # the rest is the list
            inner, mark, after = self._held.partition(self._form.end)
            if not mark:
                return given, calls
            found = self._parsed(inner)
            given += "" if found is not None else self._form.begin + inner + mark
            calls += self._counted(found or [])
            self._held, self._within = after, False

    def _of_bare(self) -> tuple[str, list[ToolCall]]:
        """Return text, unless the answer begins as a call does: that is known at its end."""
        begin = self._held.lstrip()
        if self._begun or (begin and begin[0] != "{" and not _overlaps(begin, _LLAMA_MARK)):
            given, self._held, self._begun = self._held, "", True
            return given, []
        return "", []

    def whole(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls of a whole answer."""
        given, calls = self.push(text)
        rest, last = self.finish()
        return given + rest, [*calls, *last]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what is left at the end of the answer."""
        held, self._held = self._held, ""
        if not self._form.begin:
            found = None if self._begun else self._parsed(held.strip().removeprefix(_LLAMA_MARK))
            return ("", self._counted(found)) if found else (held, [])
        if not self._within:
            return ("" if self.count and not held.strip() else held), []
        found = self._parsed(held)  # a list, or a call whose end mark was cut off
        return ("", self._counted(found)) if found else (self._form.begin + held, [])

    def _counted(self, calls: list[ToolCall]) -> list[ToolCall]:
        if not self._several:
            calls = calls[: 1 - min(self.count, 1)]
        self.count += len(calls)
        return calls

    def _parsed(self, text: str) -> list[ToolCall] | None:
        """Return the calls that a text is, or None."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        found = found if self._form.is_list and isinstance(found, list) else [found]
        calls = []
        for each in found:
            arguments = each.get(self._form.arguments, {}) if isinstance(each, dict) else None
            if not isinstance(arguments, dict) or each.get("name") not in self._names:
                return None
            made = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
            calls.append(ToolCall(each["name"], json.dumps(arguments, ensure_ascii=False), made))
        return calls


def _kept(text: str, mark: str) -> int:
    """Return how much of a text's end may belong to a mark: its beginning, with the white space before it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            before = text[: len(text) - length]
            return len(text) - len(before.rstrip())
    return len(text) - len(text.rstrip())


def _overlaps(text: str, mark: str) -> bool:
    return text.startswith(mark[: len(text)])
