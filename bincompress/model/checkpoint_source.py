"""An unquantized checkpoint as a float32 decoder: the baseline that packed models are compared with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.model.config import ModelConfig, parse
from bincompress.model.decoder import Decoder
from bincompress.model.layout import settle
from bincompress.model.linear import DenseLinear, Floats
from bincompress.sources.checkpoint import ITEM_BYTES, Checkpoint, open_checkpoint, read_weight
from bincompress.tensors.weight import TensorSource
from cpu_kernels.parallel.workers import Workers

_WIDENED_AT_ONCE = 1 << 22  # items: 16 MB


class CheckpointSource:
    """Float32 weights read one tensor at a time; a tied head shares the embedding's memory."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, workers: Workers | None = None) -> None:
        """Check that every tensor of the decoder is there in the shape that config.json gives."""
        for name, shape in config.tensors().items():
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing; config.json requires it")
            found = checkpoint.tensors[name].shape
            if found != shape:
                raise CheckpointError(f"{name}: expected shape {shape}, as config.json gives it, found {found}")
            refuse_dtype(checkpoint.tensors[name])
        self._tensors = checkpoint.tensors
        self._workers = workers
        self._embedding: dict[str, DenseLinear] = {}

    def vector(self, names: Sequence[str]) -> Floats:
        """Return tensors that are no matrices, such as norms, one after the other."""
        return np.concatenate([read_weight(self._tensors[name]).float32().reshape(-1) for name in names])

    def linear(self, names: Sequence[str]) -> DenseLinear:
        """Return matrices with the same input as one, rows one below the other."""
        if len(names) == 1 and names[0] in self._embedding:
            return self._embedding[names[0]]
        sources = [self._tensors[name] for name in names]
        cols = sources[0].shape[1]
        result = np.empty((sum(source.shape[0] for source in sources), cols), np.float32)
        step = max(1, _WIDENED_AT_ONCE // cols)
        row = 0
        for source in sources:
            weight = read_weight(source)
            for start in range(0, source.shape[0], step):
                part = weight.float32(slice(start, start + step))
                result[row : row + len(part)] = part
                row += len(part)
        return DenseLinear(result, self._workers)

    def embedding(self, name: str) -> DenseLinear:
        """Return the table of token vectors."""
        if name not in self._embedding:
            self._embedding[name] = self.linear([name])
        return self._embedding[name]


def refuse_dtype(tensor: TensorSource) -> None:
    """Raise CheckpointError where a tensor that the decoder needs has a dtype that is not read."""
    if tensor.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{tensor.name}: dtype {tensor.dtype}, and the decoder needs it; expected {', '.join(ITEM_BYTES)}: convert "
            "the checkpoint first (transformers: from_pretrained with dtype=torch.bfloat16, then save_pretrained)"
        )


def checkpoint_config(checkpoint: Checkpoint) -> ModelConfig:
    """Return config.json checked, with the names and the output head that the checkpoint's tensors have.

    Raises UnsupportedModelError, ConfigError or CheckpointError.
    """

    def same(one: str, other: str) -> bool:
        if not Path(tensors[one].file).is_file():
            return True  # a plan of headers alone cannot know; the run that reads the weights decides
        for name in (one, other):
            refuse_dtype(tensors[name])
        first, second = read_weight(tensors[one]), read_weight(tensors[other])
        if first.dtype == second.dtype:
            return np.array_equal(first.bits, second.bits)
        step = max(1, _WIDENED_AT_ONCE // first.shape[1])
        parts = (slice(start, start + step) for start in range(0, first.shape[0], step))
        return all(np.array_equal(first.float32(part), second.float32(part)) for part in parts)

    tensors = checkpoint.tensors
    return settle(parse(checkpoint.config), {name: tensor.shape for name, tensor in tensors.items()}, same)


def load_checkpoint(checkpoint: Checkpoint | Path, workers: Workers | None = None) -> Decoder:
    """Load a checkpoint, or a folder that holds one, as a float32 decoder.

    Raises CheckpointError, ConfigError or UnsupportedModelError before any weight is read.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    config = checkpoint_config(checkpoint)
    return Decoder(config, CheckpointSource(checkpoint, config, workers), workers)
