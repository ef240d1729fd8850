"""What is binarized? The matrix without the weights that stay as they are, and what is known of the layer's inputs."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from bincompress.compression.records import Job, Shared
from bincompress.errors import TensorError
from bincompress.methods import KEEP, Inputs, Made, Method, Settings, method_named
from bincompress.sources.checkpoint import read_weight
from bincompress.tensors.dequantize import dequantize_at
from bincompress.tensors.weight import FINITE, Weight
from cpu_kernels.quantize.counting import greatest_magnitude

_MOST_SCALES = 512  # one of every norm: for those of its readers that this process has
_scales: OrderedDict[str, NDArray[np.float32]] = OrderedDict()  # by what a scale was found from


@dataclass(frozen=True)
class Prepared:
    """A tensor as it is worked on."""

    name: str
    weight: Weight
    settings: Settings
    method: Method | None  # None: it is not packed, and no scale is folded into it
    inputs: Inputs | None
    kept: tuple[tuple[int, int], ...]  # single weights, (row, column), that the result lists with their exact values
    norm_offset: float = 0.0  # of a norm: what the decoder adds to its stored weights

    def as_it_is(self) -> Weight:
        """Return what is written of a tensor that is not packed; a norm is divided by the scale of its readers."""
        if self.inputs is None or self.inputs.channel_scale is None:
            return self.weight
        scale, values = self.inputs.channel_scale, self.weight.float32()
        if self.norm_offset:
            offset = np.float32(self.norm_offset)
            folded = (values + offset) / scale - offset
        else:
            folded = values / scale
        return Weight(folded.view(np.uint32), "F32")

    def binarized(self) -> Made:
        """Run the method; raises TensorError naming the first weight that is not finite."""
        method = self.method
        assert method is not None  # of a tensor that is packed
        if not method.finds_nonfinite(self.settings):
            check_finite(self.name, self.weight)
        try:
            found = method.binarize(_with_stand_ins(self.weight, self.kept), self.settings, self.inputs)
        except FloatingPointError:
            check_finite(self.name, self.weight)
            raise
        return _with_kept(found, self.weight, self.kept) if self.kept else found


def prepare(job: Job, weight: Weight, mark: dict[str, Any]) -> Prepared:
    """Return what is to be worked on; mark: the job's fingerprint. Raises TensorError where statistics are missing."""
    inputs = _inputs(job)
    if inputs is None and job.settings.calibrated:  # some methods could do without, and give other planes
        raise TensorError(f"{job.name}: its input statistics are missing; run `bincompress calibrate` again")
    decides = job.shared.settings if job.shared is not None else job.settings
    method = None if decides == KEEP else method_named(decides.method)
    if inputs is not None and method is not None and job.shared is not None:
        scale = _shared_scale(job.shared, inputs, method, f"{mark.get('inputs')} {mark.get('shared')}")
        inputs = replace(inputs, name=job.name, channel_scale=scale)
    offset = job.shared.norm_offset if job.shared is not None else 0.0
    return Prepared(job.name, weight, job.settings, method, inputs, job.kept, offset)


def _inputs(job: Job) -> Inputs | None:
    """Read what calibration found of a tensor's inputs, a norm's being its readers'; None where it is not needed."""
    if not job.statistics:
        return None
    from bincompress.calibration.statistics import open_unfinished

    # One thread, whatever the machine has: BLAS sums in another order with more, and a job is one core's work.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    return open_unfinished(job.statistics).read(job.name if job.shared is None else job.shared.members[0].name)


def _shared_scale(shared: Shared, inputs: Inputs, method: Method, key: str) -> NDArray[np.float32]:
    """Return the scale of a norm's channels, found from all matrices that read it; key: all that it depends on."""
    if key not in _scales:
        members = [read_weight(member) for member in shared.members]
        for source, weight in zip(shared.members, members, strict=True):
            check_finite(source.name, weight)
        assert method.channel_scale is not None  # the plan shares only where the method scales channels
        scale = method.channel_scale(members, inputs, shared.settings)
        scale.flags.writeable = False
        _scales[key] = scale
        while len(_scales) > _MOST_SCALES:
            _scales.popitem(last=False)
    return _scales[key]


def check_finite(name: str, weight: Weight) -> None:
    """Raise TensorError naming the first NaN or infinity of a weight."""
    if greatest_magnitude(weight.flat) <= FINITE[weight.dtype]:
        return
    for row in range(weight.shape[0]):
        values = weight.float32(slice(row, row + 1))[0]
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise TensorError(
                f"{name}: {values[bad[0]]} at row {row}, column {bad[0]}; expected finite weights "
                "(is the checkpoint damaged? `--keep` leaves a tensor as it is)"
            )


def _with_stand_ins(weight: Weight, kept: tuple[tuple[int, int], ...]) -> Weight:
    """Return the matrix with a neighbour's value in place of each kept weight."""
    if not kept:
        return weight
    bits = weight.bits.copy()
    for row, col in kept:
        # The block's distribution is then what it would be without the kept weight.
        bits[row, col] = bits[row, col - 1 if col else min(1, weight.shape[1] - 1)]
    return Weight(bits, weight.dtype)


def _with_kept(found: Made, weight: Weight, kept: tuple[tuple[int, int], ...]) -> Made:
    """Return a result that lists single weights with their exact values, its errors told anew."""
    rows, cols = (np.array(part) for part in zip(*kept, strict=True))
    stood = _with_stand_ins(weight, kept).at(rows, cols).astype(np.float64)
    exact = weight.at(rows, cols)
    tensor = found.tensor
    flat = (rows * weight.shape[1] + cols).astype(np.uint64)
    other = ~np.isin(tensor.listed_index, flat)  # what the method lists itself: zeros
    index = np.concatenate([flat, tensor.listed_index[other]])
    value = np.concatenate([exact, tensor.listed_value[other]])
    order = np.argsort(index)
    formula = dequantize_at(tensor, rows, cols).astype(np.float64)
    return replace(
        found,
        tensor=replace(tensor, listed_index=index[order], listed_value=value[order]),
        squared_error=max(0.0, found.squared_error - float(np.sum((stood - formula) ** 2))),
        squared_norm=found.squared_norm + float(np.sum(exact.astype(np.float64) ** 2 - stood**2)),
        notes={**found.notes, "kept": len(kept)},
    )
