"""Which files of a checkpoint folder hold its weights? The rule of transformers, and what a user should know of it."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from bincompress.errors import CheckpointError
from bincompress.sources.json_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_OTHERS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.npz", "*.bin.index.json")
_MOST_NAMED = 3  # of a list in a message


@dataclass(frozen=True)
class WeightFiles:
    """The files to read, in the order in which later ones replace tensors of earlier ones."""

    paths: tuple[Path, ...]
    index: Mapping[str, str]  # which file the index says that a tensor is in; empty where none is used
    notes: tuple[str, ...] = ()


def weight_files(folder: Path) -> WeightFiles:
    """Return the safetensors files of the model: model.safetensors, else those of the index, else a whole set.

    Raises CheckpointError where there are none, or one that the index names is not there.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if (folder / SINGLE).is_file():
        unused = [name for name in (*present, INDEX) if name != SINGLE and (folder / name).exists()]
        note = f"{SINGLE} is read, as transformers reads it; not used: {_named(unused)}"
        return WeightFiles((folder / SINGLE,), {}, (note,) if unused else ())
    if (folder / INDEX).exists():
        return _indexed(folder)
    if not present:
        raise CheckpointError(_nothing(folder))
    if any(name.startswith("adapter_model") for name in present) and (folder / ADAPTER).exists():
        raise CheckpointError(_adapter(folder))
    chosen = _whole_set(present)
    unused = [name for name in present if name not in chosen]
    notes = (f"{INDEX} is missing; {_named(chosen)} are read as one model; not used: {_named(unused)}",)
    return WeightFiles(tuple(folder / name for name in chosen), {}, notes if unused else ())


def _indexed(folder: Path) -> WeightFiles:
    index = folder / INDEX
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to file names")
    names = sorted(set(found.values()))
    for name in names:
        # A Hub download holds links into its cache, so the name is checked, not where it leads.
        if not FILE_NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {name!r}; expected a .safetensors file in that folder")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: missing, but {INDEX} names it, and there is no {SINGLE}; "
                "download the checkpoint again"
            )
    if not names:
        raise CheckpointError(f"{index}: its weight_map is empty; expected tensor names and their files")
    return WeightFiles(tuple(folder / name for name in names), found)


def _whole_set(present: list[str]) -> list[str]:
    """Return the files of the one whole set NAME-00001-of-0000N among them; all where there is not exactly one."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name in present:
        if match := _SHARD.fullmatch(name):
            sets.setdefault((match[1], match[3]), []).append(name)
    whole = [names for (_, count), names in sets.items() if len(names) == int(count)]
    return whole[0] if len(whole) == 1 else present


def _nothing(folder: Path) -> str:
    if (folder / ADAPTER).exists():
        return _adapter(folder)
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return f"{folder}: no .safetensors file; give the GGUF file itself: {folder / gguf[0]}"
    others = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
    found = f"; found {_named(others)}" if others else ""
    return f"{folder}: no .safetensors file; other formats (.bin, .pth) are not read{found}"


def _adapter(folder: Path) -> str:
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    return (
        f"{folder}: an adapter (LoRA or the like) of {base!r:.80}, not a whole model; merge it into that model first "
        "(peft: merge_and_unload, then save_pretrained) and give the merged folder"
    )


def index_notes(files: WeightFiles, held: Collection[str]) -> tuple[str, ...]:
    """Return what to say of an index against the tensors that its files hold."""
    absent = sorted(name for name in files.index if name not in held)
    if not absent:
        return ()
    return (f"{INDEX} names {len(absent)} tensors that no file holds: {_named(absent)}",)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
