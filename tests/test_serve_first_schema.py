"""The first request for an answer of a given form finds llguidance's tokenizer already made."""

from pathlib import Path
from typing import Any

import pytest

from bincompress.inference.load import load
from tests.serving import running

pytestmark = pytest.mark.slow


def test_the_first_schema_makes_no_tokenizer(chat_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llguidance = pytest.importorskip("llguidance")

    def refused(*given: Any, **named: Any) -> None:
        raise AssertionError("made while requests are answered")

    with running(chat_store, load(str(chat_store), threads=1)) as server:
        monkeypatch.setattr(llguidance, "LLTokenizer", refused)
        body = {
            "messages": [{"role": "user", "content": "One"}],
            "max_tokens": 8,
            "response_format": {"type": "json_schema", "json_schema": {"name": "yes", "schema": {"const": "a"}}},
        }
        status, found = server.ask("/v1/chat/completions", body)
    assert (status, found["choices"][0]["message"]["content"]) == (200, '"a"')


def test_a_tokenizer_that_llguidance_cannot_read_costs_schemas_alone(
    chat_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llguidance = pytest.importorskip("llguidance")
    model = load(str(chat_store), threads=1)

    def refused(*given: Any, **named: Any) -> None:
        raise ValueError("unsupported tokenizer")

    monkeypatch.setattr(llguidance, "LLTokenizer", refused)
    with running(chat_store, model) as server:
        status, _ = server.ask("/v1/completions", {"prompt": "x", "max_tokens": 2})
        assert status == 200
        body = {"messages": [{"role": "user", "content": "One"}], "response_format": {"type": "json_object"}}
        status, found = server.ask("/v1/chat/completions", body)
        assert (status, "llguidance" in found["error"]["message"]) == (500, True)  # of the server, not of the request
