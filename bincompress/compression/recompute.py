"""Does a store hold what its source gives? Tensors are made once more, and compared byte for byte."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bincompress.calibration.statistics import Statistics
from bincompress.compression.fingerprint import BYTES_VERSION, ROUNDING_VERSION, fingerprint
from bincompress.compression.job import binarized_or_fallback
from bincompress.compression.plan import Plan, PlannedTensor, folded
from bincompress.compression.prepare import prepare
from bincompress.compression.recipe import Recipe
from bincompress.compression.records import Job
from bincompress.compression.root import root_differences, well_formed
from bincompress.compression.run import make_jobs
from bincompress.errors import RecipeError, StoreError, TensorError
from bincompress.methods import KEEP, Settings, checked
from bincompress.model.runnable import roles_of
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.store.store import Store
from bincompress.store.writing import plain_values

_NAMED = 3  # tensors in a message
_ANOTHER = "was written by a version of bincompress whose bytes are others; use that version to compare"


@dataclass(frozen=True)
class Proof:
    """What is to be made once more."""

    store: Store
    checkpoint: Checkpoint
    jobs: tuple[Job, ...]
    problems: Mapping[str, str]  # known from headers and small files alone, by tensor

    @property
    def names(self) -> list[str]:
        """The tensors, in the order in which they are compared."""
        return [job.name for job in self.jobs]


def plan_proof(
    store: Store, checkpoint: Checkpoint, statistics: Statistics | None = None, sample: int | None = None, seed: int = 0
) -> Proof:
    """Return what can be compared of a finished store; sample: so many tensors, drawn by a seed (all if not given).

    Raises StoreError where the bytes cannot be made from a source alone: the store is not complete, was trained, was
    calibrated layer after layer, was written by a version whose bytes were others, or was calibrated with statistics
    that are not given.
    """
    attributes = _recomputable(store)
    names = sorted(store.tensors())
    known = [name for name in names if name in checkpoint.tensors]
    problems = {name: f"{checkpoint.name} has no such tensor" for name in names if name not in checkpoint.tensors}
    problems |= {
        name: f"is in {checkpoint.name}, and not in the store" for name in checkpoint.tensors if name not in set(names)
    }
    problems |= _other_files(store, checkpoint) | root_differences(store, checkpoint)
    for name in known:
        found, there = store.shape(name), checkpoint.tensors[name].shape
        if found != there:
            problems[name] = f"shape {list(found)}; {checkpoint.name} has {list(there)}"
    planned = [_planned(store, checkpoint, name) for name in known if name not in problems]
    chosen = known if sample is None else random.Random(seed).sample(known, min(sample, len(known)))
    jobs = make_jobs(
        Plan(
            checkpoint, Recipe(), attributes.get("archive") is True,
            folded(checkpoint, tuple(planned)) if len(planned) == len(checkpoint.tensors) else tuple(planned),
            statistics.url if statistics is not None else "",
        ),
        store.url, "",
    )  # fmt: skip
    jobs = sorted((job for job in jobs if job.name in set(chosen)), key=lambda job: job.name)
    _check_statistics(store, jobs, statistics)
    return Proof(store, checkpoint, tuple(jobs), problems)


def compare(proof: Proof) -> Iterator[tuple[str, str]]:
    """Make each tensor once more and yield (name, what differs); empty where every byte is the same."""
    for job in proof.jobs:
        try:
            yield job.name, _difference(proof.store, job)
        except TensorError as error:
            yield job.name, f"cannot be made from {proof.checkpoint.name}: {error}"
        except StoreError as error:  # what is stored cannot be read
            yield job.name, str(error)


def _recomputable(store: Store) -> Mapping[str, Any]:
    """Return a store's attributes; raises StoreError where its tensors do not follow from a source and settings."""
    attributes = store.attributes
    if attributes["status"] != "complete":
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again to finish it")
    advice = "`bincompress verify` without --source checks every byte against its hash"
    for key, what in (("training", "trained"), ("distillation", "distilled")):
        if key in attributes:
            raise StoreError(f"{store.url}: was {what}, so its bytes do not follow from a source alone; {advice}")
    if isinstance(attributes.get("statistics"), dict):
        raise StoreError(
            f"{store.url}: was calibrated layer after layer (--sequential), so no tensor follows from the source "
            f"alone; {advice}; or compress again with the same text, and compare what `bincompress pack` makes of both"
        )
    if not well_formed(attributes.get("keep_weights")):
        raise StoreError(f"{store.url}: zarr.json: keep_weights: expected [row, column] pairs by tensor")
    return attributes


def _other_files(store: Store, checkpoint: Checkpoint) -> dict[str, str]:
    """Return which small files differ, by name."""
    ours, theirs = store.read_assets(), checkpoint.assets()
    return {
        name: f"differs from that of {checkpoint.name}" if name in ours and name in theirs
        else f"is in {'the store' if name in ours else checkpoint.name} alone"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    }  # fmt: skip


def _planned(store: Store, checkpoint: Checkpoint, name: str) -> PlannedTensor:
    """Return a tensor's plan, as its own attributes tell it."""
    attributes = store.complete_attributes(name)
    kept = store.attributes["keep_weights"].get(name, [])
    mark = attributes.get("fingerprint")
    if not isinstance(mark, dict):
        raise StoreError(f"{store.url}: {name}: does not say what it was made from; {_ANOTHER}")
    for key, own in (("bytes_version", BYTES_VERSION), ("rounding_version", ROUNDING_VERSION)):
        if mark.get(key, own) != own:
            raise StoreError(f"{store.url}: {name}: {_ANOTHER} ({key} {mark[key]}; here {own})")
    source = checkpoint.tensors[name]
    kind = roles_of(checkpoint).of(name, source.shape).kind
    settings = _settings(store, name, mark.get("settings"))
    fallback = _settings(store, name, mark["fallback"]) if mark.get("fallback") else None
    inputs = mark.get("inputs", "") if store.tensors()[name] == "packed" else ""
    return PlannedTensor(
        source, kind, settings, tuple((row, col) for row, col in kept), 0, 0, inputs, fallback=fallback
    )


def _settings(store: Store, name: str, record: Any) -> Settings:
    """Return the settings that a tensor was made with; raises StoreError where this version has no such ones."""
    if not isinstance(record, dict) or not isinstance(record.get("method"), str):
        raise StoreError(f"{store.url}: {name}: its settings are {record!r:.60}; expected a method and its settings")
    try:
        found = checked(record["method"], {key: value for key, value in record.items() if key != "method"}, name)
    except RecipeError as error:
        raise StoreError(f"{store.url}: {_ANOTHER} ({error})") from None
    if json.loads(json.dumps(found.record())) != record:
        raise StoreError(f"{store.url}: {name}: {_ANOTHER}")
    return found


def _check_statistics(store: Store, jobs: list[Job], statistics: Statistics | None) -> None:
    """Raise StoreError where tensors were calibrated, and the statistics are not those."""
    marks = {job.name: store.complete_attributes(job.name)["fingerprint"].get("inputs", "") for job in jobs}
    calibrated = [name for name, mark in marks.items() if mark]
    if not calibrated:
        return
    names = ", ".join(calibrated[:_NAMED]) + (" ..." if len(calibrated) > _NAMED else "")
    if statistics is None:
        raise StoreError(
            f"{store.url}: {len(calibrated)} tensors were calibrated ({names}); give what they were made with: "
            "--statistics STATS"
        )
    for job in jobs:
        name = job.name if job.shared is None else job.shared.members[0].name
        if marks[job.name] and (not statistics.knows(name) or statistics.hash_of(name) != marks[job.name]):
            raise StoreError(
                f"{statistics.url}: not the statistics that {store.url} was made with ({job.name}); give those"
            )


def _difference(store: Store, job: Job) -> str:
    """Return what differs between a tensor as it is stored and as it is made now."""
    stored = store.complete_attributes(job.name)
    weight = read_weight(job.source)
    mark = fingerprint(job, weight)
    before = stored["fingerprint"]
    for key in ("dtype", "content"):
        if before.get(key) != mark[key]:
            return "the source's weights are others than those that the store was made from"
    if (before.get("shared") is None) != (job.shared is None):
        return "the norm and its readers are not scaled as they were when the store was made"
    if job.settings == KEEP:
        plain = prepare(job, weight, mark).as_it_is()
        arrays = {"array": plain_values(plain, job.source.shape)}
        own: dict[str, Any] = {"dtype": plain.dtype_name}
    else:
        tensor = binarized_or_fallback(job, weight, mark)[1].tensor
        arrays, own = tensor.arrays(), tensor.attributes()
    for key, value in own.items():
        if json.loads(json.dumps(value)) != stored.get(key):
            return f"{key} differs"
    there = dict(store.stored_arrays(job.name))
    if there.keys() != arrays.keys():
        return f"has the arrays {', '.join(sorted(there))}; made now: {', '.join(sorted(arrays))}"
    for key, values in arrays.items():
        if _bytes(values) != _bytes(there[key]):
            return f"{key} differs" + _of_another_machine(before)
    return ""


def _bytes(values: Any) -> tuple[str, tuple[int, ...], memoryview]:
    flat = np.ascontiguousarray(values)
    return values.dtype.name, values.shape, flat.reshape(-1).view(np.uint8).data


def _of_another_machine(mark: Mapping[str, Any]) -> str:
    return " (calibrated bytes are those of one CPU type and NumPy build)" if mark.get("inputs") else ""
