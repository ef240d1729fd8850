"""DBellQuant (arXiv 2507.01027): input channels are scaled so that the weights of every row-block form two bells.

W x = (W diag(s)) (x / s). Where a norm feeds the layer, its weight is divided by s and nothing more is stored; all
matrices that read that norm share one s. The search begins at the paper's formula and goes on by its loss, in exact
alternating steps instead of the paper's gradient descent. What counts of all that it passes is how far the outputs are
off: by the weights' rounding after compensation, and by that of the activations x / s to a few bits. The best is moved
by shares towards even activations, and then fitted to the planes in closed form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import TensorError
from bincompress.methods.declaration import Binarized, CompensatedSettings, Method, Size, option
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding import calibrated
from bincompress.methods.rounding.activation_error import Magnitudes, peak
from bincompress.methods.rounding.asymmetric import asymmetric_target
from bincompress.methods.rounding.calibrated import five_digits
from bincompress.methods.rounding.codebook import Rounding, sum_of_planes, values_of
from bincompress.methods.rounding.compensation import compensate
from bincompress.methods.rounding.curvature import Curvature
from bincompress.methods.rounding.initial_scales import of_planes
from bincompress.tensors.weight import Weight

Floats = NDArray[np.float64]
_BLOCK = 128  # columns of a bell's row-block, as the paper has it
_STEPS = 12  # of the search from each start; every sixth is tried
_FITS = 3  # of the scale to the planes, after the search
_MOST_CHANGE = 2.0  # of a channel's scale in one step
_EXPONENTS = (0.25,)  # tried beside settings.epsilon
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # of the way to even inputs
_SAMPLE_ROWS = 512  # of all members together, that the search looks at
BELLS_REACH = 4.0  # of the histograms for the report, in mean magnitudes
_PAYS = 4.0  # what a stored bit a weight lowers the error by: a factor of four


@dataclass(frozen=True)
class DbellquantSettings(CompensatedSettings):
    """How DBellQuant transforms and rounds a tensor; always with error compensation."""

    method: ClassVar[str] = "dbellquant"
    planes: int = option(2, "planes, each with its own scale; more than one with error compensation", least=1, most=2)
    epsilon: float = option(0.85, "weight of the inputs' magnitude in the initial channel scale", least=0, most=1)
    activation_bits: Literal[6, 8, 16] = option(
        8, "bits of activations that the model will run with, for the channel scales; 16: their rounding does not count"
    )
    smoothing: float = option(
        1.0, "weight of the activations' rounding error beside that of the weights", least=0, most=1000
    )

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the layer's inputs are needed: always."""
        return True

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        return self.calibrated_record("planes", "epsilon", "activation_bits", "smoothing")


def binarize(weight: Weight, settings: DbellquantSettings, inputs: Inputs | None = None) -> Binarized:
    """Return the planes of the transformed weights, the transformation folded into the norm or stored as in_scale.

    inputs.channel_scale: what the columns are multiplied by and the norm's weight divided by, found by `channel_scale`
    for all matrices that read the norm; None where no norm feeds the layer: then the transformation is kept only if it
    pays for the bits of in_scale.
    """
    if inputs is None:
        raise TensorError("dbellquant needs statistics of the layer's inputs; give --stats")
    if inputs.channel_scale is not None:
        scale = inputs.channel_scale
        found = _transformed(weight, settings, inputs, scale)
        notes = {"transformation": "folded into the norm", "bells": bells(weight, scale)}
        return replace(found, notes={**found.notes, **notes})
    plain = _transformed(weight, settings, inputs, np.ones(weight.shape[1], np.float32))
    scale, lowered = _search((weight,), inputs, settings)
    worth = _PAYS ** (32.0 / weight.shape[0])  # 32 bits a column
    unpaid = replace(plain, notes={**plain.notes, "transformation": "none: in_scale would not pay for its bits"})
    if lowered * worth >= 1:  # refinement makes the difference smaller yet
        return unpaid
    found = _transformed(weight, settings, inputs, scale)
    if _criterion(found, settings) * worth >= _criterion(plain, settings):
        return unpaid
    tensor = replace(found.tensor, in_scale=(1.0 / scale).astype(np.float32))
    notes = {"transformation": "in_scale", "bells": bells(weight, scale)}
    return replace(found, tensor=tensor, notes={**found.notes, **notes})


def _transformed(weight: Weight, settings: DbellquantSettings, inputs: Inputs, scale: NDArray[np.float32]) -> Binarized:
    planes, bits = settings.planes, settings.activation_bits
    scheme = calibrated.Scheme(sum_of_planes(planes), of_planes(planes), planes, planes)
    found = calibrated.binarize(weight, settings, inputs, scheme, scale)
    scaled = weight.float32() * scale
    moved = Magnitudes.of(inputs).moved(scaled, scale.astype(np.float64), bits, found.notes["output_size"])
    peaks = [five_digits(peak(inputs.absmax, one)) for one in (np.ones_like(scale), scale)]
    notes = {"activation_error": five_digits(moved), "activation_peak": peaks}  # before and after
    return replace(found, notes={**found.notes, **notes})


def _criterion(found: Binarized, settings: DbellquantSettings) -> float:
    return float(found.notes["output_error"] + settings.smoothing * found.notes["activation_error"])


def channel_scale(members: Sequence[Weight], inputs: Inputs, settings: DbellquantSettings) -> NDArray[np.float32]:
    """Return the scale of every input channel, float32 (cols), positive, rounded to bfloat16.

    members: the matrices that read the input. Source: the paper's learnable transformation (LTDB); the search starts at
    its formula for settings.epsilon. Of all that the search passes, no transformation at all included, the one is taken
    with which the outputs are least off on rows spread evenly over the members: by the rounding of the weights, with
    error compensation, and by that of the activations to settings.activation_bits.
    """
    return _search(members, inputs, settings)[0]


def _search(
    members: Sequence[Weight], inputs: Inputs, settings: DbellquantSettings
) -> tuple[NDArray[np.float32], float]:
    """Return `channel_scale` and the share of the error without it that is left on the rows looked at."""
    known = inputs.curvature
    step = _row_step(members[0], len(members))
    near = inputs if inputs.lack is None else replace(inputs, lack=inputs.lack[::step])  # one member, no norm's
    sample = asymmetric_target(np.concatenate([_sampled(member, len(members)) for member in members]), known, near)
    weights = sample.astype(np.float64)
    magnitudes = Magnitudes.of(inputs)
    starts = [formula(weights, inputs.absmax, epsilon) for epsilon in (settings.epsilon, *_EXPONENTS)]
    passed = [scale for start in starts for scale in list(descend(weights, start))[:: _STEPS // 2]]
    best = plain = _tried(sample, known, np.ones(weights.shape[1]), settings, magnitudes)
    for scale in passed:
        best = min(best, _tried(sample, known, scale, settings, magnitudes), key=lambda tried: tried.error)
    for scale in smoothed(best.scale, magnitudes.square) if settings.activation_bits < 16 else ():
        best = min(best, _tried(sample, known, scale, settings, magnitudes), key=lambda tried: tried.error)
    for _ in range(_FITS):
        found = _tried(sample, known, _fitted(weights, best.values, best.scale, known), settings, magnitudes)
        if found.error >= best.error:
            break
        best = found
    scale = best.scale / np.exp(np.mean(np.log(best.scale)))
    return _as_bfloat16(scale), best.error / plain.error if plain.error > 0 else 1.0


def smoothed(scale: Floats, square: Floats) -> Iterator[Floats]:
    """Yield a scale moved by shares of the way to the one with which all channels have inputs of one size.

    square: the mean squares of the inputs (cols,).
    """
    even = _logs(square) / 2
    for share in _SHARES:
        yield np.exp((1 - share) * np.log(scale) + share * even)


def _sampled(weight: Weight, members: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(weight.float32(slice(None, None, _row_step(weight, members))))


def _row_step(weight: Weight, members: int) -> int:
    return max(1, weight.shape[0] * members // _SAMPLE_ROWS)


def _as_bfloat16(values: Floats) -> NDArray[np.float32]:
    """Round: the scale has to come out the same in the job of every member, though sums differ in the last bits."""
    patterns = values.astype(np.float32).view(np.uint32)
    rounded: NDArray[np.float32] = ((patterns + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


class _Tried(NamedTuple):
    """A scale, the weights that its planes stand for (before scaling back), and the criterion of the search."""

    scale: Floats
    values: Floats
    error: float


def _tried(
    weights: NDArray[np.float32], known: Curvature, scale: Floats, settings: DbellquantSettings, magnitudes: Magnitudes
) -> _Tried:
    narrow = scale.astype(np.float32)
    scaled = weights * narrow
    codebook, block = sum_of_planes(settings.planes), _BLOCK if settings.block == "row" else int(settings.block)
    rounding = Rounding(settings.scale_bits, float(np.abs(scaled).max(initial=0.0)))
    found = compensate(scaled, known.scaled(narrow), codebook, block, of_planes(settings.planes), rounding, 0)
    values = values_of(codebook, found.codes, found.coef, block).astype(np.float64)
    moved = magnitudes.moved(values, scale, settings.activation_bits, found.size)
    return _Tried(scale, values, found.cost + settings.smoothing * moved)


def _fitted(weights: Floats, values: Floats, scale: Floats, known: Curvature) -> Floats:
    """Return the scale that is best for the planes as they are: least squares under H, in closed form."""
    hessian = known.hessian.astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += known.damping * np.trace(hessian) / len(hessian)
    normal = hessian * (values.T @ values)
    # Columns whose planes are all zero have no say in their scale.
    normal[np.diag_indices_from(normal)] += 1e-9 * np.trace(normal) / len(normal) + np.finfo(np.float64).tiny
    fit = np.linalg.solve(normal, ((weights @ hessian) * values).sum(axis=0))
    fitted: Floats = 1.0 / np.clip(fit, 1.0 / (_MOST_CHANGE * scale), _MOST_CHANGE / scale)
    return fitted


def bells(weight: Weight, scale: NDArray[np.float32]) -> dict[str, list[int]]:
    """Return histograms, before and after the transformation, of weights over the mean magnitude of their row-block.

    Of rows spread evenly, 80 bins from -4 to 4: with two bells they gather around -1 and 1.
    """
    weights = _sampled(weight, 1)
    found = {}
    for name, values in (("before", weights), ("after", weights * scale)):
        starts = np.arange(0, values.shape[1], _BLOCK)
        sums = np.add.reduceat(np.abs(values), starts, axis=1)
        means = np.repeat(sums / np.diff(np.append(starts, values.shape[1])), _BLOCK, axis=1)[:, : values.shape[1]]
        counts, _ = np.histogram(values / np.maximum(means, 1e-30), bins=80, range=(-BELLS_REACH, BELLS_REACH))
        found[name] = counts.tolist()
    return found


def formula(weights: Floats, absmax: NDArray[np.float32], epsilon: float) -> Floats:
    """Return the paper's first scale: absmax ** e / (greatest |w| of the column) ** (1 - e), mean logarithm zero."""
    greatest = np.abs(weights).max(axis=0)
    logs = epsilon * _logs(absmax.astype(np.float64)) - (1.0 - epsilon) * _logs(greatest)
    scale: Floats = np.exp(logs - logs.mean())
    return scale


def _logs(values: Floats) -> Floats:
    """Return logarithms; channels that are always zero count as the smallest other one."""
    positive = values[values > 0]
    logs: Floats = np.log(np.maximum(values, positive.min() if positive.size else 1.0))
    return logs


def descend(weights: Floats, scale: Floats) -> Iterator[Floats]:
    """Yield a scale and those after it, each column set to the least of the paper's loss given the rows' targets.

    The loss is quadratic in a column's scale while the targets stand; the paper takes gradient steps instead.
    """
    yield scale
    for _ in range(_STEPS):
        ratio = weights * scale / targets(weights * scale)
        step = ratio.sum(axis=0) / np.maximum((ratio**2).sum(axis=0), 1e-30)
        scale = scale * np.clip(step, 1 / _MOST_CHANGE, _MOST_CHANGE)
        scale = scale / np.exp(np.mean(np.log(scale)))
        yield scale


def targets(weights: Floats) -> Floats:
    """Return the nearer of m + b and m - b for each weight: m the mean of its row-block, b the mean of |w - m|."""
    found = np.empty_like(weights)
    for first in range(0, weights.shape[1], _BLOCK):
        part = weights[:, first : first + _BLOCK]
        mean = part.mean(axis=1, keepdims=True)
        distance = np.abs(part - mean).mean(axis=1, keepdims=True)
        found[:, first : first + _BLOCK] = np.where(part > mean, mean + distance, mean - distance)
    # A target of zero (a row-block of one value, or of zeros) would make its relative distance infinite.
    return np.where(np.abs(found) > 1e-12, found, 1e-12)


def bell_loss(weights: Floats) -> float:
    """Return the paper's loss of transformed weights: mean squared distance to the nearer target, relative to it."""
    aim = targets(weights)
    return float(np.mean(((weights - aim) / aim) ** 2))


METHOD = Method(
    summary="input channels scaled so that weights form two bells, then error compensation (arXiv 2507.01027)",
    settings=DbellquantSettings,
    binarize=binarize,
    size=lambda settings: Size(settings.planes, settings.planes),
    channel_scale=channel_scale,
    histograms={"bells": BELLS_REACH},
)
