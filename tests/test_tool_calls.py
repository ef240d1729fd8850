"""Calls of tools: each family's form read and written, and what templates take."""

import json
from typing import Any

import numpy as np
import pytest

from bincompress.inference.chat import ChatTemplate
from bincompress.inference.constraint import Grammars
from bincompress.inference.sampling import Sampler, Sampling
from bincompress.inference.sandbox import names_in
from bincompress.inference.tool_calls import FORMS, CallForm, CallReader, ToolCall, call_grammar, form_of, written
from bincompress.model.tokenizer import TextStream, load_tokenizer
from tests.conftest import DEMO_MODEL

FILES = ("tokenizer.json", "generation_config.json", "config.json")
MISTRAL, GRANITE, HERMES, LLAMA = FORMS
CALL = {"name": "f", "arguments": {"x": 1}}
# What real templates say to their models, shortened.
SAID = {
    "Hermes, Qwen, SmolLM3": 'an object within <tool_call></tool_call>: {\\"name\\": <name>, \\"arguments\\": <args>}',
    "Mistral": "{{ '[TOOL_CALLS] [' }}",
    "Granite 3": "{{ '<|tool_call|>' }} followed by a JSON list",
    "Llama 3": 'Respond in the format {"name": function name, "parameters": dictionary of argument name and value}.',
}


def read(form: CallForm, text: str, size: int = 1, several: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    """Return the text and the calls of an answer that comes in pieces of so many characters."""
    reader, given = CallReader(form, ["f", "g"], several), ""
    calls: list[ToolCall] = []
    for at in range(0, len(text), size):
        told, found = reader.push(text[at : at + size])
        given, calls = given + told, calls + found
    told, found = reader.finish()
    assert reader.count == len(calls + found)
    assert all(len(call.id) == 9 for call in calls + found)
    return given + told, [(call.name, json.loads(call.arguments)) for call in calls + found]


def test_families_are_told_by_what_their_templates_say() -> None:
    for family, said in SAID.items():
        found = form_of(said)
        assert found is not None
        assert found.family == family
    assert form_of("<tool_call>\n<function=name>\n<parameter=x>") is None  # Qwen3-Coder's
    assert form_of("[TOOL_CALLS]name[ARGS]{}") is None  # Mistral's later one
    assert form_of("{{ messages }}") is None


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', ("", [("f", {"x": 1})])),
        (
            HERMES,
            'I look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {"a": "</tool"}}</tool_call>',
            ("I look.", [("f", {}), ("g", {"a": "</tool"})]),
        ),
        (HERMES, 'No call: 1 < 2 <tool and {"name": "f"}', ('No call: 1 < 2 <tool and {"name": "f"}', [])),
        (HERMES, "<tool_call>{no JSON}</tool_call> then", ("<tool_call>{no JSON}</tool_call> then", [])),
        (HERMES, '<tool_call>{"name": "unknown"}</tool_call>', ('<tool_call>{"name": "unknown"}</tool_call>', [])),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}', ("", [("f", {})])),  # the end mark ended the text
        (HERMES, '<tool_call>{"name": "f", "argu', ('<tool_call>{"name": "f", "argu', [])),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]',
            ("", [("f", {"x": 1}), ("g", {})]),
        ),
        (MISTRAL, "[TOOL_CALLS] none", ("[TOOL_CALLS] none", [])),
        (MISTRAL, "Plain [TOOL", ("Plain [TOOL", [])),
        (GRANITE, 'So:<|tool_call|>[{"name": "f", "arguments": {}}]', ("So:", [("f", {})])),
        (LLAMA, '{"name": "f", "parameters": {"x": 1}}', ("", [("f", {"x": 1})])),
        (LLAMA, ' <|python_tag|>{"name": "f", "parameters": {}}', ("", [("f", {})])),
        (LLAMA, '{"answer": 4}', ('{"answer": 4}', [])),
        (LLAMA, 'See {"name": "f", "parameters": {}}', ('See {"name": "f", "parameters": {}}', [])),
    ],
)
def test_calls_are_found_in_answers(form: CallForm, text: str, expected: Any, size: int) -> None:
    assert read(form, text, size) == expected


def test_one_call_where_no_more_are_wanted() -> None:
    text = written(HERMES, [CALL, {"name": "g", "arguments": {}}])
    assert read(HERMES, text) == ("", [("f", {"x": 1}), ("g", {})])
    assert read(HERMES, text, several=False) == ("", [("f", {"x": 1})])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.family)
def test_asked_for_calls_come_whatever_the_model_writes(form: CallForm) -> None:
    tokenizer = load_tokenizer(
        {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.suffix == ".json"}
    )
    grammars = Grammars(tokenizer, tokenizer.size)
    tools: dict[str, Any] = {
        "f": {"type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}, "required": ["x"],
              "$defs": {"x": {"enum": [1, 2]}}, "additionalProperties": False},
        "g": {"properties": {}, "additionalProperties": False},
    }  # fmt: skip
    grammar = grammars.compiled(call_grammar(form, tools, form.is_list or form is HERMES, {}))
    expected: dict[str, list[dict[str, int]]] = {"f": [{"x": 1}, {"x": 2}], "g": [{}]}
    seen = set()
    for seed in range(8):
        sampler = Sampler(Sampling(seed=seed), tokenizer.size, (), grammar.begin())
        random, stream, text = np.random.default_rng(seed), TextStream(tokenizer), ""
        while not sampler.is_complete:
            logits = random.normal(0, 2, tokenizer.size).astype(np.float32)
            logits[list(tokenizer.eos_ids)] = 9
            token = sampler.choose(logits)
            if token in tokenizer.eos_ids:
                break
            text += stream.push(token)
        left, calls = read(form, text + stream.finish())
        assert left.strip() == ""
        assert calls
        for name, arguments in calls:
            assert arguments in expected[name]
            seen.add(name)
    assert seen == {"f", "g"}


def test_which_variables_and_words_a_template_reads() -> None:
    found = names_in(
        "{% macro item(inner) %}{{ inner }}{{ outer }}{% endmacro %}{% set own = 1 %}{{ own }}"
        "{% if later is not defined %}{% set later = true %}{% endif %}{{ later }}"
        "{% for m in messages %}{{ m.tool_calls }}{% if m['role'] == 'tool' %}{{ loop.index }}{% endif %}{% endfor %}"
        "{% set ns = namespace(a=1) %}{{ ns.a }}{{ strftime_now('%Y') }}{% generation %}{{ within }}{% endgeneration %}"
    )
    assert found.variables == {"outer", "later", "messages", "within"}
    assert {"tool", "role", "tool_calls"} <= found.words
    two = ChatTemplate({"default": "{{ messages }}", "tool_use": "{{ tools }}{{ thinking }}"})
    assert (two.takes("thinking"), two.takes("thinking", tools=True)) == (False, True)
    assert two.tools_variable() == "tools"
    smol = ChatTemplate({"default": "{% if xml_tools %}{{ xml_tools }}{% endif %}"})
    assert smol.tools_variable() == "xml_tools"
    assert smol.render([], [{"type": "function"}]) == "[{'type': 'function'}]"
    assert ChatTemplate({"default": "{% set tools = 1 %}{{ tools }}"}).tools_variable() is None
