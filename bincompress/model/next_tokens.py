"""One token of each of several texts: their attention as one job of all threads, and what that is told of caches."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bincompress.model.cache import Part
from bincompress.model.config import ModelConfig
from bincompress.model.linear import Floats
from cpu_kernels.decoder.next_tokens import ATTEND_NEXT, JOB, TEXT, set_layer
from cpu_kernels.parallel.workers import Workers

_POSITION = TEXT.index("position")


class NextTokens:
    """Attends for passes of one token of each of several texts; one caller at a time."""

    def __init__(self, config: ModelConfig, workers: Workers, scratch: Sequence[Floats], query_scale: np.float32):
        """scratch: float32 arrays of the attention kernel, one a thread."""
        self._workers = workers
        self._kv_heads = config.kv_heads
        grows = any(rope.query_growth for rope in config.ropes)
        self._able = not (config.sinks or grows or config.rotates_in_pairs)
        self._numbers = np.array([config.norm_epsilon, query_scale], np.float32)
        self._scratch = scratch
        given = {
            "numbers": self._numbers.ctypes.data, "heads": config.heads, "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
        }  # fmt: skip
        rows = [{**given, "scratch": own.ctypes.data, "scratch_size": own.size} for own in scratch]
        self._jobs = np.array([[row.get(word, 0) for word in JOB] for row in rows], np.int64)
        self._texts = np.zeros((0, 0, len(TEXT)), np.int64)  # (layers, texts, TEXT)
        self._kernel = ATTEND_NEXT[np.dtype(np.float32)]

    def take(self, parts: Sequence[Part]) -> bool:
        """Prepare for a pass; return whether it is of this kind. Raises ValueError for caches of several types."""
        if len({part.cache.kind for part in parts}) > 1:
            raise ValueError("texts that share a pass: expected caches of one type")
        if not self._able or len(parts) < 2 or any(part.stop - part.start != 1 for part in parts):
            return False
        for part in parts:
            part.cache.reach(part.cache.length + 1)
        self._texts = np.stack([part.cache.places() for part in parts], axis=1)
        self._texts[:, :, _POSITION] = [part.cache.length for part in parts]
        self._kernel = ATTEND_NEXT[parts[0].cache.keys[0].dtype]
        return True

    def attend(
        self, qkv: Floats, result: Floats, bias: Floats, q_norm: Floats, k_norm: Floats, number: int, window: int
    ) -> None:
        """Let every token read those before it, and put its keys and values into its cache: of layer `number`.

        qkv (texts, columns), overwritten; result (texts, heads * head_dim).
        """
        texts: NDArray[np.int64] = self._texts[number]
        set_layer(self._jobs, qkv, result, bias, q_norm, k_norm, texts, window)
        jobs = self._jobs
        self._workers.run_kernel(self._kernel, jobs.ctypes.data, jobs.strides[0], len(texts) * self._kv_heads)
