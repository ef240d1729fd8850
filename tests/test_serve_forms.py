"""Answers of a given form: response_format, Ollama's format and generate --json-schema, asked by the real clients."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import ollama
import openai
import pytest

from bincompress.inference.chat import ChatTemplate
from bincompress.inference.constraint import Grammars
from bincompress.inference.sampling import Sampler
from bincompress.model.decoder import Decoder
from tests.chat_stores import HERMES, OTHER, TOOL
from tests.conftest import Run
from tests.serving import BOUND, Running, openai_client, running, until

pytestmark = pytest.mark.slow
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "bits": {"enum": [1, 2, 3]}},
    "required": ["name", "bits"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


def test_answers_follow_their_schema(client: openai.OpenAI) -> None:
    asked: Any = {**ASKED, "response_format": json_schema(SCHEMA), "temperature": 1.5, "seed": 4}
    found = client.chat.completions.create(**asked, n=3)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == found.choices[0].message.content
    any_object: Any = {"type": "json_object"}
    found = client.chat.completions.create(**{**ASKED, "response_format": any_object, "max_tokens": 20}, logprobs=True)
    assert (found.choices[0].message.content or "").startswith("{")
    free = client.chat.completions.create(**{**ASKED, "max_tokens": 3}, response_format={"type": "text"})
    assert free.choices[0].message.content is not None


def test_ollama_too(server: Running) -> None:
    with ollama.Client(f"http://127.0.0.1:{server.port}", timeout=BOUND) as asked:
        found = asked.chat("tiny", ASKED["messages"], format=SCHEMA, options={"num_predict": 200})
        jsonschema.validate(json.loads(found.message.content or ""), SCHEMA)
        written = asked.generate("tiny", "Hello", format=SCHEMA, options={"num_predict": 200})
        jsonschema.validate(json.loads(written.response), SCHEMA)
        assert asked.generate("tiny", "Hello", format="json", options={"num_predict": 9}).response.startswith("{")
        with pytest.raises(ollama.ResponseError, match="format: expected 'json' or a JSON schema"):
            asked._request_raw("POST", "/api/generate", json={"model": "tiny", "prompt": "x", "format": "yaml"})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "xml"}, "response_format.type: expected text, json_object or json_schema, found 'xml'"),
        ({"type": "json_schema"}, "response_format.json_schema.schema: expected a JSON schema"),
        (json_schema({"type": "strin"}), "Invalid type: strin"),
        (json_schema({"uniqueItems": True}), "schema.uniqueItems: this keyword is not supported"),
        ({**json_schema({}), "strict": True}, "response_format.strict: this parameter is not supported"),
        (json_schema({"type": "string", "pattern": "^(a?){500}a{500}$"}), "too many"),
    ],
)
def test_faulty_schemas_are_refused_by_name(client: openai.OpenAI, form: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**ASKED, response_format=form)
    assert message in str(found.value)


def test_other_requests_go_on_while_a_schema_is_compiled(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    begun, go, compiled = threading.Event(), threading.Event(), Grammars.compiled

    def slowly(self: Grammars, grammar: str) -> Any:
        begun.set()
        assert go.wait(BOUND)
        return compiled(self, grammar)

    monkeypatch.setattr(Grammars, "compiled", slowly)
    asked: Any = {**ASKED, "response_format": json_schema({"const": 7})}
    found: list[Any] = []
    waiting = [threading.Thread(target=lambda: found.append(client.chat.completions.create(**asked))) for _ in range(6)]
    for each in waiting:
        each.start()
    assert begun.wait(BOUND)
    until(lambda: server.service.compiling == 6)
    assert client.chat.completions.create(**{**ASKED, "max_tokens": 2}).choices[0].finish_reason == "length"
    server.service.compiling += 8  # as many as may wait
    status, told = server.ask("/v1/chat/completions", asked)
    server.service.compiling -= 8
    assert (status, told["error"]["message"]) == (429, "too many schemas are being compiled; try again later")
    go.set()
    for each in waiting:
        each.join(BOUND)
    assert [each.choices[0].message.content for each in found] == ["7"] * 6


@pytest.fixture(scope="module")
def with_tools(server: Running, chat_store: Path) -> Iterator[Running]:
    """A server whose template takes tools."""
    model = replace(server.service.model, template=ChatTemplate({"default": HERMES}))
    with running(chat_store, model) as made:
        yield made


@pytest.fixture(scope="module")
def caller(with_tools: Running) -> Iterator[openai.OpenAI]:
    with openai_client(with_tools) as made:
        yield made


def scripted(monkeypatch: pytest.MonkeyPatch, server: Running, text: str) -> None:
    """Have the model write this text."""
    tokenizer = server.service.model.tokenizer
    tokens = [*tokenizer.encode(text, special=False), min(tokenizer.eos_ids)]

    class Script(Sampler):
        def choose(self, logits: Any) -> int:
            return tokens[int(self._counts.sum())] + self._noted()

        def _noted(self) -> int:
            self._counts[0] += 1
            return 0

    monkeypatch.setattr("bincompress.inference.sequence.Sampler", Script)


def test_asked_for_calls_come_with_their_arguments(caller: openai.OpenAI) -> None:
    asked: Any = {**ASKED, "tools": [TOOL, OTHER], "seed": 2, "temperature": 1.5}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    found = caller.chat.completions.create(**asked, tool_choice=named)
    choice = found.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    with caller.chat.completions.stream(**asked, tool_choice=named) as stream:
        told = stream.get_final_completion()
    (again,) = told.choices[0].message.tool_calls or []
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
    assert told.choices[0].finish_reason == "tool_calls"
    several = caller.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
    assert len(several.choices[0].message.tool_calls or []) == 1


def test_calls_of_its_own_accord_and_their_results(
    with_tools: Running, caller: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats: Any = caller.chat.completions
    scripted(
        monkeypatch,
        with_tools,
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    )
    found = chats.create(**ASKED, tools=[TOOL])
    message = found.choices[0].message
    (call,) = message.tool_calls or []
    assert (message.content, found.choices[0].finish_reason) == ("I look.", "tool_calls")
    chunks = list(chats.create(**ASKED, tools=[TOOL], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
    (part,) = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert part.function is not None
    assert (part.index, part.function.name, part.function.arguments) == (0, "weather", '{"city": "Oslo"}')
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    plain = chats.create(**ASKED, tools=[TOOL], tool_choice="none")
    assert "<tool_call>" in (plain.choices[0].message.content or "")

    back: Any = [*ASKED["messages"], message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    tokens = with_tools.ask("/tokenize", {"messages": json.loads(json.dumps(back, default=lambda m: m.to_dict()))})[1]
    said = with_tools.service.model.tokenizer.decode(tokens["tokens"])
    assert said == 'user: Helloassistant: I look.<weather{"city": "Oslo"}>result: rainanswer:'
    assert chats.create(**{**ASKED, "messages": back}, tools=[TOOL]).choices

    with ollama.Client(f"http://127.0.0.1:{with_tools.port}", timeout=BOUND) as asked:
        told = asked.chat("tiny", ASKED["messages"], tools=[TOOL])
        (own,) = told.message.tool_calls or []
        assert (told.message.content, own.function.name, own.function.arguments) == (
            "I look.",
            "weather",
            {"city": "Oslo"},
        )
        lines = list(asked.chat("tiny", ASKED["messages"], tools=[TOOL], stream=True))
        assert [call.function.name for line in lines for call in line.message.tool_calls or []] == ["weather"]
        result: Any = {"role": "tool", "tool_name": "weather", "content": "rain"}
        assert asked.chat("tiny", [*ASKED["messages"], told.message, result], tools=[TOOL]).done


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type: expected function, found 'web_search'"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name: expected 1 to 64 letters"),
    ({"tools": [TOOL, TOOL]}, "tools: expected a name of its own for each"),
    ({"tools": [OTHER] * 200}, "tools: expected at most 128, found 200"),
    ({"tool_choice": "required"}, "tool_choice: 'required' needs tools"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice: expected none, auto, required or a function"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice.function.name: expected the name of one of the tools, found 'x'",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools[0].function.strict: true is enforced with tool_choice",
    ),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
        "tools: schema.not: this keyword is not supported",
    ),
    (
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        "response_format: a form and tools cannot be asked",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
        "messages[0].tool_calls[0].function.arguments: expected a JSON object as a text",
    ),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "this model's chat template does not use 'enable_thinking'"),
    ({"chat_template_kwargs": {"tools": []}}, "tools is not a variable that a request may set"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_is_wrong_with_tools_is_refused(with_tools: Running, more: dict[str, Any], message: str) -> None:
    status, told = with_tools.ask("/v1/chat/completions", {**ASKED, **more})
    assert status == 400
    assert message in told["error"]["message"]


def test_a_template_without_tools_refuses_them(server: Running) -> None:
    status, told = server.ask("/v1/chat/completions", {**ASKED, "tools": [TOOL]})
    assert (status, told["error"]["message"]) == (
        400,
        "tools: this model's chat template does not use tools; expected none",
    )
    messages = [{"role": "tool", "content": "rain"}]
    told = server.ask("/v1/chat/completions", {**ASKED, "messages": messages})[1]
    assert told["error"]["message"] == "messages[0].role: this model's chat template does not know the role tool"
    assert (
        server.ask("/v1/chat/completions", {**ASKED, "tools": [TOOL], "tool_choice": "none", "max_tokens": 1})[0] == 200
    )


def test_generate_writes_json(run: Run, tmp_path: Path, chat_store: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    arguments = ("generate", chat_store, "As JSON: ", "--json-schema", schema, "--threads", 1, "--seed", 3)
    code, out, _ = run(*arguments, "--json", "--temperature", 1)
    assert code == 0
    found = json.loads(out)
    assert found["finish_reason"] == "stop"
    jsonschema.validate(json.loads(found["text"]), SCHEMA)
    schema.write_text('{"type": "object", "unique": 1}')
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.strip() == f"error: {schema}: schema.unique: this keyword is not supported"
    schema.write_text("{")
    assert "not JSON" in run(*arguments)[2]


def test_a_prompt_cache_gives_the_same_text_and_is_refused_elsewhere(
    run: Run, chat_store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cache.safetensors"
    asked = ("generate", chat_store, "In Python, a list is", "--threads", 1, "--temperature", 0, "--max-tokens", 6)
    plain = run(*asked)[1]
    assert run(*asked, "--prompt-cache", file)[1] == plain
    first = file.read_bytes()
    passes: list[int] = []
    alone = Decoder.next_logits

    def counted(self: Decoder, ids: Any, cache: Any) -> Any:
        passes.append(len(ids))
        return alone(self, ids, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "next_logits", counted)
        longer = (*asked[:2], asked[2] + plain[:8] + " and", *asked[3:])
        assert run(*longer, "--prompt-cache", file)[1] == run(*longer)[1]
    assert passes[0] < passes[6] / 2  # tokens of the prompt that are run, with the file and without
    assert file.read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    code, out, err = run(*asked, "--prompt-cache", file, "--activation-bits", 6)
    assert (code, out) == (2, "")
    assert "cache.safetensors: was made with another store, other activation settings or another version" in err
    for at in (0, 9, len(first) // 2, len(first) - 1):
        file.write_bytes(first[:at] + bytes([first[at] ^ 0x55]) + first[at + 1 :])
        code, out, err = run(*asked, "--prompt-cache", file)
        assert (code, out) == (2, ""), at
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    for content in (b"", first[:-1], first + b"x", b"\xff" * 64):
        file.write_bytes(content)
        assert run(*asked, "--prompt-cache", file)[0] == 2
