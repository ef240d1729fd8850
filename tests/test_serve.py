"""The server in the forms of OpenAI and Ollama, asked by their own clients."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import ollama
import openai
import pytest

from bincompress.inference.generate import GenerationSettings
from bincompress.inference.sampling import Sampling
from tests.chat_stores import TEMPLATE
from tests.serving import BOUND, Running, until

pytestmark = pytest.mark.slow
PROMPT = "In Python,"


@pytest.fixture
def asked_by_ollama(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(f"http://127.0.0.1:{server.port}", timeout=BOUND) as made:
        yield made


def alone(server: Running, prompt: str | list[int], tokens: int) -> str:
    return "".join(server.service.model.stream(prompt, GenerationSettings(tokens, Sampling(temperature=0.0))))


def of_chat(server: Running, before: str = "user: Hello\n") -> list[int]:
    return server.service.model.tokenizer.encode(f"{before}answer:", special=False)


def test_models(client: openai.OpenAI) -> None:
    (listed,) = client.models.list()
    assert listed.id == "tiny"
    assert client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError, match="model 'an/other' is not served here"):
        client.models.retrieve("an/other")


def test_a_completion_is_what_generate_writes(server: Running, client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12)
    assert found.choices[0].text == alone(server, PROMPT, 12)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (4, 12, 16)
    usual = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    assert usual.usage is not None
    assert usual.usage.completion_tokens == 16
    ids = server.service.model.tokenizer.encode(PROMPT)
    assert client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=12).choices == found.choices


def test_several_prompts_and_choices(server: Running, client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=[PROMPT, "A page"], n=2, seed=5, max_tokens=8)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    again = client.completions.create(model="tiny", prompt=[PROMPT, "A page"], n=2, seed=5, max_tokens=8)
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]
    assert found.choices[0].text != found.choices[1].text
    second = client.completions.create(model="tiny", prompt=PROMPT, seed=6, max_tokens=8)
    assert second.choices[0].text == found.choices[1].text
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 32)


def test_a_stop_text_ends_it(server: Running, client: openai.OpenAI) -> None:
    whole = alone(server, PROMPT, 20)
    stop = whole[12:16]
    found = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=20, stop=[stop, "\0"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_echo_and_log_probabilities_over_the_prompt(server: Running, client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    choice, model = found.choices[0], server.service.model
    ids = model.tokenizer.encode(PROMPT)
    rows = model.decoder.logits(ids, model.decoder.new_cache(16, "float16")).astype(float)
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset == [0, *_begins(choice.logprobs.tokens[1:])]
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens[1:]) == PROMPT
    for token, row, share in zip(ids[1:], rows[:-1], choice.logprobs.token_logprobs[1:], strict=True):
        exact = row[token] - math.log(sum(math.exp(each) for each in row))
        assert share == pytest.approx(exact, abs=1e-3)
    assert choice.logprobs.top_logprobs is not None
    assert all(top is None or 2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
    both = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, echo=True, logprobs=1, temperature=0)
    assert both.choices[0].text == PROMPT + alone(server, PROMPT, 3)
    assert both.choices[0].logprobs is not None
    assert both.choices[0].logprobs.token_logprobs is not None
    assert len(both.choices[0].logprobs.token_logprobs) == len(ids) + 3
    assert both.choices[0].logprobs.text_offset == [0, *_begins((both.choices[0].logprobs.tokens or [])[1:])]
    apart = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, logprobs=1, temperature=0)
    assert apart.choices[0].logprobs is not None
    assert apart.choices[0].logprobs.text_offset == _begins(apart.choices[0].logprobs.tokens or [])
    streamed = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=3, echo=True, logprobs=1, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == both.choices[0].text
    joined = [
        share
        for chunk in streamed
        if chunk.choices[0].logprobs
        for share in chunk.choices[0].logprobs.token_logprobs or []
    ]
    assert joined == both.choices[0].logprobs.token_logprobs


def _begins(tokens: list[str]) -> list[int]:
    return [len("".join(tokens[:place])) for place in range(len(tokens))]


def test_a_chat_and_its_stream_are_the_same_text(server: Running, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    found = client.chat.completions.create(**asked, max_tokens=10)
    assert found.choices[0].message.content == alone(server, of_chat(server), 10)
    assert found.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            **asked, max_completion_tokens=10, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == found.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].usage is not None
    assert found.usage is not None
    assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens == 10
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == found.usage.prompt_tokens - 1


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    found = client.chat.completions.create(**asked, max_tokens=6, logprobs=True, top_logprobs=3)
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    assert b"".join(bytes(each.bytes or []) for each in content).decode() == found.choices[0].message.content
    assert all(each.top_logprobs[0].logprob == each.logprob for each in content)  # greedy
    assert all(len(each.top_logprobs) == 3 for each in content)


def test_embeddings_are_means_of_the_final_states(server: Running, client: openai.OpenAI) -> None:
    model, texts = server.service.model, [PROMPT, "A page in memory. " * 20]
    for form in ({"encoding_format": "float"}, {}):  # without it the client asks for base64, which it unpacks
        asked: Any = {"model": "tiny", "input": texts, **form}
        found = client.embeddings.create(**asked)
        for text, entry in zip(texts, found.data, strict=True):
            ids = model.tokenizer.encode(text)
            mean = model.decoder.states(ids, model.decoder.new_cache(len(ids), "float16")).mean(axis=0)
            assert entry.embedding == pytest.approx(list(mean / np.linalg.norm(mean)), abs=1e-5)
        assert found.usage.prompt_tokens == sum(len(model.tokenizer.encode(text)) for text in texts)
    refused = server.ask("/v1/embeddings", {"input": "x", "dimensions": 7})
    assert refused[1]["error"]["message"] == "dimensions: 7 is not supported; expected 256, or nothing"
    assert server.ask("/v1/embeddings", {"input": "x " * 600})[0] == 400
    assert server.ask("/v1/embeddings", {"input": []})[0] == 400


def test_template_variables_and_parts(server: Running, client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
        temperature=0,
        max_tokens=8,
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    prompt = of_chat(server, "system: Be brief.\nuser: Hello\nThink.\n")
    assert found.choices[0].message.content == alone(server, prompt, 8)


def test_samplers_that_clients_send(server: Running, client: openai.OpenAI) -> None:
    forced = server.service.model.tokenizer.encode("kernel", special=False)[0]
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=3, temperature=1, seed=1, logit_bias={str(forced): 100}
    )
    assert found.choices[0].text == server.service.model.tokenizer.decode([forced] * 3)
    chosen = GenerationSettings(12, Sampling(0.9, 40, 0.95, 0.02, 1.1, 0.5, 0.25, seed=3))
    expected = "".join(server.service.model.stream(PROMPT, chosen))
    extra = {"top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1}
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0.9, top_p=0.95, presence_penalty=0.5,
        frequency_penalty=0.25, seed=3, extra_body=extra,
    )  # fmt: skip
    assert found.choices[0].text == expected


COMPLETION: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
TEXT = {"role": "user", "content": "x"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"suffix": "x"}, "suffix: 'x' is not supported"),
    ("/v1/completions", {"best_of": 3}, "best_of: 3 is not supported; expected 1, or nothing"),
    ("/v1/completions", {"n": 0}, "n: expected 1 to 16, found 0"),
    ("/v1/completions", {"n": -1}, "n: expected 1 to 16, found -1"),
    ("/v1/completions", {"n": 2.5}, "n: expected a whole number, found 2.5"),
    ("/v1/completions", {"n": True}, "n: expected a whole number, found true"),
    ("/v1/completions", {"prompt": ["x"] * 17}, "prompt: expected at most 16 texts, found 17"),
    ("/v1/completions", {"prompt": ["x"] * 9, "n": 2}, "n: expected at most 16 texts a request, found 18"),
    ("/v1/completions", {"prompt": [4096]}, "prompt: expected tokens of the vocabulary, 0 to 4095"),
    ("/v1/completions", {"prompt": {"x": 1}}, "prompt: expected a text or a list, found an object"),
    ("/v1/completions", {"prompt": "x " * 600}, "the prompt has "),
    ("/v1/completions", {"max_tokens": 10**9}, "max_tokens: expected at most 508, the context of 512 less the prompt"),
    ("/v1/completions", {"max_tokens": 10**400}, "max_tokens: expected at most 508"),
    ("/v1/completions", {"max_tokens": 0}, "max_tokens: 0 tokens are written only with echo"),
    ("/v1/completions", {"temperature": -1}, "temperature: expected 0.0 to 100.0, found -1"),
    ("/v1/completions", {"temperature": "hot"}, "temperature: expected a number, found 'hot'"),
    ("/v1/completions", {"logprobs": 21}, "logprobs: expected 0 to 20, found 21"),
    ("/v1/completions", {"stop": ["x"] * 10000}, "stop: expected at most 16 texts, found 10,000"),
    ("/v1/completions", {"stop": [""]}, "stop: expected texts of 1 to 256 characters"),
    ("/v1/completions", {"stop": "x" * 257}, "stop: expected texts of 1 to 256 characters"),
    ("/v1/completions", {"logit_bias": {"4096": 1}}, "logit_bias: expected tokens of the vocabulary, 0 to 4095"),
    ("/v1/completions", {"logit_bias": {"x": 1}}, "logit_bias: expected token numbers"),
    ("/v1/completions", {"logit_bias": {"5": 101}}, "logit_bias: expected"),
    ("/v1/completions", {"seed": -1}, "seed: expected 0 to"),
    ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options: expected stream to be true"),
    ("/v1/completions", {"unheard": 1}, "unheard: this parameter is not supported"),
    (
        "/v1/chat/completions",
        {"tools": [{"type": "function"}]},
        "tools[0].function.name: expected 1 to 64 letters",
    ),
    ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs: expected logprobs to be true as well"),
    ("/v1/chat/completions", {"messages": []}, "messages: expected at least one message"),
    ("/v1/chat/completions", {"messages": ["x"]}, "messages[0]: expected an object, found 'x'"),
    ("/v1/chat/completions", {"messages": [{"role": "me", "content": "x"}]}, "messages[0].role: expected system, us"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content: expected a text"),
    ("/v1/chat/completions", {"messages": [{**TEXT, "name": "I"}]}, "messages[0].name: this parameter is not supp"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content: expected parts with type and text alone, found one of type 'image_url'",
    ),
    ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: messages is not a va"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs: self is not a variable"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"forever": True}}, "takes longer than 1 s"),
    ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort: this parameter is not supported"),
    ("/api/chat", {"options": {"mirostat": 1}}, "options.mirostat: this parameter is not supported"),
    ("/api/chat", {"options": {"num_ctx": 100000}}, "options.num_ctx: expected 1 to 512, found 100000"),
    ("/api/chat", {"keep_alive": 0}, "keep_alive: 0: the model stays loaded"),
    ("/api/chat", {"keep_alive": "0m"}, "keep_alive: '0m': the model stays loaded"),
    ("/api/chat", {"keep_alive": "long"}, "keep_alive: expected a time such as '5m', found 'long'"),
    ("/api/generate", {"max_tokens": None, "raw": True, "think": True}, "think: true is not supported"),
    ("/v1/completions", {"prompt": "x", "stop": ["\ud800"]}, "stop: expected texts of Unicode, found a lone surrogate"),
    ("/v1/completions", {"\ud800": 1}, "\\ud800: this parameter is not supported"),
    ("/v1/chat/completions", {"stream_options": {"\ud800": 1}}, "stream_options.\\ud800: this parameter is not supp"),
    ("/api/chat", {"options": {"\ud800": 1}}, "options.\\ud800: this parameter is not supported"),
]


@pytest.mark.parametrize(("path", "changed", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    server: Running, path: str, changed: dict[str, Any], message: str
) -> None:
    base = COMPLETION if "chat" not in path else {key: CHAT[key] for key in (["messages"] if "api" in path else CHAT)}
    status, body = server.ask(path, {**base, **changed})
    told = body["error"] if path.startswith("/api/") else body["error"]["message"]
    assert status == 400
    assert message in told


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not UTF-8"),
        (b"[]", 400, "the body: expected an object, found a list"),
        (b"[" * 60000, 400, "the body is nested too deeply"),
        (b'{"prompt": ' + b"[" * 64 + b"]" * 64 + b"}", 400, "the body is nested too deeply"),
        (b'{"prompt": NaN}', 400, "the body is not JSON: NaN is not a number of JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", 400, "the body: a number of 5,000 digits; expected at most 4000"),
        (b'{"prompt": "\\ud800"}', 400, "text: not UTF-8"),
        (b'{"prompt": "x", "n": 1, "prompt": "y"}', 400, "the body: 'prompt' is there twice in one object"),
        (b'{"prompt": "x", "stream_options": {"a": 1, "a": 1}}', 400, "the body: 'a' is there twice in one object"),
        (b'{"model": "other", "prompt": "x"}', 404, "model 'other' is not served here; expected 'tiny'"),
        (b" " * (5 << 20), 413, "the request is too large"),
    ],
)
def test_bodies_that_cannot_be_read(server: Running, body: bytes, status: int, message: str) -> None:
    found, _, content = server.raw("/v1/completions", body)
    told = json.loads(content)["error"]["message"]
    assert (found, told[: len(message)]) == (status, message)


def test_other_routes_methods_and_kinds_of_body(server: Running) -> None:
    assert server.ask("/v1/unheard")[0] == 404
    assert server.raw("/v1/completions")[0] == 405
    plain = server.raw("/v1/completions", b"{}", {"content-type": "text/plain"})
    assert plain[0] == 415
    for header, value in (
        ("content-encoding", "gzip"),
        ("content-type", "application/json; charset=utf-16"),
        ("content-type", 'application/json; charset="latin-1"'),
    ):
        status, _, content = server.raw("/v1/completions", b'{"prompt": "x"}', {header: value})
        assert (status, json.loads(content)["error"]["message"].partition(":")[0]) == (415, header)
    named = {"content-type": 'application/json; charset="UTF-8"', "content-encoding": "identity"}
    assert server.raw("/v1/completions", b'{"prompt": "x", "max_tokens": 1}', named)[0] == 200
    assert server.ask("/health", headers={"host": "evil.example"})[0] == 403
    assert server.ask("/health", headers={"host": "localhost:1"}) == (200, {"status": "ok"})


def test_what_a_client_knows_of_the_tokenizer(server: Running) -> None:
    """As lm_eval's RemoteTokenizer asks it: the ends' texts are tokens, and the template is the model's."""
    status, found = server.ask("/tokenizer_info")
    assert (status, set(found)) == (200, {"eos_token", "bos_token", "pad_token", "chat_template"})
    assert found["chat_template"] == TEMPLATE
    asked = {"prompt": found["eos_token"], "add_special_tokens": False}
    (end,) = server.ask("/tokenize", asked)[1]["tokens"]
    assert end in server.service.model.tokenizer.eos_ids


def test_tokenize_and_back(server: Running) -> None:
    ids = server.service.model.tokenizer.encode("naïve \N{PILE OF POO}")
    status, found = server.ask("/tokenize", {"prompt": "naïve \N{PILE OF POO}"})
    assert (status, found["tokens"], found["count"], found["max_model_len"]) == (200, ids, len(ids), 512)
    assert server.ask("/detokenize", {"tokens": ids[1:]})[1] == {"prompt": "naïve \N{PILE OF POO}"}
    chat = server.ask("/tokenize", {"messages": [TEXT]})[1]["tokens"]
    assert chat == of_chat(server, "user: x\n")
    assert server.ask("/detokenize", {"tokens": [-1]})[0] == 400


def test_a_character_that_several_tokens_make_comes_whole(server: Running, client: openai.OpenAI) -> None:
    """The bias makes the model write a character of four bytes, a token each."""
    tokenizer = server.service.model.tokenizer
    ids = tokenizer.encode("\N{PILE OF POO}", special=False)
    assert len(ids) > 1
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == "\N{PILE OF POO}".encode()
    prompt = "\N{PILE OF POO}" * 5
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, temperature=1.5, seed=2, stream=True,
            logit_bias=dict.fromkeys(map(str, ids), 30),
        )
    ]  # fmt: skip
    # Bytes that make no character come as replacement characters, and no piece splits one.
    assert all(piece.encode("utf-8").decode("utf-8") == piece for piece in pieces)
    assert len(pieces) < 40


def test_metrics_are_prometheus_text(server: Running, client: openai.OpenAI) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    before = server.service.ready().counts.written
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5)
    until(lambda: not server.service.ready().active)
    text = server.raw("/metrics")[2].decode()
    samples = {
        sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert samples["bincompress_written_tokens_total"] == before + 5
    assert samples["bincompress_model_loaded"] == 1
    assert samples["bincompress_texts_written_now"] == 0


def test_ollama_chat(server: Running, asked_by_ollama: ollama.Client) -> None:
    client = asked_by_ollama
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    options = {"temperature": 0, "num_predict": 10}
    found = client.chat(**asked, options=options)
    assert found.message.content == alone(server, of_chat(server), 10)
    assert (found.done, found.done_reason, found.eval_count) == (True, "length", 10)
    pieces = list(client.chat(**asked, options=options, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == found.message.content
    assert pieces[-1].done
    thinking = client.chat(**asked, options=options, think=True)
    assert thinking.message.content == alone(server, of_chat(server, "user: Hello\nThink.\n"), 10)


def test_ollama_generate(server: Running, asked_by_ollama: ollama.Client) -> None:
    client = asked_by_ollama
    options = {"temperature": 0, "num_predict": 10, "num_ctx": 256}
    found = client.generate("tiny:latest", PROMPT, raw=True, options=options)
    assert found.response == alone(server, PROMPT, 10)
    templated = client.generate("tiny", "Hello", options=options)
    assert templated.response == alone(server, of_chat(server), 10)
    with pytest.raises(ollama.ResponseError, match="model 'other' is not served here"):
        client.generate("other", PROMPT)


def test_ollama_tags(server: Running, asked_by_ollama: ollama.Client) -> None:
    client = asked_by_ollama
    (model,) = client.list().models
    assert model.model == "tiny:latest"
    assert model.size is not None
    assert model.size > 1_000_000
