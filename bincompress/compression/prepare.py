"""What is binarized? The matrix without the weights that stay as they are, and what is known of the layer's inputs."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from bincompress.compression.fingerprint import member_hashes
from bincompress.compression.records import Job, Shared
from bincompress.errors import TensorError
from bincompress.methods import Binarized, Inputs, Settings, method_named
from bincompress.sources.checkpoint import read_weight
from bincompress.tensors.dequantize import dequantize_at
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.counting import greatest_magnitude

_FINITE = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}  # greatest finite magnitude
Places = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True)
class Prepared:
    """A matrix as a method gets it, and what is done with its result."""

    name: str
    original: Weight
    settings: Settings
    inputs: Inputs | None
    kept: tuple[tuple[int, int], ...]  # single weights, (row, column), that the result lists with their exact values


def prepare(job: Job, weight: Weight) -> Prepared:
    """Return what a job's method is to work on; raises TensorError where its statistics are not there."""
    inputs = _inputs(job.statistics, job.name, job.shared, job.inputs_hash)
    if inputs is None and job.settings.calibrated:  # some methods could do without, and give other planes
        raise TensorError(f"{job.name}: the statistics of its inputs are gone; calibrate again")
    return Prepared(job.name, weight, job.settings, inputs, job.kept)


def binarize(prepared: Prepared) -> Binarized:
    """Run the method; raises TensorError naming the first weight that is not finite."""
    method, settings, weight = method_named(prepared.settings.method), prepared.settings, prepared.original
    if not method.finds_nonfinite(settings):
        check_finite(prepared.name, weight)
    try:
        found = method.binarize(_with_stand_ins(weight, prepared.kept), settings, prepared.inputs)
    except FloatingPointError:
        check_finite(prepared.name, weight)
        raise
    return _with_kept(found, weight, prepared.kept) if prepared.kept else found


def divided_norm(job: Job, norm: Weight) -> Weight:
    """Return a norm's weight, float32 and divided by the scale of its readers' columns where they share one."""
    inputs = _inputs(job.statistics, job.name, job.shared, job.inputs_hash) if job.shared else None
    if inputs is None or inputs.channel_scale is None:
        return norm
    return Weight((norm.float32() / inputs.channel_scale).view(np.uint32), "F32")


def check_finite(name: str, weight: Weight) -> None:
    """Raise TensorError naming the first NaN or infinity of a weight."""
    if greatest_magnitude(weight.flat) <= _FINITE[weight.dtype]:
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


def _with_kept(found: Binarized, weight: Weight, kept: tuple[tuple[int, int], ...]) -> Binarized:
    """Return a result that lists single weights with their exact values, its errors told anew."""
    rows, cols = (np.array(part) for part in zip(*kept, strict=True))
    exact = weight.at(rows, cols)
    stood = _with_stand_ins(weight, kept).at(rows, cols).astype(np.float64)
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


def _inputs(statistics: str, name: str, shared: Shared | None, inputs_hash: str) -> Inputs | None:
    """Read what calibration found of a tensor's inputs; None where its settings do not ask for it."""
    if not statistics:
        return None
    from bincompress.calibration.statistics import open_unfinished

    # One thread, whatever the machine has: BLAS sums in another order with more, and a job is one core's work.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    if shared is None:
        return open_unfinished(statistics).read(name)
    scale = _shared_scale(shared, member_hashes(shared), statistics, inputs_hash)
    found = open_unfinished(statistics).read(shared.members[0].name)
    return replace(found, name=name, channel_scale=scale)


@functools.lru_cache(maxsize=512)  # one of every norm: for those of its readers that this process has
def _shared_scale(
    shared: Shared, contents: tuple[str, ...], statistics: str, inputs_hash: str
) -> NDArray[np.float32] | None:
    """Return the scale of a norm's channels, found from all its readers; contents and inputs_hash tell them apart."""
    from bincompress.calibration.statistics import open_unfinished

    members = [read_weight(member) for member in shared.members]
    for source, weight in zip(shared.members, members, strict=True):
        check_finite(source.name, weight)
    find = method_named(shared.settings.method).channel_scale
    assert find is not None  # the plan shares only where the method scales channels
    scale = find(members, open_unfinished(statistics).read(shared.members[0].name), shared.settings)
    scale.flags.writeable = False
    return scale
