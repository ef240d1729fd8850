"""A conversation as the text that the model was trained on: its own template, rendered in a sandbox."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bincompress.model.added_tokens import special_tokens
from bincompress.model.errors import PromptError, TemplateError
from bincompress.model.files import json_object, pointer

if TYPE_CHECKING:
    from bincompress.inference.sandbox import TemplateNames

Message = Mapping[str, Any]

_OTHERS = "additional_chat_templates/"  # a file each, named as the template
_TOOL_VARIABLES = ("tools", "xml_tools")  # the latter is SmolLM3's
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's templates by name ("default", perhaps "tool_use" and others) and the variables they may use."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str] | None = None) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables or {})

    @property
    def templates(self) -> dict[str, str]:
        """The templates by name."""
        return dict(self._templates)

    @property
    def variables(self) -> dict[str, str]:
        """What templates may use beside a conversation: texts of special tokens, by their names in transformers."""
        return dict(self._variables)

    @property
    def source(self) -> str | None:
        """The template of conversations without tools, as its authors wrote it."""
        return self._templates.get("default")

    def takes(self, variable: str, tools: bool = False) -> bool:
        """Return whether the template reads this variable; tools: the one that conversations with tools use."""
        return variable in self._names(tools).variables

    def tools_variable(self) -> str | None:
        """Return the variable that takes tools, or None where the template does not use them."""
        return next((name for name in _TOOL_VARIABLES if self.takes(name, tools=True)), None)

    def knows(self, word: str) -> bool:
        """Return whether the template for conversations with tools names this role or key of a message."""
        return word in self._names(True).words

    def text(self, tools: bool = False) -> str:
        """Return the template; tools: the one that conversations with tools use. Raises TemplateError."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise TemplateError(f"chat template: expected one that is named 'default', found {known}")
        return self._templates[name]

    def _names(self, tools: bool) -> "TemplateNames":
        from bincompress.inference.sandbox import names_in

        return names_in(self.text(tools))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for these messages; raise PromptError where the template refuses them."""
        template = self.text(tools is not None)
        values = _plain({**self._variables, **variables, "tools": tools, "documents": variables.get("documents")})
        if tools is not None and (name := self.tools_variable()) is not None:
            values[name] = values["tools"]
        values["messages"] = [_with_reasoning(message) for message in _plain(list(messages))]
        # Here, because generating from a prompt needs no template, and importing jinja2 takes as long as a small model.
        from bincompress.inference.sandbox import render

        return render(template, {**values, "add_generation_prompt": add_generation_prompt})


def load_template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """Return the templates among a model's files by name, or None.

    They are in chat_template.jinja and additional_chat_templates/NAME.jinja, and only where there is neither in
    tokenizer_config.json. Raises TemplateError or TokenizerError naming the file that is not what it should be.
    """
    others = [name for name in files if name.startswith(_OTHERS) and name.endswith(".jinja")]
    templates = {name.removeprefix(_OTHERS).removesuffix(".jinja"): _text(files, name) for name in others}
    if "chat_template.jinja" in files:
        templates["default"] = _text(files, "chat_template.jinja")
    templates = templates or _in_config(files)
    return ChatTemplate(templates, special_tokens(files).texts) if templates else None


def _text(files: Mapping[str, bytes], name: str) -> str:
    if found := pointer(files[name]):
        raise TemplateError(f"{name}: {found}")
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(f"{name}: not UTF-8: {error}") from None


def _in_config(files: Mapping[str, bytes]) -> dict[str, str]:
    given = (json_object(files, "tokenizer_config.json") or {}).get("chat_template")
    if given is None or isinstance(given, str):
        return {} if given is None else {"default": given}
    if isinstance(given, dict) and all(isinstance(text, str) for text in given.values()):
        return {str(name): text for name, text in given.items()}
    if not isinstance(given, list):
        raise TemplateError(
            f"tokenizer_config.json: chat_template: expected text or a list, found {type(given).__name__}"
        )
    for entry in given:
        if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
            raise TemplateError("tokenizer_config.json: chat_template: expected entries with name and template")
    return {str(entry["name"]): str(entry["template"]) for entry in given}


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
    """Give a message's reasoning under the names that templates read, and no empty keys, as transformers does."""
    if not isinstance(message, dict):
        raise PromptError(f"chat: expected messages with role and content, found {type(message).__name__}")
    # Keys without a value are left out, as in transformers: many templates write "None" for them.
    message = {key: value for key, value in message.items() if value is not None}
    given = next((message[name] for name in _REASONING if name in message), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}
