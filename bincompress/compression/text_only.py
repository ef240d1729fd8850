"""The language model of a checkpoint that also sees or hears, as a checkpoint of its own: --text-only."""

import json
import math
from dataclasses import replace

from bincompress.errors import RecipeError
from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.multimodal import is_multimodal, text_config

# Small files that say how images, video and sound become inputs.
_PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "feature_extractor_config.json",
    "video_preprocessor_config.json", "audio_preprocessor_config.json",
)  # fmt: skip


def language_model(checkpoint: Checkpoint) -> Checkpoint:
    """Return the language model alone, with the names and the config.json that it has by itself.

    A note of the checkpoint says what is left out. Raises RecipeError where nothing stands beside the language model,
    and UnsupportedModelError or ConfigError where it is not known.
    """
    if not is_multimodal(checkpoint.config):
        kind = checkpoint.config.get("model_type")
        raise RecipeError(
            f"--text-only: config.json of model_type {kind!r:.60} is not that of a model whose language model is known "
            "and has others beside it; leave the option out"
        )
    own = checkpoint_config(checkpoint)
    usual = replace(own, names=ARCHITECTURES[own.architecture].names)
    names = dict(zip(own.tensors(), usual.tensors(), strict=True))
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise RecipeError(f"--text-only: tensor {missing[0]} is missing; config.json requires it")
    tensors = {
        names[name]: replace(tensor, name=names[name]) for name, tensor in checkpoint.tensors.items() if name in names
    }
    before, after = (config.names.layer.split("{layer}")[0] for config in (own, usual))
    config = {**text_config(checkpoint.config), "architectures": [own.architecture]}
    return replace(
        checkpoint,
        config=config,
        tensors=tensors,
        notes=(*checkpoint.notes, *own.notes[1:], *_left_out(checkpoint, names)),
        made={**checkpoint.made, "config.json": json.dumps(config, indent=2).encode()},
        fused=tuple(after + name.removeprefix(before) for name in checkpoint.fused if name.startswith(before)),
        omitted=_PROCESSORS,
    )


def _left_out(checkpoint: Checkpoint, names: dict[str, str]) -> tuple[str, ...]:
    """Return a line that says which tensors are left out, by what their names begin with."""
    groups: dict[str, tuple[int, int]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in names:
            parts = name.split(".")
            depth = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
            group = ".".join(parts[: min(depth, 2)])
            count, weights = groups.get(group, (0, 0))
            groups[group] = count + 1, weights + math.prod(tensor.shape)
    if not groups:
        return ("--text-only: the checkpoint has no tensors beside those of the language model",)
    found = ", ".join(
        f"{group}.* ({count} tensors, {weights:,} weights)" for group, (count, weights) in sorted(groups.items())
    )
    return (f"left out (--text-only): {found}; the store is the language model alone",)
