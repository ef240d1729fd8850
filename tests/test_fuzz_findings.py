"""Small inputs that once crashed, hung or filled the memory: each is refused in one line now (tests/fuzz.py)."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from bincompress.calibration.statistics import begin_statistics
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import BincompressError, CheckpointError, DamagedError
from bincompress.inference.chat import ChatTemplate
from bincompress.model.errors import ConfigError, TemplateError, TokenizerError
from bincompress.model.tokenizer import load_tokenizer
from bincompress.reporting.inspection import inspect
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.layout import SEAL, sealed
from bincompress.store.store import Store, open_store
from bincompress.store.verify import verify
from tests.conftest import tiny_tokenizer

TALK = [{"role": "user", "content": "hi"}]

# Tokenizers


def tokenizer(**changes: Any) -> dict[str, bytes]:
    return {"tokenizer.json": json.dumps({**tiny_tokenizer(4), **changes}).encode()}


def charsmap(content: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


# The library makes room for the 4 GB, in items of 8 bytes, that the first of these says it has: the process aborted.
@pytest.mark.parametrize("content", [b"\xff\xff\xff\xff", b"", b"\0", b"\x04\0\0\0", b"\x03\0\0\0abc", b"\0\0\0\0\xff"])
@pytest.mark.parametrize("place", ["alone", "in a sequence", "without a type", "escaped"])
def test_a_map_of_characters_that_is_not_as_long_as_it_says(content: bytes, place: str) -> None:
    normalizer: Any = charsmap(content)
    if place == "in a sequence":
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    if place == "without a type":
        del normalizer["type"]
    files = tokenizer(normalizer=normalizer)
    if place == "escaped":
        files["tokenizer.json"] = files["tokenizer.json"].replace(b"precompiled_", b"\\u0070recompiled_")
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: precompiled_charsmap: .* is not a trie and its texts"):
        load_tokenizer(files)


def test_a_map_of_characters_that_is_not_text() -> None:
    with pytest.raises(TokenizerError, match="precompiled_charsmap: 5 is not a trie"):
        load_tokenizer(tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": 5}))


WITHOUT_UNKNOWN: list[dict[str, Any]] = [
    {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "z"},
    {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "zz", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 100},
]  # fmt: skip


@pytest.mark.parametrize("model", WITHOUT_UNKNOWN)
def test_a_text_that_the_vocabulary_cannot_spell(model: dict[str, Any]) -> None:
    found = load_tokenizer(tokenizer(model=model))
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: cannot make tokens of the text: .+"):
        found.encode("q")


def test_a_panic_of_the_library_is_the_files_fault() -> None:
    """Its regular expressions give up after so many tries, with a panic, which is no Exception."""
    pattern = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    found = load_tokenizer(tokenizer(pre_tokenizer=pattern))
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: cannot make tokens of the text: .*limit"):
        found.encode("x" * 40)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_a_token_that_is_no_text(name: str) -> None:
    with pytest.raises(TokenizerError, match=rf"^{name}: bos_token: '\\ud800' is not a text of Unicode"):
        load_tokenizer({**tokenizer(), name: b'{"bos_token": "\\ud800"}'})


@pytest.mark.parametrize(
    ("name", "content"),
    [("added_tokens.json", b'{"\\ud800": 7}'), ("generation_config.json", b'{"eos_token": "\\ud800"}')],
)
def test_a_name_that_is_no_text(name: str, content: bytes) -> None:
    with pytest.raises(TokenizerError, match="is not a text of Unicode"):
        load_tokenizer({**tokenizer(), name: content})


# Chat templates

ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}{% endset %}",
]
GROWING = "{% set ns = namespace(x=FIRST) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ LAST }}"
LARGE = [
    *(GROWING.replace("FIRST", first).replace("NEXT", following).replace("LAST", last) for first, following, last in (
        ("'ab'", "ns.x + ns.x", "ns.x"), ("'ab'", "ns.x ~ ns.x", "ns.x"), ("[1]", "[ns.x, ns.x]", "ns.x"),
        ("[1]", "[ns.x, ns.x]", "ns.x | tojson"), ("[1]", "{'a': ns.x, 'b': ns.x}", "ns.x == ns.x"),
        ("[1]", "ns.x + ns.x", "ns.x | length"), ("9", "ns.x * ns.x", "ns.x"), ("[1]", "(ns.x, ns.x)", "'%s' % ns.x"),
    )),
    "{{ 'x'.center(1000000000) }}", "{{ 'x' | center(1000000000) }}", "{{ 'x'.zfill(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}", "{{ messages | tojson(indent=1000000000) }}",
    "{{ messages | map('center', 1000000000) | list }}", "{{ '%1000000000d' % 5 }}", "{{ '%*d' % (1000000000, 5) }}",
    "{{ '%1000000000d' | format(5) }}", "{{ '{:1000000000}'.format(5) }}", "{{ '{:{}}'.format(5, 1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}", "{{ ('x' * 1000000).replace('x', 'y' * 100000) }}",
    "{{ ('x' * 1000000) | replace('x', 'y' * 100000) }}", "{{ ('x' * 100000) | replace('', 'y' * 100000) }}",
    "{{ ('y' * 100000).join(('x,' * 100000).split(',')) }}", "{{ ('x,' * 100000).split(',') | join('y' * 100000) }}",
    "{{ [1] | batch(1000000000, 0) | list }}", "{{ [1] | slice(1000000000) | list }}", "{{ lipsum(n=1000000000) }}",
    "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}", "{% set x = 'y' * 1000000 %}" + "{{ x }}" * 1000,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(30)
@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bincompress.inference.bounds._SECONDS", 0.25)
    with pytest.raises(TemplateError, match=r"^chat template: SecurityError: (takes longer than 0.25 s|makes more th)"):
        ChatTemplate({"default": template}).render(TALK)


@pytest.mark.slow
@pytest.mark.timeout(30)
@pytest.mark.parametrize("template", LARGE)
def test_a_template_that_would_fill_the_memory(template: str) -> None:
    with pytest.raises(TemplateError, match=r"^chat template: SecurityError: .*(expected|out of bounds)"):
        ChatTemplate({"default": template}).render(TALK)


SOUND = [
    ("{{ 'a' ~ 1 ~ none ~ [1, 'x'] }}", "a1None[1, 'x']"),
    ("{{ '%s costs 100000 or %5.1f%%' % ('x', 2.5) }}", "x costs 100000 or   2.5%"),
    ("{{ 'Of 20240101: {:>4}'.format(7) }}{{ '%03d' | format(7) }}", "Of 20240101:    7007"),
    ("{% for a, b in [(1, 2), (3, messages)] %}{{ a }}{% endfor %}", "13"),
    ("{% for m in messages recursive %}{{ m.role }}{% if m.kids %}{{ loop(m.kids) }}{% endif %}{% endfor %}", "user"),
    ("{% for i in [] %}x{% else %}none{% endfor %}{% if 'a' in ('a', messages) %}yes{% endif %}", "noneyes"),
    ("{% macro m(x=[]) %}{{ x | length }}{{ caller() }}{% endmacro %}{% call m([1]) %}c{% endcall %}", "1c"),
    ("{% set a, b = 1, messages %}{{ a }}{{ {'k': a}.k }}{{ 7 % 4 }}{{ [1] + [2] }}{{ 'ab' * 2 }}", "113[1, 2]abab"),
    ("{{ messages | map(attribute='content') | join(', ') | replace('h', 'H') | indent(2, true) }}", "  Hi"),
    (
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x %}c{{ 1 }}{% endset %}{{ x }}{{ '-'.join(['a', 'b']) }}",
        "ABc1a-b",
    ),
]


@pytest.mark.parametrize(("template", "text"), SOUND)
def test_bounds_change_nothing_of_a_sound_template(template: str, text: str) -> None:
    assert ChatTemplate({"default": template}).render(TALK) == text


def test_a_long_conversation_is_within_bounds() -> None:
    template = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.content %}"
        "<{{ m.role | upper }}>{{ m.content | trim }}{% if loop.last %}{{ messages | length }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 100}] * 500
    assert ChatTemplate({"default": template}).render(messages).endswith("word500")


# Messages


def test_a_message_quotes_at_most_so_much_and_is_one_line() -> None:
    found = str(BincompressError("begin " + "x" * 100_000 + "\nend \ud800"))
    assert len(found) < 1000
    assert found.startswith("begin xxx")
    assert found.endswith("xxx end \\ud800")
    assert str(BincompressError("as it is")) == "as it is"


def test_values_of_any_length_are_refused_in_a_short_line(tiny_model: Path) -> None:
    path = next(tiny_model.glob("*.safetensors"))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["dtype"] = "x" * 100_000
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    checkpoint = open_checkpoint(tiny_model)
    with pytest.raises(CheckpointError, match=rf"^{name}: dtype xxx") as caught:
        read_weight(checkpoint.tensors[name])
    assert len(str(caught.value)) < 1000
    from bincompress.model.config import parse

    with pytest.raises(ConfigError, match=r"^config\.json: vocab_size: expected a whole number, found 'xxx") as wrong:
        parse({**checkpoint.config, "vocab_size": "x" * 100_000})
    assert len(str(wrong.value)) < 1000


# Stores: what a report says is under no other hash than the seal's, which anybody can make anew


@pytest.fixture
def store(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "store"
    assert compress(make_plan(open_checkpoint(tiny_model), load_recipe(None, {})), str(path)).complete
    return path


def resealed(store: Path, name: str, changes: dict[str, Any]) -> Store:
    """Change attributes of a tensor (or of the root, named ""), and seal them anew."""
    kind = open_store(str(store)).tensors().get(name)
    folder = store / {"packed": f"tensors/{name}", "plain": f"plain/{name}", None: ""}[kind]
    node = json.loads((folder / "zarr.json").read_text())
    seal = node["attributes"][SEAL]
    node["attributes"] = sealed(name, {**node["attributes"], **changes}, seal.get("arrays"))
    (folder / "zarr.json").write_text(json.dumps(node))
    return open_store(str(store))


PACKED = "model.layers.0.mlp.up_proj.weight"
REPORTS: list[Any] = [
    None, 5, [], "x", {}, {"method": {}}, {"method": None}, {"weights": "1"}, {"weights": 1 << 63},
    {"stored_bytes": [1]},
    {"stored_bytes": -1}, {"nominal_bits": {}}, {"nominal_bits": True}, {"stored_bits": 1e308}, {"squared_norm": "x"},
    {"relative_error": 1e201}, {"groups": 2.5}, {"additions_saved": "x"}, {"histogram": []}, {"note": [[1]]},
    {"histogram": {"low": 1, "high": 0, "counts": [1]}}, {"histogram": {"low": 0, "high": 1, "counts": []}},
    {"histogram": {"low": 0, "high": 1, "counts": ["x"]}}, {"histogram": {"low": "a", "high": 1, "counts": [1]}},
]  # fmt: skip


@pytest.mark.parametrize("change", REPORTS)
def test_a_report_that_is_none(store: Path, change: Any) -> None:
    sound = open_store(str(store)).report(PACKED)
    report = {**sound, **change} if isinstance(change, dict) and change else change
    found = resealed(store, PACKED, {"report": report})
    with pytest.raises(DamagedError, match=rf"{PACKED}: report: "):
        inspect(found)
    assert [name for name, problem in verify(found) if problem] == [PACKED]


@pytest.mark.parametrize("seconds", ["x", [], {}, -1, 1e300, True])
def test_a_log_that_says_no_time(store: Path, seconds: Any) -> None:
    path = store / "log" / PACKED / "zarr.json"
    node = json.loads(path.read_text())
    node["attributes"]["seconds"] = seconds
    path.write_text(json.dumps(node))
    assert inspect(open_store(str(store)))["tensors"][PACKED]["seconds"] is None


@pytest.mark.parametrize("key", ["source", "config"])
@pytest.mark.parametrize("value", [None, 5, [], "x"])
def test_a_root_whose_source_or_config_is_no_object(store: Path, key: str, value: Any) -> None:
    with pytest.raises(DamagedError, match=rf"zarr\.json: {key}: .*; expected an object"):
        resealed(store, "", {key: value})


# Kills


def test_what_a_killed_calibration_leaves_half_written_is_removed(tmp_path: Path) -> None:
    """Zarr's own name for such a file was none of the format's: it stayed, and `--overwrite` took it for foreign."""
    record = {"source": {"fingerprint": "x"}, "inputs": {}}
    url = str(tmp_path / "statistics")
    begin_statistics(url, record, overwrite=False)
    left = tmp_path / "statistics" / "inputs" / "zarr.237c629d7fb246fd98048d4d906ef3f6.partial"
    left.write_bytes(b"half")
    begin_statistics(url, record, overwrite=False)
    assert not left.exists()
    left.write_bytes(b"half")
    begin_statistics(url, record, overwrite=True)
    assert not left.exists()
