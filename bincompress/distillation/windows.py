"""Which tokens does a step see, and which are held out?"""

from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint


def tokens_of(model: Checkpoint, text: str) -> NDArray[np.int64]:
    """Return the tokens (n,) of a text; raises DistillError where a model has no place for one of its tokenizer's."""
    tokenizer = load_tokenizer(model.assets())
    if tokenizer.size > checkpoint_config(model).vocab:
        raise DistillError(f"{model.name}: its tokenizer has more tokens than its vocabulary")
    return np.array(tokenizer.encode(text), np.int64)


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a text; every so many-th is held out, so that each part of it is judged, too."""

    training: NDArray[np.int64]  # (windows, context)
    held_out: NDArray[np.int64]  # (windows, context)
    seed: int

    def with_more(self, tokens: NDArray[np.int64]) -> "Windows":
        """Return these with further windows to train on, (n,) tokens that fill them."""
        return replace(self, training=np.concatenate([self.training, tokens.reshape(-1, self.training.shape[1])]))

    @classmethod
    def of(cls, tokens: NDArray[np.int64], settings: DistillSettings) -> "Windows":
        """Cut tokens (n,) into windows; raises DistillError where they do not fill a batch beside those held out."""
        count = len(tokens) // settings.context
        windows = tokens[: count * settings.context].reshape(count, settings.context)
        every = round(1 / settings.validation_share)
        held = np.arange(count) % every == every // 2
        if count > 1 and not held.any():
            held[count // 2] = True
        if np.count_nonzero(~held) < settings.batch or not held.any():
            raise DistillError(
                f"the text has {len(tokens):,} tokens, {count} windows of {settings.context}; expected at least "
                f"{settings.batch} for a batch and one held-out window: give a longer text, or a smaller --batch or "
                "--context"
            )
        return cls(windows[~held], windows[held], settings.seed)

    def of_step(self, step: int, batch: int) -> NDArray[np.int64]:
        """Return the numbers of the training windows of a step; each epoch has an order of its own, from the seed."""
        count = len(self.training)
        places = np.arange(step * batch, (step + 1) * batch)
        orders = {int(e): np.random.default_rng([self.seed, int(e)]).permutation(count) for e in set(places // count)}
        return np.array([orders[int(place // count)][place % count] for place in places])

    @property
    def fingerprint(self) -> str:
        """A hash of all windows."""
        digest = xxhash.xxh3_128(np.ascontiguousarray(self.training).data)
        digest.update(np.ascontiguousarray(self.held_out).data)
        return digest.hexdigest()
