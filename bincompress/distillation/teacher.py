"""What does the teacher say: its logits, cached on disk on request, and text that it writes itself?"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bincompress.distillation.decoder import Cache
from bincompress.distillation.model import Predictions, Rows
from bincompress.distillation.settings import DistillError
from bincompress.distillation.windows import Windows

_CACHE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 33}  # of the keys and values of the texts that are written at once


class Teacher:
    """The unquantized model's logits of training windows."""

    def __init__(
        self, predictions: Predictions, weights: Mapping[str, Tensor], windows: Windows, cache: Path | None, key: str
    ) -> None:
        """Prepare the cache, a file a window in a folder named by `key`, if one is asked for.

        key: tells apart teachers and settings that give other logits. Raises DistillError where the disk is too small.
        """
        self._predictions = predictions
        self._weights = weights
        self._windows = windows.training
        self._folder = cache and cache / f"{key}-{windows.fingerprint}"
        if self._folder is not None:
            self._check_space(self._folder)

    def _check_space(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = sum(1 for _ in folder.glob("*.npy"))
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise DistillError(f"{folder}: cannot be used for cached logits: {error.strerror or error}") from None
        count, context = self._windows.shape
        needed = 2 * (count - present) * context * self._predictions.decoder.config.vocab
        if needed > free:
            raise DistillError(
                f"{folder}: the teacher's logits take up to {needed:,} bytes, {free:,} are free; "
                "leave out --cache-logits, or give a shorter text"
            )

    def logits(self, numbers: NDArray[np.int64]) -> Rows:
        """Return what gives the logits of these training windows, float32 (n, vocab), for some of their tokens."""
        if self._folder is None:
            states = self._predictions.states(self._weights, self._predictions.ids(self._windows[numbers]))
            return self._of_states(states)
        cached = torch.cat([self._cached(self._folder, int(number)) for number in numbers]).flatten(0, 1)
        return lambda part: cached[part].float()

    def _of_states(self, states: Tensor) -> Rows:
        def rows(part: slice) -> Tensor:
            with torch.no_grad():
                # In float16, as cached ones are: a cache does not change the result.
                return self._predictions.decoder.head(self._weights, states[part]).half().float()

        return rows

    def _cached(self, folder: Path, number: int) -> Tensor:
        path = folder / f"{number:07d}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path)).to(self._predictions.device)
        ids = self._predictions.ids(self._windows[number : number + 1])
        rows, step = self._of_states(self._predictions.states(self._weights, ids)), self._predictions.rows_at_once
        parts = [rows(slice(start, start + step)).half() for start in range(0, ids.numel(), step)]
        logits = torch.cat(parts).view(*ids.shape, -1)
        partial = folder / f".{number:07d}.{os.getpid()}.partial"
        try:
            with open(partial, "wb") as file:
                np.save(file, logits.cpu().numpy())
            os.replace(partial, path)
        except OSError as error:
            raise DistillError(f"{path}: cannot be written: {error.strerror or error}; free some space") from None
        return logits

    def text_loss(self, ids: Tensor) -> float:
        """Return the teacher's own summed loss on windows of text."""
        return self._predictions.text_loss(self._weights, ids)


def write_text(
    predictions: Predictions,
    weights: Mapping[str, Tensor],
    tokens: int,
    context: int,
    first: int | None,
    leads: NDArray[np.int64] | None,
    seed: int,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> NDArray[np.int64]:
    """Let a model write windows of `context` tokens, at least `tokens` in all, and return them, int64 (n,).

    Each begins with a row of `leads` (windows, n), the beginnings of texts, or without these with the beginning-of-text
    token `first`, where there is one, and a random token; the rest is sampled as the model predicts it (temperature 1).
    """
    config = predictions.decoder.config
    vocab, device = config.vocab, predictions.device
    position = 2 * predictions.decoder.dtype.itemsize * config.layers * config.kv_heads * config.head_dim
    at_once = max(1, _CACHE_BYTES[device.type] // (position * context))
    count = -(-tokens // context)
    generator = torch.Generator(device).manual_seed(seed)
    written = []
    for begin in range(0, count, at_once):
        size = min(at_once, count - begin)
        if leads is not None:
            chosen = torch.randint(len(leads), (size,), generator=generator, device=device).cpu().numpy()
            ids = torch.from_numpy(leads[chosen]).to(device)
        else:
            ids = torch.randint(vocab, (size, 1), generator=generator, device=device)
            if first is not None:
                ids = torch.cat([torch.full((size, 1), first, device=device), ids], 1)[:, :context]
        cache, row = Cache(), ids
        while ids.shape[1] < context:
            with torch.no_grad():
                states = predictions.decoder.states(weights, row, cache)
                shares = predictions.decoder.head(weights, states[:, -1]).softmax(-1)
            row = torch.multinomial(shares, 1, generator=generator)
            ids = torch.cat([ids, row], 1)
            on_tokens(begin * context + size * ids.shape[1])
        written.append(ids.cpu().numpy())
    return np.concatenate(written).reshape(-1)
