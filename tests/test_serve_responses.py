"""/v1/responses, asked by the real client of OpenAI: the text of a chat, whole and as events."""

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.serving import Running

pytestmark = pytest.mark.slow
SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"bits": {"enum": [1, 2, 3]}}, "required": ["bits"], "additionalProperties": False,
}  # fmt: skip
ASKED: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 8, "temperature": 0}


def test_it_is_the_text_of_a_chat(client: openai.OpenAI) -> None:
    found = client.responses.create(**ASKED, instructions="Be short.", metadata={"of": "a test"})
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert (found.output_text, found.metadata) == (chat.choices[0].message.content, {"of": "a test"})
    assert (found.status, found.incomplete_details and found.incomplete_details.reason) == (
        "incomplete", "max_output_tokens"
    )  # fmt: skip
    assert found.usage is not None
    assert chat.usage is not None
    counts = (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens)
    assert counts == (chat.usage.prompt_tokens, 8, chat.usage.total_tokens)
    # The next turn has the answer as it came.
    turns: Any = [
        {"role": "developer", "content": "Be short."}, {"role": "user", "content": "Hello"},
        *(item.model_dump(exclude_none=True) for item in found.output),
        {"role": "user", "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": " now?"}]},
    ]  # fmt: skip
    again = client.responses.create(**{**ASKED, "input": turns})
    messages += [{"role": "assistant", "content": found.output_text}, {"role": "user", "content": "And now?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert again.output_text == chat.choices[0].message.content
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_its_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == whole.output_text == last.response.output_text
    # The client's own helper, which puts the events together.
    with client.responses.stream(**ASKED) as stream:
        for _ in stream:
            pass
    assert last.response.usage.output_tokens == 8


def test_an_answer_of_a_given_form(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "bits", "schema": SCHEMA, "strict": True}}
    found = client.responses.create(**{**ASKED, "max_output_tokens": 100}, text=form)
    assert found.status == "completed"
    jsonschema.validate(json.loads(found.output_text), SCHEMA)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: this parameter is not supported"),
        ({"conversation": "c"}, "conversation: this parameter is not supported"),
        ({"store": True}, "store: true is not supported; expected false, or nothing"),
        ({"tools": [{"type": "web_search"}]}, "tools: a list is not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning: this parameter is not supported"),
        ({"text": {"verbosity": "low"}}, "text.verbosity: this parameter is not supported"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type: expected text, json_object or json_schema"),
        ({"input": []}, "input: expected a text, or at least one message"),
        ({"input": [5]}, "input[0].type: expected a message, found 5"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type: expected a message, found 'item_ref"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role: expected system, developer, user or assist"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
            "input[0].content[0].type: expected input_text or output_text with a text, found 'input_image'",
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema: expected a JSON schema"),
        ({"max_output_tokens": 512}, "max_output_tokens: expected at most 5"),
        ({"max_output_tokens": 0}, "max_output_tokens: expected 1 to 512, found 0"),
        ({"temperature": "hot"}, "temperature: expected a number, found 'hot'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: Running, changed: dict[str, Any], message: str) -> None:
    status, body = server.ask("/v1/responses", {**ASKED, **changed})
    assert (status, body["error"]["message"][: len(message)]) == (400, message)
