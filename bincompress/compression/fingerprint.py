"""What do a tensor's bytes in the store depend on? A job whose fingerprint is there already is not done again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bincompress.compression.records import Job, Shared
from bincompress.sources.checkpoint import read_weight
from bincompress.tensors.weight import Weight

BYTES_VERSION = 3  # raised when a change of the program changes the bytes of a tensor

ROUNDING_VERSION = 2  # the same for tensors that are rounded with what calibration found


def fingerprint(job: Job, weight: Weight) -> dict[str, Any]:
    """Return everything that a job's bytes depend on, its weight's own bytes among it, as JSON."""
    source, shared = job.source, job.shared
    return {
        "file": Path(source.file).name,
        "offset": source.offset,
        "nbytes": source.nbytes,
        "dtype": source.dtype,
        "content": content_hash(weight),
        "settings": job.settings.record(),
        "kept": xxhash.xxh3_128_hexdigest(json.dumps(job.kept).encode()) if job.kept else "",
        "archive": job.archive,
        "bytes_version": BYTES_VERSION,
        **({"inputs": job.inputs_hash, "rounding_version": ROUNDING_VERSION} if job.inputs_hash else {}),
        **({"shared": _shared_record(shared)} if shared else {}),
        **({"fallback": job.fallback.record()} if job.fallback else {}),
    }


def _shared_record(shared: Shared) -> dict[str, Any]:
    """Return what the bytes of a norm and its readers depend on beside the tensor itself."""
    members = [content_hash(read_weight(member)) for member in shared.members]
    offset = {"norm_offset": shared.norm_offset} if shared.norm_offset else {}
    return {"members": members, "settings": shared.settings.record(), **offset}


def content_hash(weight: Weight) -> str:
    """Return the xxh3-128 hash of a weight's bytes."""
    return xxhash.xxh3_128_hexdigest(weight.flat.view(np.uint8).data)
