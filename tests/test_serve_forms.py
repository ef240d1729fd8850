"""Answers of a given form: response_format, Ollama's format and generate --json-schema, asked by the real clients."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ollama
import openai
import pytest

from bincompress.inference.constraint import Grammars
from bincompress.inference.load import load
from tests.conftest import Run
from tests.serving import BOUND, Running, make_store, running, until

pytestmark = pytest.mark.slow
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "bits": {"enum": [1, 2, 3]}},
    "required": ["name", "bits"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Running]:
    with running(store, load(str(store), threads=1)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=BOUND
    ) as made:
        yield made


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


def test_generate_writes_json(run: Run, tmp_path: Path, store: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    arguments = ("generate", store, "As JSON: ", "--json-schema", schema, "--threads", 1, "--seed", 3)
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
