"""Chat templates rendered in a sandbox.

Templates come from strangers, so they see plain data only, and what could take the machine with it is an error.
The environment is set up as transformers does it: same options, same functions, same bytes.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from bincompress.inference.bounds import Budget, bounded_filter, check_call, check_operation, check_spec
from bincompress.model.errors import PromptError, TemplateError

_BUDGET = Budget()  # each thread has its own


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a template's text for these values; raise PromptError where it refuses them, TemplateError on faults."""
    try:
        _BUDGET.begin()
        return str(_environment().from_string(template).render(**values))
    except _Refused as error:
        raise PromptError(f"chat template: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template: line {error.lineno}: {error}") from None
    except jinja2.TemplateError as error:
        raise TemplateError(f"chat template: {type(error).__name__}: {error}") from None
    except Exception as error:  # whatever a template manages to raise is the template's fault
        raise TemplateError(f"chat template: {type(error).__name__}: {str(error)[:200]}") from None


@dataclass(frozen=True)
class TemplateNames:
    """What a template reads: variables that are given to it, and the texts and attributes that it names."""

    variables: frozenset[str]
    words: frozenset[str]


@functools.lru_cache(maxsize=16)
def names_in(template: str) -> TemplateNames:
    """Return what a template reads; raise TemplateError where it cannot be parsed.

    A name that it sets itself, a macro's argument and a loop's variable are no variables that are given to it.
    """
    try:
        tree = _environment().parse(template)
        variables = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template: line {error.lineno}: {error}") from None
    except Exception as error:
        raise TemplateError(f"chat template: {type(error).__name__}: {str(error)[:200]}") from None
    words = {str(found.value) for found in tree.find_all(nodes.Const) if isinstance(found.value, str)}
    words |= {found.attr for found in tree.find_all(nodes.Getattr)}
    return TemplateNames(frozenset(variables), frozenset(words))


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


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """Writes a value by its format within bounds."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Return a value as text."""
        check_spec(format_spec)
        return _BUDGET.made(super().format_field(_BUDGET.writable(value), format_spec))


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Also refuses what would fill the memory or never end."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    tick = staticmethod(_BUDGET.tick)
    collected = staticmethod(_BUDGET.collected)
    joined = staticmethod(_BUDGET.joined)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template, and have its loops, macros and lists tell the budget of themselves."""
        tree = super()._parse(source, name, filename)
        _Watched().visit(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left + right, left * right, left ** right or left % right within bounds."""
        check_operation(operator, left, right)
        if operator == "%" and isinstance(left, str):
            _BUDGET.writable(right)
        return _BUDGET.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        """Call a function or a method; a text's own within bounds."""
        own = getattr(__obj, "__self__", None)
        if isinstance(own, str):
            name = __obj.__name__
            # The separator has the method `join`, the list the filter.
            first, rest = (args[0], (own,)) if name == "join" and args else (own, args)
            check_call("" if name == "format" else name, first, rest, kwargs)
            return _BUDGET.made(super().call(__context, __obj, *args, **kwargs))
        if getattr(__obj, "__name__", "") == "generate_lorem_ipsum":
            check_call("lipsum", None, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `format` or `format_map` of a text, within bounds."""
        if super().wrap_str_format(value) is None:
            return None
        formatter, text, mapped = _Formatter(self), value.__self__, value.__name__ == "format_map"

        def write(*args: Any, **kwargs: Any) -> str:
            return str(formatter.vformat(text, (), args[0]) if mapped else formatter.vformat(text, args, kwargs))

        return functools.update_wrapper(write, value)


class _Watched(NodeTransformer):
    """Has loops, macros and what is written call `tick`; `~` becomes `joined`, and lists pass through `collected`."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """Change what is in a node, then its lists of statements."""
        node = super().generic_visit(node, *args, **kwargs)
        for _, value in node.iter_fields():
            if isinstance(value, list) and value and isinstance(value[0], nodes.Stmt):
                value[:] = [each for statement in value for each in (*_before(statement), statement)]
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, nodes.ExprStmt(_call("tick"), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - as jinja2 has it
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def _display(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const | nodes.TemplateData) for child in node.iter_child_nodes())
        return node if constant or getattr(node, "ctx", "load") != "load" else _call("collected", node)

    visit_List = visit_Tuple = visit_Dict = _display  # noqa: N815 - as jinja2 has it


def _before(statement: nodes.Node) -> list[nodes.Node]:
    if not isinstance(statement, nodes.Output):
        return []
    size = sum(len(part.data) for part in statement.nodes if isinstance(part, nodes.TemplateData))
    return [nodes.ExprStmt(_call("tick", nodes.Const(size)), lineno=statement.lineno)] if size else []


def _call(name: str, *arguments: Any) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


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
    for name, own in environment.filters.items():
        environment.filters[name] = bounded_filter(name, own, _BUDGET)
    environment.finalize = _BUDGET.writable
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
