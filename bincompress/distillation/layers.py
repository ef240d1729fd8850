"""How is a model trained one layer after the other, with only one of them in memory?

Each decoder layer reads the residual stream that the trained layers before it give, and is trained so that its output
is what the unquantized model's layer gives for the unquantized stream.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bincompress.compression.tensor_report import six_digits
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Student
from bincompress.distillation.settings import DistillError, LayerSettings
from bincompress.distillation.train import optimizer, rate, set_rate

_AT_ONCE = 4  # windows that run without gradients
_WARMUP = 0.1  # share of the steps
_SHOWN_EVERY = 16  # steps


@dataclass(frozen=True)
class LayerReport:
    """How far a layer's output is from the unquantized one's, as a share of what that layer changes of the stream."""

    layer: int
    start: float  # on the first step
    end: float  # mean of the last tenth of the steps
    held_out_start: float
    held_out: float
    flips: float  # share of the weights whose level changed
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return it as JSON, without what differs between equal runs."""
        found = {name: six_digits(value) for name, value in asdict(self).items() if name not in ("layer", "seconds")}
        return {"layer": self.layer, **found}


OnStep = Callable[[int, float], None]  # steps done, loss


def forward(
    decoder: TorchDecoder, weights: Mapping[str, Tensor], stream: Tensor, layer: int, into: Tensor | None = None
) -> Tensor:
    """Return the stream (windows, n, hidden) after a layer, without gradients; into: where it goes, `stream` too."""
    found = torch.empty_like(stream) if into is None else into
    with torch.no_grad():
        for part, place in zip(stream.split(_AT_ONCE), found.split(_AT_ONCE), strict=True):
            place.copy_(decoder.layer(weights, part, layer))
    return found


def embed(decoder: TorchDecoder, weights: Mapping[str, Tensor], ids: Tensor, into: Tensor) -> None:
    """Write the stream (windows, n, hidden) before the first layer of windows of tokens (windows, n)."""
    for part, place in zip(ids.split(_AT_ONCE), into.split(_AT_ONCE), strict=True):
        place.copy_(decoder.embed(weights, part))


class Objective:
    """The squared distance of a layer's output from what it should be, each token against its own size.

    The next norm divides each token by its root mean square, so a token with massive activations (Sun et al. 2024)
    counts as one token; unweighted, a few of them would be all that a layer is trained for.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        """Take the unquantized stream before and after the layer, (windows, n, hidden)."""
        parts = zip(inputs.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True)
        total = sum(_relative_squares(x, t).double().sum() for x, t in parts)
        self._change = float(total) / (targets.shape[0] * targets.shape[1])

    def __call__(self, found: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of windows as a share of what the layer changes of the stream."""
        return _relative_squares(found, targets).mean() / self._change


def _relative_squares(found: Tensor, targets: Tensor) -> Tensor:
    return (found - targets).square().mean(-1) / (targets.square().mean(-1) + 1e-12)


def train_layer(
    decoder: TorchDecoder,
    layer: int,
    student: Student,
    inputs: Tensor,
    targets: Tensor,
    objective: Objective,
    settings: LayerSettings,
    on_step: OnStep = lambda step, loss: None,
) -> tuple[float, float]:
    """Train a student's weights of one layer from the streams before and after it, (windows, n, hidden).

    Returns the loss of the first step, and its mean over the last tenth of them.
    """
    count, device = len(inputs), inputs.device
    batch = min(settings.batch, count)
    steps = steps_of(settings, count)
    order = np.random.default_rng([settings.seed, layer])
    numbers = np.concatenate([order.permutation(count) for _ in range(settings.passes + 1)])
    adam = optimizer(student, settings.lr, settings.lr_planes, device)
    losses: list[Tensor] = []
    for step in range(steps):
        set_rate(adam, rate(step, _WARMUP, steps))
        part = torch.from_numpy(numbers[step * batch : (step + 1) * batch]).to(device)
        weights = student.weights()
        loss = objective(decoder.layer(weights, inputs[part], layer), targets[part])
        adam.zero_grad()
        loss.backward()
        student.backward(weights)
        adam.step()
        losses.append(loss.detach())
        if device.type == "cpu" or step % _SHOWN_EVERY == 0:  # reading a loss waits for the GPU
            on_step(step + 1, float(losses[-1]))
    end = float(torch.stack(losses[-max(1, steps // 10) :]).mean())
    if not math.isfinite(end):
        raise DistillError(f"the loss of layer {layer + 1} became {end}; try a smaller --layer-lr or --layer-lr-planes")
    return float(losses[0]), end


def steps_of(settings: LayerSettings, windows: int) -> int:
    """Return the steps in which a layer is trained on so many windows."""
    return max(1, settings.passes * windows // min(settings.batch, windows))
