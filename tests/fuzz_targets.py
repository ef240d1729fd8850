"""What does the fuzzer change of each kind of input, and what is then done with it?"""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.errors import BincompressError
from bincompress.inference.chat import load_template
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.model.config import parse
from bincompress.model.tokenizer import TextStream, load_tokenizer
from bincompress.reporting.inspection import inspect, table
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.layout import SEAL, sealed
from bincompress.store.pack import pack
from bincompress.store.store import open_store
from bincompress.store.verify import verify
from bincompress.tensors.dequantize import dequantize
from tests import fuzz_seeds, fuzz_sources
from tests.fuzz_mutations import Files, mutated_bytes, mutated_file, mutated_json, mutated_template, written
from tests.hostile_packs import hostile_packs

TEXT = "Once upon a time, t1 t2  aaaaaaaaaaaaaaaaaaaaaaaaaaaaaab \u00e9\U0001f600 <s> 42\n"
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
]
TALK += [{"role": "user", "content": "bye"}]


class WrongError(Exception):
    """Something was taken for sound that is not what was written."""


@dataclass(frozen=True)
class Kind:
    """A kind of input: what it begins with, how it is changed, and what uses it."""

    seeds: Callable[[Path], list[Files]]
    change: Callable[[random.Random, Files], Files]
    use: Callable[[Files, Path], None]


def one_changed(chance: random.Random, files: Files, name: str, palette: tuple[Any, ...] = ()) -> Files:
    return {**files, name: mutated_file(chance, files[name], palette)}


# Stores


def change_store(chance: random.Random, files: Files) -> Files:
    """Change one file or two: metadata by structure, mostly under a hash that fits again, chunks and their checksum."""
    found = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2))):
        top = chance.choice(("", "tensors/", "tensors/", "tensors/", "plain/", "assets/"))
        names = [name for name in found if (name.startswith(top) if top else "/" not in name)] or list(found)
        name = chance.choice(names)
        what = chance.random()
        if what < 0.06:
            del found[name]
        elif what < 0.12:
            place = chance.choice(("x", "c/0/0", "zarr.json", "..x"))
            found[f"{name.rsplit('/', 1)[0]}x/{place}" if "/" in name else place] = chance.choice(list(files.values()))
        elif name.endswith("zarr.json"):
            found[name] = _changed_node(chance, name, found[name])
        elif chance.random() < 0.6 and len(found[name]) > 4:
            data = mutated_bytes(chance, found[name][:-4])
            found[name] = data + google_crc32c.value(np.frombuffer(data, np.uint8)).to_bytes(4, "little")
        else:
            found[name] = mutated_bytes(chance, found[name])
    return found


def _changed_node(chance: random.Random, name: str, content: bytes) -> bytes:
    try:
        node = json.loads(content)
        attributes = node["attributes"]
        seal = attributes[SEAL] if chance.random() < 0.7 else None
    except (ValueError, KeyError, TypeError):
        return mutated_file(chance, content)
    if seal is None:
        return mutated_file(chance, content)
    part = chance.choice(("attributes", "attributes", "layout", "node"))
    if part == "node":
        node = mutated_json(chance, node)
    elif part == "layout" and isinstance(seal, dict) and "arrays" in seal:
        seal["arrays"] = mutated_json(chance, seal["arrays"])
    else:
        node["attributes"] = mutated_json(chance, attributes)
    changed = node.get("attributes") if isinstance(node, dict) else None
    if isinstance(changed, dict):
        tensor = name.split("/")[1] if "/" in name else ""
        layouts = seal.get("arrays") if isinstance(seal, dict) else None
        with contextlib.suppress(TypeError, UnicodeEncodeError):
            node["attributes"] = sealed(tensor, changed, layouts if isinstance(layouts, dict) else None)
    return written(chance, node)


def use_store(files: Files, folder: Path) -> None:
    """Do with a store what the commands do; what verify finds sound has to be readable."""
    url = str(folder)
    store = open_store(url)
    problems = [problem for _, problem in verify(store) if problem]
    refused = []
    for name, kind in store.tensors().items():
        try:
            if kind == "packed":
                dequantize(store.read_stored(name, check_hashes=True), slice(0, 4))
            else:
                store.read_plain(name, check_hashes=True)
        except BincompressError as error:
            refused.append(str(error))
    if refused and not problems:
        raise WrongError(f"verify finds nothing, and reading says: {refused[0]}")
    for line in (*problems, *refused):
        if "\n" in line or len(line) > 1000:
            raise WrongError(f"a message of {len(line)} characters, or of several lines: {line[:200]!r}")
    table(inspect(store))


# Packed stores

PACK = "store.zip"


def pack_seeds(folder: Path) -> list[Files]:
    """Return the stores' files, each as one packed file."""
    found = []
    for number, files in enumerate(fuzz_seeds.stores(folder)):
        place = folder / f"packed{number}"
        lay_out(place, files, None)
        pack(str(place), str(folder / f"{number}.zip"))
        found.append({PACK: (folder / f"{number}.zip").read_bytes()})
    return found


def change_pack(chance: random.Random, files: Files) -> Files:
    """Change the directory, mostly, field by field; else bytes anywhere, an entry's name everywhere, or the end."""
    content = bytearray(files[PACK])
    end = content.rfind(b"PK\5\6")
    begin = int.from_bytes(content[end + 16 : end + 20], "little")
    records = [found.start() for found in re.finditer(b"PK\1\2", content) if found.start() >= begin]
    what = chance.random()
    if what < 0.03:  # what was found once, and what is near to it
        known, _ = chance.choice(list(hostile_packs().values()))
        return {PACK: known if chance.random() < 0.3 else mutated_bytes(chance, known)}
    if what < 0.15:
        return {PACK: mutated_bytes(chance, bytes(content))}
    if what < 0.25:
        return {PACK: bytes(content[: chance.randrange(len(content))])}
    if what < 0.45:  # a chunk or a header, under a directory that is sound
        place = chance.randrange(begin)
        content[place] ^= 1 << chance.randrange(8)
    elif what < 0.6:  # the end
        place = end + chance.randrange(4, len(content) - end)
        content[place : place + 4] = chance.choice(_FIELDS)[: len(content) - place]
    else:
        for _ in range(chance.choice((1, 1, 2))):
            place = chance.choice(records)
            size = int.from_bytes(content[place + 28 : place + 30], "little")
            if chance.random() < 0.3:
                name = chance.choice((b"../x/zarr.json", b"/zarr.json", b"zarr.json", b"\xff\0", b"tensors/a/c/0"))
                content[place + 46 : place + 46 + size] = name[:size].ljust(size, b"x")
            else:
                field = place + chance.randrange(4, 46)
                content[field : field + 4] = chance.choice(_FIELDS)
    return {PACK: bytes(content)}


_FIELDS = tuple(number.to_bytes(4, "little") for number in (0, 1, 8, 64, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF))


def use_pack(files: Files, folder: Path) -> None:
    """Do with a packed store what is done with a store."""
    use_store(files, folder / PACK)


# Checkpoints


def change_checkpoint(chance: random.Random, files: Files) -> Files:
    """Change a header, mostly; else the index, the bytes, or which files there are."""
    found = dict(files)
    weights = [name for name in files if name.endswith(".safetensors")]
    name = chance.choice(weights)
    what = chance.random()
    if what < 0.1:
        del found[chance.choice(list(found))]
    elif what < 0.25 and "model.safetensors.index.json" in files:
        return one_changed(chance, files, "model.safetensors.index.json", tuple(weights))
    elif what < 0.4:
        found[name] = mutated_bytes(chance, files[name][: chance.choice((64, 1 << 11, 1 << 20))])
    else:
        size = int.from_bytes(files[name][:8], "little")
        header = written(chance, mutated_json(chance, json.loads(files[name][8 : 8 + size]), _HEADERS))
        length = len(header) if chance.random() < 0.9 else chance.choice((0, 1, size, 1 << 20, 1 << 40, (1 << 64) - 1))
        found[name] = length.to_bytes(8, "little") + header + files[name][8 + size :]
    return found


_HEADERS: tuple[Any, ...] = (
    "F8_E4M3",
    "F4",
    "BF16",
    "F32",
    "F64",
    "I64",
    "BOOL",
    "U8",
    "X",
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [0, 1 << 47], "data_offsets": [0, 0]},
    {"dtype": "F4", "shape": [1 << 20], "data_offsets": [0, 8]},
    {"dtype": "F8_E8M0", "shape": [64, 64], "data_offsets": [0, 8192]},
    [64],
    [64, 64],
    [8192, 1],
    [1, 1, 64, 64],
    [0, 8192],
)


def use_checkpoint(files: Files, folder: Path) -> None:
    """Open a checkpoint, read its tensors, and plan."""
    checkpoint = open_checkpoint(folder)
    for source in checkpoint.tensors.values():
        try:
            weight = read_weight(source)
        except BincompressError:
            continue
        if source.dtype in ("BF16", "F16", "F32"):
            weight.float32()
    make_plan(checkpoint, load_recipe(None, {})).kept_lines()


# config.json


def change_config(chance: random.Random, files: Files) -> Files:
    return one_changed(
        chance, files, "config.json", ("llama3", "linear", "yarn", "qwen2", "mistral", "sliding_attention")
    )


def use_config(files: Files, folder: Path) -> None:
    """Parse a config alone, then as that of a checkpoint whose tensors are sound, and plan."""
    checkpoint = open_checkpoint(folder)
    try:
        parse(checkpoint.config)
    except BincompressError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise WrongError(f"a message of {len(str(error))} characters, or of several lines") from None
    with contextlib.suppress(BincompressError):
        checkpoint_config(checkpoint)
    make_plan(checkpoint, load_recipe(None, {})).record()


def config_seeds(folder: Path) -> list[Files]:
    whole = fuzz_seeds.checkpoints(folder)[0]
    return [{**whole, **files} for files in fuzz_seeds.configs()]


# Tokenizers and templates


def change_tokenizer(chance: random.Random, files: Files) -> Files:
    name = "tokenizer.json" if chance.random() < 0.6 else chance.choice(list(files))
    if name != "tokenizer.json" or chance.random() < 0.3:
        return one_changed(chance, files, name, fuzz_seeds.TOKENIZER_PARTS)
    found = json.loads(files[name])
    part = chance.choice(list(found))
    # A whole part, so that it is one that the library knows; else most changes are refused at once.
    found[part] = chance.choice(fuzz_seeds.TOKENIZER_PARTS)
    if chance.random() < 0.3:
        found = mutated_json(chance, found, fuzz_seeds.TOKENIZER_PARTS)
    return {**files, name: written(chance, found)}


def use_tokenizer(files: Files, folder: Path) -> None:
    """Encode and decode a short text, whole and as a stream."""
    tokenizer = load_tokenizer(files)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    stream = TextStream(tokenizer, ids[:2])
    for token in (*ids, 0, tokenizer.size, (1 << 32) - 1):
        stream.push(token)
    stream.finish()


def change_template(chance: random.Random, files: Files) -> Files:
    if "chat_template.jinja" in files and chance.random() < 0.9:
        text = mutated_template(chance, files["chat_template.jinja"].decode())
        return {**files, "chat_template.jinja": text.encode("utf-8", "surrogatepass")}
    name = chance.choice(list(files))
    return {**files, name: mutated_file(chance, files[name])}


def use_template(files: Files, folder: Path) -> None:
    """Render a conversation, with and without tools."""
    template = load_template(files)
    if template is None:
        return
    for tools in (None, [{"name": "f", "parameters": {"x": {"type": "string"}}}]):
        try:
            template.render(TALK, tools)
        except BincompressError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                raise WrongError(f"a message of {len(str(error))} characters, or of several lines") from None


KINDS = {
    "store": Kind(fuzz_seeds.stores, change_store, use_store),
    "pack": Kind(pack_seeds, change_pack, use_pack),
    "safetensors": Kind(fuzz_seeds.checkpoints, change_checkpoint, use_checkpoint),
    "config": Kind(config_seeds, change_config, use_config),
    "tokenizer": Kind(lambda folder: fuzz_seeds.tokenizer_files(), change_tokenizer, use_tokenizer),
    "template": Kind(lambda folder: fuzz_seeds.templates(), change_template, use_template),
    "quantized": Kind(fuzz_sources.quantized_seeds, fuzz_sources.change_quantized, fuzz_sources.use_source),
    "gguf": Kind(fuzz_sources.gguf_seeds, fuzz_sources.change_gguf, fuzz_sources.use_source),
}


def change(kind: str, seeds: list[Files], seed: int, number: int) -> tuple[int, Files]:
    """Return which seed the input of a number is made of, and its files; the same for the same seed and number."""
    chance = random.Random(f"{seed} {kind} {number}")
    place = chance.randrange(len(seeds))
    return place, KINDS[kind].change(chance, seeds[place])


def lay_out(folder: Path, files: Files, there: Files | None) -> None:
    """Make a folder hold these files; there: what it holds already."""
    there = {} if there is None else there
    for name in there.keys() - files.keys():
        (folder / name).unlink()
    for name, content in files.items():
        if there.get(name) is not content and there.get(name) != content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def try_one(kind: str, files: Files, folder: Path, there: Files | None = None) -> str:
    """Use one input; returns what it came to, "accepted" or "refused"; any other exception goes on."""
    lays = kind in ("store", "pack", "safetensors", "config", "quantized", "gguf")
    if lays and there is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if lays:
        lay_out(folder, files, there)
    try:
        KINDS[kind].use(files, folder)
    except BincompressError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise WrongError(
                f"a message of {len(str(error))} characters, or of several lines: {str(error)[:200]!r}"
            ) from None
        return "refused"
    return "accepted"
