"""Chat templates: where they are found, what they may not do, and how they say no."""

import json
from typing import Any

import pytest

from bincompress.inference.chat import ChatTemplate, load_template
from bincompress.model.errors import PromptError, TemplateError

TALK = [{"role": "user", "content": "hi"}]
SIMPLE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def rendered(template: str, messages: Any = TALK, **variables: Any) -> str:
    return ChatTemplate({"default": template}).render(messages, **variables)


def files(**config: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(config).encode()}


def test_template_of_the_tokenizer_config() -> None:
    template = load_template(files(chat_template=SIMPLE, bos_token={"content": "<s>"}))
    assert template is not None
    assert template.render(TALK) == "<s>[user] hi"


def test_file_of_its_own_comes_first() -> None:
    template = load_template({**files(chat_template="old", bos_token="<s>"), "chat_template.jinja": SIMPLE.encode()})
    assert template is not None
    assert template.render(TALK) == "<s>[user] hi"


def test_named_templates() -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    template = load_template(files(chat_template=named))
    assert template is not None
    assert template.render(TALK) == "plain"
    assert template.render(TALK, tools=[{"name": "f"}]) == "f"


def test_templates_as_an_object_by_name() -> None:
    template = load_template(files(chat_template={"default": "plain", "tool_use": "tools"}))
    assert template is not None
    assert (template.render(TALK), template.render(TALK, tools=[{"name": "f"}])) == ("plain", "tools")


def test_keys_without_a_value_are_left_out_of_messages() -> None:
    """As transformers does: an assistant's message that calls a tool has `content: null` in OpenAI's form."""
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "reasoning": None}]
    template = load_template(files(chat_template="{% for m in messages %}{{ m | tojson }}{{ m.content }}{% endfor %}"))
    assert template is not None
    assert template.render(calls) == '{"role": "assistant", "tool_calls": [{"name": "f"}]}'


def test_tokens_of_the_class_are_variables() -> None:
    written = {**files(chat_template="{{ bos_token }}", tokenizer_class="LlamaTokenizer"), "tokenizer.json": b"{}"}
    template = load_template(written)
    assert template is not None
    assert template.render(TALK) == "<s>"


def test_no_template() -> None:
    assert load_template({}) is None
    assert load_template(files(bos_token="<s>")) is None


@pytest.mark.parametrize("given", [5, {"default": 1}, ["x"], [{"name": "default"}]])
def test_template_of_another_form_is_refused(given: Any) -> None:
    with pytest.raises(TemplateError, match=r"^tokenizer_config\.json: chat_template: expected"):
        load_template(files(chat_template=given))


def test_names_without_a_default() -> None:
    with pytest.raises(TemplateError, match="expected one that is named 'default', found rag"):
        ChatTemplate({"rag": "x"}).render(TALK)


def test_generation_prompt_and_own_variables() -> None:
    template = "{% if add_generation_prompt %}go{% endif %}{{ mode }}"
    assert rendered(template, mode="x") == "gox"
    assert rendered(template, add_generation_prompt=False) == ""


def test_refusal_of_the_template_is_the_prompts_fault() -> None:
    with pytest.raises(PromptError, match=r"^chat template: roles must alternate$"):
        rendered("{{ raise_exception('roles must alternate') }}")


HOSTILE = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__subclasses__() }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('x') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% for i in range(1000000000000) %}x{% endfor %}",
    "{{ 'x' * 1000000000000 }}",
    "{{ 1000000000000 * [1, 2] }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '{:>9999999999999}'.format(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content.nothing.nothing }}",
    "{{ tools | length }}",
    "{% if %}",
    "{{ messages | nofilter }}",
    "{% for x in messages %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_and_broken_templates_give_one_line(template: str) -> None:
    with pytest.raises(TemplateError, match=r"^chat template: ") as caught:
        rendered(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages", [["hi"], [{"role": "user", "content": object()}], [{"role": "user", "content": b""}]]
)
def test_messages_are_plain_data(messages: Any) -> None:
    with pytest.raises(PromptError, match=r"^chat: expected"):
        rendered(SIMPLE, messages)


def test_templates_in_files_of_their_own_replace_those_of_the_config() -> None:
    config = {"chat_template": "old {{ bos_token }}", "bos_token": "<s>", "image_token": "<img>"}
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    assert render_with(files) == "old <s>"
    files |= {
        "special_tokens_map.json": b'{"bos_token": {"content": "<t>"}}',
        "chat_template.jinja": b"{{ image_token }}",
    }
    assert render_with(files) == "<img>"
    files |= {"additional_chat_templates/tool_use.jinja": b"{{ bos_token }}{{ tools[0].name }}"}
    assert render_with(files, [{"name": "f"}]) == "<t>f"
    del files["chat_template.jinja"]
    with pytest.raises(TemplateError, match="expected one that is named 'default', found tool_use"):
        render_with(files)


def render_with(files: dict[str, bytes], tools: Any = None) -> str:
    template = load_template(files)
    assert template is not None
    return template.render([{"role": "user", "content": "x"}], tools)
