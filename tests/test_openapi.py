"""Does the OpenAPI description say what the server takes, no more and no less?"""

import pytest

from tests.serving import Running

pytestmark = pytest.mark.slow


def test_every_route_and_field_is_described(server: Running) -> None:
    told = server.ask("/openapi.json")[1]
    routes = {(route.path, method) for route in server.server.config.app.routes for method in route.methods}  # type: ignore[union-attr]
    described = {
        (path.replace("{name}", "{name:path}"), method.upper()) for path, own in told["paths"].items() for method in own
    }
    assert {(path, method) for path, method in routes if path != "/" and method != "HEAD"} == described
    for path, own in told["paths"].items():
        if "post" not in own:
            assert server.raw(path.replace("{name}", "tiny"))[0] == 200
            continue
        body = own["post"]["requestBody"]["content"]["application/json"]["schema"]
        for schema in body.get("anyOf", [body]):
            # A value that no field takes: a described field is refused for its value, an unknown one by its name.
            for name in schema["properties"]:
                given = {"messages": [[0]], name: [[None]]} if "messages" in schema["required"] else {name: [[None]]}
                status, found = server.ask(path, given)
                assert status == 400
                assert "not supported" not in str(found), (path, name)
            assert "this parameter is not supported" in str(server.ask(path, {**_asked(path), "unheard": 1})[1]), path


def _asked(path: str) -> dict[str, object]:
    bodies: dict[str, dict[str, object]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/api/chat": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/embeddings": {"input": "x"},
        "/v1/responses": {"input": "x"},
        "/detokenize": {"tokens": [5]},
    }
    return bodies.get(path, {"prompt": "x"})


def test_another_method_is_told_which_is_expected(server: Running) -> None:
    status, headers, content = server.raw("/v1/completions", method="DELETE")
    assert (status, headers["allow"]) == (405, "POST")
    assert b"Method Not Allowed: expected POST here, found DELETE" in content


def test_whole_numbers_may_be_written_with_a_point(server: Running) -> None:
    assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 2.0})[0] == 200
    assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 2.5})[0] == 400


def test_every_route_refuses_another_model(server: Running) -> None:
    for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/api/chat"):
        status, told = server.ask(path, {**_asked(path), "model": "another"})
        assert (status, "model 'another' is not served here" in str(told)) == (404, True), path
