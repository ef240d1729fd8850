"""A conversation as the text that the model was trained on: its own template, rendered in a sandbox.

Templates come from strangers, so they see plain data only, and what could take the machine with it is an error.
The environment is set up as transformers does it: same options, same functions, same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from bincompress.model.errors import PromptError, TemplateError
from bincompress.model.tokenizer import json_object

Message = Mapping[str, Any]

_LONGEST = 1 << 24  # items of a repeated text or list; templates repeat little
_LARGEST_POWER = 4096
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's templates by name ("default", perhaps "tool_use" and others) and the variables they may use."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str] | None = None) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables or {})
        self._environment = _environment()

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
            raise TemplateError(f"chat template: none is named 'default'; the model has {known}")
        values = _plain({**self._variables, **variables, "tools": tools, "documents": variables.get("documents")})
        values["messages"] = [_with_reasoning(message) for message in _plain(list(messages))]
        try:
            template = self._environment.from_string(self._templates[name])
            return template.render(**values, add_generation_prompt=add_generation_prompt)
        except _Refused as error:
            raise PromptError(f"chat template: {error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template: line {error.lineno}: {error}") from None
        except jinja2.TemplateError as error:
            raise TemplateError(f"chat template: {type(error).__name__}: {error}") from None
        except Exception as error:  # whatever a template manages to raise is the template's fault
            raise TemplateError(f"chat template: {type(error).__name__}: {str(error)[:200]}") from None


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


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        """Return the block's content, called as a macro so that it has a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Also refuses products and powers that would fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left * right or left ** right within bounds."""
        if operator == "**" and (abs(left) > _LARGEST_POWER or abs(right) > _LARGEST_POWER):
            raise SecurityError(f"power {left} ** {right} is out of bounds")
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, str | list | tuple) and isinstance(times, int) and len(sized) * times > _LONGEST:
                raise SecurityError(f"repetition {times} times is out of bounds")
        return super().call_binop(context, operator, left, right)


class _Dict:
    """`dict` in templates: makes dictionaries and gives no access to the type."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """Return dict.fromkeys of the arguments."""
        return dict.fromkeys(*arguments)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates, without names that reach into Python."""

    def __init__(*args: Any, **named: Any) -> None:  # so that a template may pass self=...
        self, given = args[0], dict(*args[1:], **named)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace name {name!r} starts with an underscore")


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _raise_exception(message: Any) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
