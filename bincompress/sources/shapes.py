"""Which tensors will a model have, from its config.json alone? For plans of weights that are not there yet."""

import math
from pathlib import Path

from bincompress.sources.checkpoint import ITEM_BYTES, Checkpoint, read_json
from bincompress.sources.files import ADAPTER
from bincompress.tensors.weight import TensorSource

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# In other formats, which a run refuses: a plan of config.json alone would not tell.
_WEIGHTS = (".bin", ".bin.index.json", ".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz", ADAPTER)


def has_only_config(folder: Path) -> bool:
    """Return whether a folder describes a model without holding any of its weights."""
    weights = any(path.name.endswith(_WEIGHTS) or ".safetensors" in path.name for path in folder.iterdir())
    return (folder / "config.json").is_file() and not weights


def open_shapes(folder: Path) -> Checkpoint:
    """Return the checkpoint that config.json describes, its tensors in no file; only a plan can be made of it."""
    # Architectures are a part of the decoder, which no other verb of compression needs.
    from bincompress.model.config import parse

    config = read_json(folder / "config.json")
    dtype = _DTYPES.get(str(config.get("torch_dtype", config.get("dtype"))), "BF16")
    tensors = {
        name: TensorSource(name, dtype, shape, "", 0, math.prod(shape) * ITEM_BYTES[dtype])
        for name, shape in sorted(parse(config).tensors().items())
    }
    return Checkpoint(folder, folder.resolve().name, "", config, tensors)
