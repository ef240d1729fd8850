"""Which planes and embeddings let a process that runs the model stay under so many bytes? From headers alone.

The rule: the most planes first, then the most bits for embeddings and output head, as long as all fits. What a process
takes is counted: the matrices as the kernels read them, keys and values of the context, the tokenizer, and a base that
was measured. Of an embedding that is not the output head too, which stays in the store's file, a part counts.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from bincompress.compression.options import CompressionOptions, check_names
from bincompress.compression.plan import Plan, PlannedTensor
from bincompress.compression.planning import plan
from bincompress.errors import RecipeError
from bincompress.methods import method_named, of_planes
from bincompress.model.memory import planes_beside, process_bytes
from bincompress.process.machine import size_text

_USUAL_CONTEXT = 2048
_PLANES = (4, 3, 2, 1)
_EMBEDDINGS = ("keep", "8bit", "4bit")
_CHOSEN = ("method", "groups", "planes", "block", "bits", "rank", "embeddings")


@dataclass(frozen=True)
class Fit:
    """The settings that fit, and what a process with them takes."""

    settings: dict[str, Any]  # as `compress` takes them
    planes: int
    context: int  # tokens
    needed: int  # bytes of memory

    def line(self, size: int) -> str:
        """Return the choice as a line of text, with what to expect of it."""
        wide = "16-bit" if self.settings["embeddings"] == "keep" else self.settings["embeddings"].replace("bit", "-bit")
        planes = "one plane" if self.planes == 1 else f"{self.planes} planes"
        told = (
            f"--fit {size_text(size)}: {planes}, {wide} embeddings and head; running it with {self.context:,} tokens "
            f"of context takes about {size_text(self.needed)}"
        )
        if self.planes > 2:
            return told
        return (
            f"{told}. Without training, {planes} of a small model are useless: give --train TEXT (docs/guide/train.md)"
        )


def fit(source: str | Path, size: int, *, headers_only: bool = True, **options: Unpack[CompressionOptions]) -> Fit:
    """Return the settings for `compress` with which a process that runs the model stays under `size` bytes.

    options: those of `compress`, of which those that this chooses are refused. Its `context` are the tokens that the
    process holds; 2,048, or the model's limit, if not given. Raises RecipeError where nothing fits, with the least
    that would, and as `plan` does.
    """
    for name in _CHOSEN:
        if name in options:
            raise RecipeError(f"--fit chooses --{name}; leave out one of them")
    check_names(options)
    if options.get("export_only"):
        raise RecipeError("--fit is for a store that runs here; leave out --export-only")
    context, least = options.get("context"), None
    others = {name: value for name, value in options.items() if name != "context"}
    for planes in _PLANES:
        for width in _EMBEDDINGS:
            chosen: dict[str, Any] = {**others, **of_planes(planes), "embeddings": width}
            made = plan(source, headers_only=headers_only, **chosen).plan
            held = _held(made, context)
            needed = needed_memory(made, held)
            if needed <= size:
                return Fit({**of_planes(planes), "embeddings": width}, planes, held, needed)
            least = needed if least is None else min(least, needed)
    assert least is not None
    raise RecipeError(
        f"--fit {size_text(size)}: with one plane and {width} embeddings, the least there is, running the model takes "
        f"about {size_text(least)}; raise it, or lower --context ({held:,} tokens now)"
    )


def needed_memory(made: Plan, context: int) -> int:
    """Return the bytes that a process takes which runs the finished store with so many tokens of context."""
    config = made.verdict.config
    assert config is not None  # of a plan that runs
    sizes = {tensor.source.name: _laid_out(tensor) for tensor in made.tensors}
    return sum(process_bytes(config, sizes, len(made.checkpoint.assets().get("tokenizer.json", b"")), context))


def _laid_out(tensor: PlannedTensor) -> int:
    """Return the bytes of a tensor as the kernels read it."""
    if not tensor.packed:
        return tensor.expected_bytes
    size = method_named(tensor.settings.method).size(tensor.settings)
    return tensor.expected_bytes + planes_beside(size.planes, size.coefficients) * math.prod(tensor.source.shape) // 8


def _held(made: Plan, context: int | None) -> int:
    config = made.verdict.config
    if config is None or not made.verdict.runs:
        raise RecipeError(f"--fit: {made.verdict.line()}")
    if context is not None and context > config.context:
        raise RecipeError(f"--context {context:,}: expected at most {config.context:,}, the model's limit")
    return context or min(_USUAL_CONTEXT, config.context)
