"""What is in a store, and whether it is whole: `inspect` and `verify`."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bincompress.api.progress import OnCount, uncounted
from bincompress.calibration.statistics import open_statistics
from bincompress.compression.recompute import Proof, compare, plan_proof
from bincompress.errors import BincompressError
from bincompress.model.laying_out import compare as laid_out_problems
from bincompress.reporting.inspection import inspect as inspect_store
from bincompress.sources.hub import open_source
from bincompress.store.laid_out import forms_in
from bincompress.store.store import Store, open_store
from bincompress.store.verify import parts
from bincompress.store.verify import verify as verify_store


@dataclass(frozen=True)
class VerifyResult:
    """What is wrong with a store: problems by tensor; nothing where it is whole."""

    store: str
    problems: dict[str, str]
    recomputed: tuple[str, ...] = ()  # tensors that were made from the source once more, and compared

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.problems


def inspect(store: str | Path) -> dict[str, Any]:
    """Return what is in a store: `{"tensors": {name: report}, "total": {...}}`; bits are per weight."""
    return inspect_store(open_store(str(store)))


def verify(
    store: str | Path,
    *,
    source: str | Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    statistics: str | None = None,
    progress: OnCount = uncounted,
) -> VerifyResult:
    """Read every byte of a store and compare it with its hash and the format.

    source: also make tensors from this checkpoint (a folder or a Hub id) once more, as the store says that they were
    made, and compare their bytes; `sample` of them, drawn by `seed`, or all. statistics: those that calibrated tensors
    were made with. Raises StoreError where there is no store, and where its bytes do not follow from a source: it was
    trained, distilled or calibrated layer after layer, or its statistics are not given.
    """
    opened = open_store(str(store))
    proof = prove(opened, source, sample, seed, statistics)
    jobs = proof.jobs if proof is not None else ()
    total = parts(opened) + len(forms_in(opened)) + len(jobs)
    problems: dict[str, str] = {}
    results = chain(verify_store(opened), laid_out_problems(opened), compare(proof) if proof is not None else ())
    for number, (name, problem) in enumerate(results, 1):
        if problem:
            problems.setdefault(name, problem)
        progress(number, total)
    known = proof.problems if proof is not None else {}
    return VerifyResult(str(store), {**known, **problems}, tuple(job.name for job in jobs))


def prove(
    store: Store, source: str | Path | None, sample: int | None, seed: int, statistics: str | None
) -> Proof | None:
    """Return what `verify` is to make from a source once more, None where none is given; raises as it does."""
    if source is None:
        if sample is not None or statistics is not None:
            raise BincompressError("--sample and --statistics are for --source MODEL")
        return None
    found = open_statistics(statistics) if statistics is not None else None
    return plan_proof(store, open_source(str(source)), found, sample, seed)
