"""How does the fuzzer change an input? JSON by its structure, templates by their pieces, everything by its bytes."""

import json
import random
import re
from typing import Any

Files = dict[str, bytes]

_RAW = "\ue000raw"  # stands in a JSON tree for text that no JSON writer writes
_RAW_TEXTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-0.0", "9" * 5000, "[" * 20000, '{"a":' * 20000, "[" * 400 + "]" * 400,
    '"\\ud800"', "tru", "", "1e-400", "0x10", "'x'", '"' + "x" * 100_000 + '"',
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 65, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40,
    (1 << 48) - 1, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 1 << 200, 0.5, 1e-300, 1e38, 1e308, -1.5, "", "x", "..",
    "../../etc/passwd", "/etc/passwd", "a/b", "\x00", "\ud800", "\U0001f600", "\u202e", "a" * 300, "%2F", "complete",
    "<s>", "t1", [], {}, [[]], [None], [0], [1, 2, 3], [1 << 40, 1 << 40], [0, 0], [1] * 40, {"a": {}}, {"": 0},
    {"content": "x"}, {"name": "zstd"}, ["x"], [{}], [[[[[[]]]]]],
)  # fmt: skip

Path = tuple[Any, ...]


def mutated_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip bits, overwrite, cut, repeat or lengthen."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 1 if place < len(data):
                data[place] = chance.choice((0, 0xFF, 0x7F, 0x80, chance.randrange(256)))
            case 2:
                del data[place:]
            case 3:
                del data[place : place + chance.choice((1, 4, 8, 64))]
            case 4:
                data[place:place] = chance.randbytes(chance.choice((1, 4, 8, 64)))
            case 5:
                data += chance.randbytes(chance.choice((1, 4, 8, 64, 4096)))
            case _:
                end = place + chance.choice((1, 8, 64))
                data[place:place] = data[place:end]
    return bytes(data)


def paths(value: Any, most: int = 20_000) -> list[Path]:
    """Return the way to every value within a JSON value, itself included."""
    found: list[Path] = [()]
    waiting: list[tuple[Path, Any]] = [((), value)]
    while waiting and len(found) < most:
        path, node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            found.append((*path, key))
            waiting.append(((*path, key), item))
    return found


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated_json(chance: random.Random, value: Any, palette: tuple[Any, ...] = ()) -> Any:
    """Return a JSON value with one to three changes; palette: values that this kind of file may have somewhere."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _changed(chance, value, palette)
    return value


def _changed(chance: random.Random, value: Any, palette: tuple[Any, ...]) -> Any:
    ways = paths(value)
    # Deep and wide parts (a vocabulary, say) would else take all the changes.
    shallow = [way for way in ways if len(way) <= 2] or ways
    path = chance.choice(shallow if chance.random() < 0.5 else ways)
    old = at(value, path)
    match chance.randrange(10):
        case 0 | 1:
            new = chance.choice(_VALUES)
        case 2 if palette:
            new = chance.choice(palette)
        case 3 if isinstance(old, int | float):
            new = _near(chance, old)
        case 4:
            new = [old] if chance.random() < 0.5 else {"a": old}
        case 5:
            new = at(value, chance.choice(ways))
        case 6:
            new = f"{_RAW}{chance.randrange(len(_RAW_TEXTS))}"
        case 7 | 8 if path:
            return _without(chance, value, path)
        case _:
            new = chance.choice(palette or _VALUES)
    if not path:
        return new
    holder = at(value, path[:-1])
    holder[path[-1]] = json.loads(json.dumps(new))  # a copy: no value is to hold itself
    return value


def _near(chance: random.Random, old: float) -> Any:
    big = old if abs(old) < 1e300 else 1
    return chance.choice((old + 1, old - 1, -old, big * 2, big * 1000, big * (1 << 32), big / 2, float(old), str(old)))


def _without(chance: random.Random, value: Any, path: Path) -> Any:
    """Remove an entry, or give it another name, or put one beside it."""
    holder, key = at(value, path[:-1]), path[-1]
    if isinstance(holder, list):
        if chance.random() < 0.5:
            holder.insert(key, chance.choice(_VALUES))
        else:
            del holder[key]
        return value
    item = holder[key]
    if chance.random() < 0.7:
        del holder[key]
    if chance.random() < 0.5:
        holder[chance.choice(("x", "", "\ud800", "..", "a/b", f"{key}x", "\x00", "__metadata__", "a" * 300))] = item
    return value


def written(chance: random.Random, value: Any) -> bytes:
    """Return a JSON value as text, its placeholders as what they stand for, at times with a key that is there twice."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    text = re.sub(r'"(?:\\ue000|\ue000)raw(\d+)"', lambda found: _RAW_TEXTS[int(found[1])], text)
    keys = re.findall(r'"[a-z_]{2,30}":', text)
    if keys and chance.random() < 0.1:
        key = chance.choice(keys)
        text = text.replace(key, f"{key} {json.dumps(chance.choice(_VALUES))}, {key}", 1)
    return text.encode("utf-8", "surrogatepass")


def mutated_file(chance: random.Random, content: bytes, palette: tuple[Any, ...] = ()) -> bytes:
    """Change a file: by its structure where it is JSON, mostly, else by its bytes."""
    if chance.random() < 0.8:
        try:
            return written(chance, mutated_json(chance, json.loads(content), palette))
        except ValueError:
            pass
    return mutated_bytes(chance, content)


_PIECE = re.compile(r"\{%.*?%\}|\{\{.*?\}\}|[^{]+|\{", re.DOTALL)
_NAMES = ("messages", "message", "m", "bos_token", "tools", "loop", "ns", "x", "none", "messages[0]['content']")
_FILTERS = (
    "length", "list", "tojson", "string", "join", "upper", "sort", "reverse", "first", "map(attribute='role')",
    "batch(2)",
    "center(1000000000)", "indent(1000000000)", "replace('', 'y' * 100000)", "tojson(indent=1000000000)", "pprint",
    "wordwrap(1)", "urlize", "striptags", "truncate(5)", "format(1)", "sum", "unique", "groupby('role')", "dictsort",
    "float", "int", "round(400)", "xmlattr", "selectattr('role')", "random", "slice(1000000000)", "batch(1000000000)",
)  # fmt: skip
_HOSTILE = (
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ lipsum(n=1000000000) }}", "{{ 'x'.center(10000000000) }}", "{{ 'x'.zfill(1000000000) }}",
    "{{ ('x' * 16000000).replace('x', 'y' * 1000) }}", "{{ '%1000000000d' % 5 }}", "{{ '{:1000000000}'.format(5) }}",
    "{{ '\t'.expandtabs(1000000000) }}", "{{ ('x,' * 1000000).split(',') | join('y' * 100000) }}",
    "{{ messages | map('center', 1000000000) | list }}", "{{ 'a' in ['a'] * 10000000 }}", "{{ 4096 ** 4096 ** 2 }}",
    "{{ ''.join(['x' * 1000000] * 100000) }}", "{{ range(99999) | list * 1000 }}", "{{ cycler(*range(99999)) }}",
    "{% for a, b, c in messages %}{% endfor %}", "{{ dict([1]) }}", "{{ strftime_now('%' * 100000) }}",
    "{{ strftime_now('\x00') }}", "{{ namespace(5) }}", "{{ raise_exception() }}", "{% generation %}", "{% break %}",
    "{{ loop.index }}", "{{ messages[99999999999999999999] }}", "{{ 1 // 0 }}", "{{ 'x'.encode().decode('rot13') }}",
    "{{ messages.__class__ }}", "{{ ()|attr('__class__') }}", "{{ 1e308 * 10 | int }}", "{{ '\ud800' }}",
    "{{ 'x' | int('9' * 5000) }}", "{{ ('9' * 100000) | int }}", "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "-" * 3000 + "1 }}", "{% if x %}" * 200, "{{ " + "not " * 5000 + "x }}", "{{ " + "[" * 3000 + " }}",
    "{{ 'x' " + "~ 'x' " * 3000 + "}}", "{{ 1 " + "+ 1 " * 20000 + "}}", "{{ x" + ".x" * 5000 + " }}",
)  # fmt: skip


def mutated_template(chance: random.Random, template: str) -> str:
    """Change a template: drop, repeat, move and replace pieces, give expressions filters, or put hostile pieces in."""
    pieces = _PIECE.findall(template)
    for _ in range(chance.choice((1, 1, 2, 3))):
        place = chance.randrange(len(pieces) + 1)
        piece = pieces[place] if place < len(pieces) else ""
        match chance.randrange(9):
            case 0:
                del pieces[place : place + 1]
            case 1:
                pieces.insert(place, chance.choice(pieces or [""]))
            case 2:
                chance.shuffle(pieces)
            case 3 if piece.endswith("}}"):
                pieces[place] = piece.removesuffix("}}") + f"| {chance.choice(_FILTERS)} " + "}}"
            case 4 if piece:
                words = re.findall(r"[\w.]+|\W", piece)
                words[chance.randrange(len(words))] = chance.choice((*_NAMES, "'", "(", ")", "+", "*", "~", "[", "%}"))
                pieces[place] = "".join(words)
            case 5:
                pieces.insert(place, f"{{{{ {chance.choice(_NAMES)} | {chance.choice(_FILTERS)} }}}}")
            case 6 if piece:
                pieces[place] = mutated_bytes(chance, piece.encode("utf-8", "replace")).decode("utf-8", "replace")
            case _:
                pieces.insert(place, chance.choice(_HOSTILE))
    return "".join(pieces)
