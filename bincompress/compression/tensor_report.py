"""What does the store say of a tensor, beside what is needed to read it?"""

import json
from typing import Any

import numpy as np

from bincompress.compression.records import Job, Shared
from bincompress.methods import KEEP, Made
from bincompress.tensors.forms import Stored
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight

_SAMPLE = 1 << 14  # weights in a tensor's histogram
_BINS = 100
_FEW_TERMS = 256  # a kilobyte of attributes, beside planes and coefficients that are counted


def tensor_report(job: Job, weight: Weight, written: Weight | Made, nbytes: int, not_finite: str) -> dict[str, Any]:
    """Return a tensor's report, as JSON: bits and errors, and of a packed one a histogram of the weight as it was.

    nbytes: of its arrays in the store. not_finite: what of a kept tensor is not; empty where all of it is.
    """
    encoding = job.source.encoding
    read_from = {} if encoding is None else {"source_format": encoding.format}
    if isinstance(written, Weight):
        return {**_kept_report(written, nbytes, not_finite, job.shared), **read_from}
    nbytes += _terms_bytes(written.tensor)
    relative = written.squared_error / written.squared_norm if written.squared_norm else 0.0
    return {
        "method": job.settings.method,
        "groups": written.groups,
        "nominal_bits": six_digits(written.nominal_bits),
        "stored_bits": six_digits(8 * nbytes / weight.bits.size),
        "stored_bytes": nbytes,
        "relative_error": six_digits(relative),
        "squared_error": six_digits(written.squared_error),
        "squared_norm": six_digits(written.squared_norm),
        "weights": weight.bits.size,
        **written.notes,
        **read_from,
        "histogram": sample_histogram(weight),
    }


def _terms_bytes(tensor: Stored) -> int:
    """Return the bytes of the list of terms, which is in the attributes, where it is long enough to matter."""
    if not isinstance(tensor, PackedTensor) or len(tensor.terms) <= _FEW_TERMS:
        return 0
    return len(json.dumps(tensor.terms))


def _kept_report(weight: Weight, nbytes: int, not_finite: str, shared: Shared | None) -> dict[str, Any]:
    """Return the report of a tensor that stays as it is, or that is a norm divided by the scale of its readers."""
    size = max(1, weight.bits.size)
    report: dict[str, Any] = {
        "method": KEEP.method,
        "groups": 0,
        "nominal_bits": 8.0 * weight.bits.nbytes / size,
        "stored_bits": six_digits(8 * nbytes / size),
        "stored_bytes": nbytes,
        "relative_error": 0.0,
        "squared_error": 0.0,
        "squared_norm": 0.0,
        "weights": weight.bits.size,
    }
    if not_finite:
        report["not_finite"] = not_finite
    if shared is not None:
        report["transformation"] = f"divided by the scale of {', '.join(m.name for m in shared.members)}"
    return report


def sample_histogram(weight: Weight) -> dict[str, Any]:
    """Return a histogram of evenly spaced weights: the original is not in the store."""
    sample = np.ascontiguousarray(weight.flat[:: max(1, weight.bits.size // _SAMPLE)])
    values = Weight(sample[None], weight.dtype).float32()[0].astype(np.float64)
    # Single weights far out would leave the bell a spike in the middle.
    reach = min(float(np.max(np.abs(values), initial=0.0)), 6.0 * float(np.std(values))) or 1.0
    counts, _ = np.histogram(values, bins=_BINS, range=(-reach, reach))
    return {"low": six_digits(-reach), "high": six_digits(reach), "counts": counts.tolist()}


def six_digits(value: float) -> float:
    """Return six significant digits, so that the last bit of a sum does not change a store's bytes."""
    return float(f"{value:.6g}")
