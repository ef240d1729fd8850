"""A conversation as the text that the model was trained on: its own template, rendered in a sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any

from bincompress.model.errors import PromptError, TemplateError
from bincompress.model.tokenizer import json_object

Message = Mapping[str, Any]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's templates by name ("default", perhaps "tool_use" and others) and the variables they may use."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str] | None = None) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables or {})

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for these messages; raise PromptError where the template refuses them."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise TemplateError(f"chat template: expected one that is named 'default', found {known}")
        values = _plain({**self._variables, **variables, "tools": tools, "documents": variables.get("documents")})
        values["messages"] = [_with_reasoning(message) for message in _plain(list(messages))]
        # Here, because generating from a prompt needs no template, and importing jinja2 takes as long as a small model.
        from bincompress.inference.sandbox import render

        return render(self._templates[name], {**values, "add_generation_prompt": add_generation_prompt})


def load_template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """Return the template among a model's files by name (chat_template.jinja, or in tokenizer_config.json), or None."""
    config = json_object(files, "tokenizer_config.json") or {}
    given = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        for entry in given:
            if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
                raise TemplateError("tokenizer_config.json: chat_template: expected entries with name and template")
            templates[str(entry["name"])] = str(entry["template"])
    elif given is not None:
        raise TemplateError(
            f"tokenizer_config.json: chat_template: expected text or a list, found {type(given).__name__}"
        )
    if "chat_template.jinja" in files:
        try:
            templates["default"] = files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise TemplateError(f"chat_template.jinja: not UTF-8: {error}") from None
    if not templates:
        return None
    named = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return ChatTemplate(templates, {name: text for name, text in texts.items() if isinstance(text, str)})


def _plain(value: Any) -> Any:
    """Return a copy made of plain JSON types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    raise PromptError(f"chat: expected plain values in messages, found {type(value).__name__}")


def _with_reasoning(message: Any) -> Any:
    """Give a message's reasoning under the names that templates read, as transformers does."""
    if not isinstance(message, dict):
        raise PromptError(f"chat: expected messages with role and content, found {type(message).__name__}")
    given = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}
