"""Chat templates rendered in a sandbox.

Templates come from strangers, so they see plain data only, and what could take the machine with it is an error.
The environment is set up as transformers does it: same options, same functions, same bytes.
"""

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from bincompress.model.errors import PromptError, TemplateError

_LONGEST = 1 << 24  # items of a repeated text or list; templates repeat little
_LARGEST_POWER = 4096


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a template's text for these values; raise PromptError where it refuses them, TemplateError on faults."""
    try:
        return str(_environment().from_string(template).render(**values))
    except _Refused as error:
        raise PromptError(f"chat template: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template: line {error.lineno}: {error}") from None
    except jinja2.TemplateError as error:
        raise TemplateError(f"chat template: {type(error).__name__}: {error}") from None
    except Exception as error:  # whatever a template manages to raise is the template's fault
        raise TemplateError(f"chat template: {type(error).__name__}: {str(error)[:200]}") from None


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


@functools.cache
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
