"""Do samplers and chat templates what those of transformers do?"""

from typing import Any

import numpy as np
import pytest

from bincompress.inference.chat import ChatTemplate
from bincompress.inference.sampling import Sampling, candidates

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow  # PyTorch and transformers

SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.8),
    Sampling(top_p=0.01),
    Sampling(min_p=0.1),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    Sampling(temperature=0.3, top_k=10, top_p=0.5, repetition_penalty=0.8),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_filters_keep_what_transformers_keeps(settings: Sampling) -> None:
    from transformers.generation import logits_process as theirs

    filters: list[Any] = []
    if settings.repetition_penalty != 1.0:
        filters.append(theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    filters.append(theirs.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        filters.append(theirs.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        filters.append(theirs.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        filters.append(theirs.MinPLogitsWarper(settings.min_p))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal(300) * 3).astype(np.float32)
        before = rng.integers(0, 300, 25)
        scores = torch.from_numpy(logits.copy())[None]
        for each in filters:
            scores = each(torch.from_numpy(before)[None], scores)
        seen = np.zeros(300, bool)
        seen[before] = True
        ids, values = candidates(logits, seen, settings)
        ours = np.full(300, -np.inf)
        ours[ids] = values
        theirs_below = scores[0].numpy() - scores[0].numpy().max()  # float32, rounded at the size of the logits
        assert np.allclose(ours, theirs_below, rtol=1e-6, atol=1e-5)


LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none and tools is defined %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.seen %}
        {%- set ns.last = messages|length - loop.index %}
        {%- set ns.seen = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last and reasoning %}
            {%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL_TEMPLATE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
CHATML_TEMPLATE = """
  {% for message in messages %}
    {% if message['role'] == 'skip' %}
      {% continue %}
    {% endif %}
<|im_start|>{{ message['role'] }}
    {% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|im_end|>
{% endgeneration %}
    {% else %}
{{ message['content'] }}<|im_end|>
    {% endif %}
  {% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
{{ dict(a=1, b="<é>") | tojson(sort_keys=true, separators=(",", ":")) }}{{ strftime_now("%Y") }}
"""
TALK = [
    {"role": "system", "content": " You are terse. "},
    {"role": "user", "content": "What is <b>&amp;</b>? \n"},
    {"role": "assistant", "content": "\n\nIt is 'bold' — \"ünï\" ", "reasoning": "\nhm\n"},
    {"role": "user", "content": "Say {{ bos_token }} 你好 😀"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": ["é", 1, None, True, 1.5]}}}]


@pytest.mark.parametrize("template", [LLAMA3_TEMPLATE, QWEN_TEMPLATE, MISTRAL_TEMPLATE, CHATML_TEMPLATE])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", [TALK, TALK[1:3]])
def test_chat_bytes_equal_transformers(template: str, prompt: bool, tools: Any, messages: Any) -> None:
    from tokenizers import Tokenizer, models

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    expected = theirs.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=False,
        enable_thinking=False,
    )
    ours = ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(messages, tools, prompt, enable_thinking=False) == expected
