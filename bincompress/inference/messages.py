"""What do the messages of a conversation say? Their roles, texts, calls of tools and results of these."""

import json
from typing import Any

from bincompress.inference.chat import ChatTemplate
from bincompress.inference.request_fields import FieldError, Fields, shown
from bincompress.inference.tool_calls import form_of, written

ROLES = ("system", "user", "assistant", "tool")


def messages_of(fields: Fields, template: ChatTemplate | None) -> list[dict[str, Any]]:
    """Return the messages, each with its role and a text, calls of tools and their results as the template has them."""
    given = fields.take("messages", list)
    if not given:
        fields.refuse("messages", "expected at least one message")
    return [_message(entry, f"messages[{number}]", template) for number, entry in enumerate(given)]


def _message(entry: Any, place: str, template: ChatTemplate | None) -> dict[str, Any]:
    if not isinstance(entry, dict):
        Fields({}).refuse(place, f"expected an object, found {shown(entry)}")
    own = Fields(entry, f"{place}.")
    role = own.take("role", str)
    if role not in ROLES:
        own.refuse("role", f"expected {', '.join(ROLES)}; found {shown(role)}")
    calls = _calls(own, f"{place}.") if role == "assistant" else []
    message: dict[str, Any] = {"role": role, "content": _content(own, optional=bool(calls))}
    thought = own.take("reasoning_content", str) if role == "assistant" else None
    if thought is not None:
        message["reasoning_content"] = thought
    if role == "tool":
        message |= _result(own, template)
    own.neutral("tool_calls", [])
    own.finish()
    return _with_calls(message, calls, template)


def _content(own: Fields, optional: bool) -> str:
    content = own.take("content", str, list)
    if content is None and optional:
        return ""
    if content is None:
        own.refuse("content", "expected a text")
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            own.refuse("content", f"expected parts with type and text alone, found one of type {shown(kind)}")
        texts.append(part["text"])
    return "".join(texts)


def _calls(own: Fields, place: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant's message, their arguments as objects."""
    calls = []
    for number, each in enumerate(own.take("tool_calls", list) or []):
        if not isinstance(each, dict):
            own.refuse("tool_calls", f"expected objects, found {shown(each)}")
        call = Fields(each, f"{place}tool_calls[{number}].")
        given, kind = call.take("id", str), call.take("type", str)
        call.take("index", int)
        if kind not in (None, "function"):
            call.refuse("type", f"expected function, found {shown(kind)}")
        function = Fields(call.take("function", dict) or {}, f"{place}tool_calls[{number}].function.")
        call.finish()
        name, arguments = function.take("name", str), function.take("arguments", str, dict)
        function.finish()
        if isinstance(arguments, str):
            arguments = _object(function, arguments)
        if name is None:
            function.refuse("name", "expected a text")
        found = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
        calls.append(found if given is None else {"id": given, **found})
    return calls


def _object(function: Fields, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        function.refuse("arguments", "expected a JSON object as a text")
    return found


def _with_calls(message: dict[str, Any], calls: list[dict[str, Any]], template: ChatTemplate | None) -> dict[str, Any]:
    """Return an assistant's message with its calls, as the template takes them or as the model wrote them."""
    if not calls or template is None or template.knows("tool_calls"):
        return {**message, "tool_calls": calls} if calls else message
    form = form_of(template.text(tools=True))
    if form is None:
        raise FieldError("messages: this model's chat template does not take tool_calls", "messages")
    text = "\n".join(filter(None, [message["content"], written(form, [call["function"] for call in calls])]))
    return {**message, "content": text}


def _result(own: Fields, template: ChatTemplate | None) -> dict[str, Any]:
    """Return what a tool's message says beside its role and content."""
    if template is not None and not (template.knows("tool") or template.knows("ipython")):
        own.refuse("role", "this model's chat template does not know the role tool")
    found = {"tool_call_id": own.take("tool_call_id", str), "name": own.take("name", str)}
    found["name"] = found["name"] or own.take("tool_name", str)  # as Ollama has it
    return {name: value for name, value in found.items() if value is not None}
