"""`bincompress run` with lines that ask for JSON or offer tools: answered as by the server, refused by their lines."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bincompress.inference.chat import ChatTemplate
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import load
from bincompress.inference.offline import write_answers
from bincompress.inference.prompts import PromptFileError, read_prompts
from bincompress.inference.sampling import Sampling
from bincompress.model.tokenizer import TextStream
from tests.chat_stores import HERMES, OTHER, TOOL
from tests.test_offline import LIMITS, read, write

DEFAULTS = GenerationSettings(120, Sampling(temperature=1.0, seed=3), context=256)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "is": {"type": "boolean"}},
    "required": ["n", "is"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "Hello"}]
TOOLS = [TOOL, OTHER]


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.fixture(scope="module")
def model(chat_store: Path) -> Model:
    """One whose template takes tools."""
    return replace(load(str(chat_store), threads=1), template=ChatTemplate({"default": HERMES}))


def answers(model: Model, folder: Path, lines: list[Any], settings: GenerationSettings = DEFAULTS) -> list[Any]:
    asked = read_prompts(write(folder / "prompts", lines))
    assert write_answers(model, asked, folder / "out", settings, LIMITS, "e")[1] == 0
    return read(folder / "out")


def test_answers_have_the_form_that_their_lines_ask_for(model: Model, tmp_path: Path) -> None:
    lines = [
        {"messages": ASKED, "response_format": of_schema(SCHEMA), "temperature": 0},
        {"prompt": "A page", "response_format": of_schema({"enum": ["Paris", "Oslo"]})},
        {"messages": ASKED, "response_format": {"type": "text"}, "max_tokens": 4},
        {"messages": ASKED, "max_tokens": 4, "seed": 6, "tools": None, "response_format": None},
    ]
    found = answers(model, tmp_path, lines)
    assert [answer["finish_reason"] for answer in found] == ["stop", "stop", "length", "length"]
    jsonschema.validate(json.loads(found[0]["text"]), SCHEMA)
    assert json.loads(found[1]["text"]) in ("Paris", "Oslo")
    assert found[2]["text"] == found[3]["text"]  # their seeds are the same


def test_calls_of_tools_stand_beside_the_text(model: Model, tmp_path: Path) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    lines: list[dict[str, Any]] = [
        {"messages": ASKED, "tools": TOOLS, "tool_choice": choice} for choice in (named, "required", "none")
    ]
    lines[1]["parallel_tool_calls"] = False
    first, second, plain = answers(model, tmp_path, lines)
    for answer in (first, second):
        assert answer["finish_reason"] == "tool_calls"
        (call,) = answer["tool_calls"]
        schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
        assert (call["type"], len(call["id"])) == ("function", 9)
    assert first["tool_calls"][0]["function"]["name"] == "weather"
    assert (first["text"], list(first)[:4]) == ("", ["line", "id", "key", "text"])
    assert "tool_calls" not in plain


def test_what_a_model_writes_beside_a_call_and_the_result_that_comes_back(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(['I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'])
    monkeypatch.setattr(TextStream, "push", lambda self, token: next(said, ""))
    (found,) = answers(model, tmp_path, [{"messages": ASKED, "tools": TOOLS, "max_tokens": 3}])
    assert (found["text"], found["finish_reason"]) == ("I look.", "length")  # as it was cut off
    (call,) = found["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    monkeypatch.undo()
    rendered: list[Any] = []
    render = ChatTemplate.render

    def noted(self: Any, messages: Any, *others: Any, **more: Any) -> str:
        rendered.append(render(self, messages, *others, **more))
        return str(rendered[-1])

    monkeypatch.setattr(ChatTemplate, "render", noted)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    (tmp_path / "out").unlink()
    said_before = {"role": "assistant", "content": None, "tool_calls": [call]}
    answers(model, tmp_path, [{"messages": [*ASKED, said_before, result], "tools": TOOLS, "max_tokens": 1}])
    assert '<weather{"city": "Oslo"}>' in rendered[0]
    assert "result: rain" in rendered[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "line 2 of the prompts: tools[0].type: expected function"),
        ({"tool_choice": "required"}, "line 2 of the prompts: tool_choice: 'required' needs tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "line 2 of the prompts: tool_choice: expected none, auto, required"),
        ({"tools": TOOLS, "response_format": of_schema(SCHEMA)}, "response_format: a form and tools cannot be asked"),
        ({"messages": [{"role": "sage", "content": "x"}]}, "line 2 of the prompts: messages[0].role: expected system"),
        ({"messages": [{"role": "user"}]}, "line 2 of the prompts: messages[0].content: expected a text"),
        (
            {"response_format": of_schema({"type": "string", "pattern": "[" * 99})},
            "line 2 of the prompts: schema: ",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(
    model: Model, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    asked = read_prompts(write(tmp_path / "prompts", [{"messages": ASKED}, {"messages": ASKED, **change}]))
    with pytest.raises(PromptFileError) as found:
        write_answers(model, asked, tmp_path / "out", DEFAULTS, LIMITS, "e")
    assert message in str(found.value)
    assert not (tmp_path / "out").exists() or not (tmp_path / "out").read_bytes()


def test_an_answer_to_another_form_is_not_taken_for_this_one(tmp_path: Path) -> None:
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}  # type: ignore[attr-defined]
    lines: list[dict[str, Any]] = [
        {"messages": ASKED},
        {"messages": ASKED, "response_format": {"type": "json_object"}},
        {"messages": ASKED, "response_format": of_schema(SCHEMA)},
        {"messages": ASKED, "response_format": of_schema(turned)},
        {"messages": ASKED, "tools": TOOLS},
        {"messages": ASKED, "tools": TOOLS, "tool_choice": "required"},
        {"messages": ASKED, "tools": TOOLS, "parallel_tool_calls": False},
        {"messages": ASKED, "tools": TOOLS[:1]},
    ]
    asked = read_prompts(write(tmp_path / "prompts", lines))
    keys = {prompt.key(DEFAULTS, "e") for prompt in asked}
    assert len(keys) == len(lines)
    (same,) = read_prompts(write(tmp_path / "prompts", [{**lines[0], "tools": None}]))
    assert same.key(DEFAULTS, "e") == asked[0].key(DEFAULTS, "e")
    assert replace(asked[0], line=9).key(DEFAULTS, "e") == asked[0].key(DEFAULTS, "e")
