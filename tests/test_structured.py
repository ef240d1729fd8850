"""Texts held to a JSON schema: does each validate whatever the model writes, and do hostile schemas no harm?"""

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers

from bincompress.inference.constraint import ConstraintError, Grammars
from bincompress.inference.json_schema import SchemaError, json_grammar
from bincompress.inference.sampling import Sampler, Sampling
from bincompress.model.tokenizer import TextStream, Tokenizer, load_tokenizer
from tests.conftest import DEMO_MODEL

NAMES = {"type": "string", "maxLength": 4}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"name": NAMES, "age": {"type": "integer", "minimum": 0}, "kind": {"enum": [1, None]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    },
    "pydantic": {
        "title": "Page", "description": "A page.", "type": "object", "required": ["at", "next"],
        "additionalProperties": False,
        "$defs": {
            "At": {"title": "At", "type": "object", "properties": {"x": {"type": "number", "minimum": -1}},
                   "required": ["x"], "additionalProperties": False},
        },
        "properties": {
            "at": {"$ref": "#/$defs/At"}, "next": {"anyOf": [{"$ref": "#/$defs/At"}, {"type": "null"}]},
        },
    },
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [{"const": "x"}, {"type": "integer", "multipleOf": 5}], "items": False,
              "minItems": 2},
    "pattern": {"type": "string", "pattern": "^[a-f]{2,5}(-[0-9]+){1,2}$", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "tree": {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}}},
    "count": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2, "maxProperties": 3},
    "disjoint": {"oneOf": [{"type": "boolean"}, NAMES]},
    "all": {"allOf": [{"type": "string", "maxLength": 6}, {"pattern": "^ab*"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return load_tokenizer({path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.suffix == ".json"})


@pytest.fixture(scope="module")
def with_byte_fallback() -> Tokenizer:
    """One as sentencepiece makes them: words begin with a mark, and what is not in the vocabulary is bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *map(chr, range(33, 127)),
        "\u2581{",
        '{"',
        '":',
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {word: place for place, word in enumerate(words)}, [("\u2581", "{"), ("{", '"'), ('"', ":")],
            unk_token="<unk>", byte_fallback=True,
        )
    )  # fmt: skip
    made.add_special_tokens(["<s>", "</s>"])
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    ])  # fmt: skip
    return Tokenizer(made.to_str().encode(), {"eos_token_id": 2, "bos_token_id": 1})


def written(grammars: Grammars, tokenizer: Tokenizer, grammar: str, settings: Sampling, most: int = 3000) -> str:
    """Return the text of a model that likes all tokens alike, or a few by chance; it has to end by itself."""
    vocab = tokenizer.size + 7  # as in models whose embeddings are padded
    sampler = Sampler(settings, vocab, (), grammars.compiled(grammar).begin())
    random = np.random.default_rng(settings.seed)
    stream, text = TextStream(tokenizer), ""
    for _ in range(most):
        token = sampler.choose(random.normal(0, 3, vocab).astype(np.float32))
        if token in tokenizer.eos_ids:
            break
        text += stream.push(token)
        if sampler.is_complete:
            break
    else:
        pytest.fail(f"it does not end: {text!r:.200}")
    return text + stream.finish()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte_level", "with_byte_fallback"])
def test_every_text_validates(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    grammars = Grammars(tokenizer, tokenizer.size + 7)
    for name, schema in SCHEMAS.items():
        for seed, settings in enumerate(
            [
                Sampling(),
                Sampling(temperature=0.0),
                Sampling(temperature=2.0, top_k=3, repetition_penalty=1.3),
                Sampling(top_p=0.3, min_p=0.1),
            ]
        ):
            text = written(grammars, tokenizer, json_grammar(schema), replace(settings, seed=seed))
            problem = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
            assert not list(problem.iter_errors(json.loads(text))), (name, text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "schema: expected an object, found list"),
        (False, "schema: false allows no value"),
        ({"typ": "string"}, "schema.typ: this keyword is not supported"),
        ({"properties": {"a": {"uniqueItems": True}}}, "schema.properties.a.uniqueItems: this keyword"),
        ({"x-guidance": {"lenient": True}}, "schema.x-guidance: this keyword is not supported"),
        ({"$ref": "https://example.com/schema.json"}, "schema.$ref: expected a place in this schema"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "strin"}, "strin"),
        ({"type": "integer", "minimum": 10**300}, "schema.minimum: expected a number of at most"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "Unsatisfiable"),
        ({"enum": []}, "schema.enum: allows no value"),
        ({"exclusiveMinimum": True}, "schema.exclusiveMinimum: expected a number"),
        ({"multipleOf": 99991}, "schema.multipleOf: expected up to 1000"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "schema.$schema: expected draft 6"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "required": ["a"]}]}, "oneOf"),
        ({"enum": ["x" * 2000]}, "schema.enum: a text of 2,000 characters"),
        ({"enum": ["\ud800"]}, "lone surrogate"),
        ({"properties": {str(number): {} for number in range(300)}}, "at most 256 schemas"),
        ({"anyOf": [{"enum": ["x" * 400 + str(n)]} for n in range(200)]}, "bytes without its annotations"),
        ({"pattern": "(" * 500 + "a" + ")" * 500}, "regex"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "allOf": [{"pattern": letter} for letter in "abcdefghijklmnopqrst"]}, "schema: "),
        ({"type": "string", "pattern": "^(a?){500}a{500}$"}, "too many"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "schema: "),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(byte_level: Tokenizer, schema: Any, message: str) -> None:
    with pytest.raises(SchemaError) as found:
        Grammars(byte_level, byte_level.size).compiled(json_grammar(schema))
    assert message in str(found.value)


def test_a_grammar_that_kills_its_compiler_is_refused(byte_level: Tokenizer) -> None:
    chain = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}]} for n in range(4000)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**chain, "a4000": {"type": "string"}}}
    with pytest.raises(SchemaError, match="too complex: it takes too much time, memory or depth"):
        Grammars(byte_level, byte_level.size).compiled(json.dumps({"grammars": [{"json_schema": schema}]}))


def test_a_text_that_takes_too_long_ends_alone(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = Grammars(byte_level, byte_level.size).compiled(json_grammar({})).begin()
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr("bincompress.inference.constraint.time.thread_time", lambda: next(clock))
    with pytest.raises(ConstraintError, match="takes too long"):
        constraint.allowed()


def test_a_vocabulary_that_cannot_write_the_text_is_said(byte_level: Tokenizer) -> None:
    few = Grammars(byte_level, 5)  # of a decoder that knows the first tokens alone
    constraint = few.compiled(json_grammar({"const": 7})).begin()
    with pytest.raises(ConstraintError, match="no token of the model's vocabulary"):
        constraint.allowed()


def test_a_token_of_any_number_may_be_asked_for() -> None:
    """A grammar is tried out with tokens that are bytes, of which no number is above a few hundred."""
    demo = load_tokenizer({path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.suffix == ".json"})
    token = demo.size - 1
    constraint = Grammars(demo, demo.size).compiled(f'start: <[{token}]> "x"').begin()
    assert np.flatnonzero(constraint.allowed()).tolist() == [token]
    constraint.take(token)
    assert demo.encode("x", special=False)[-1] in np.flatnonzero(constraint.allowed())
