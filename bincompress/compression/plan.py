"""What will be done? From headers alone: settings, expected bytes and memory per tensor, and every refusal."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import xxhash

from bincompress.compression.recipe import KEEP, Recipe, check_settings
from bincompress.errors import RecipeError
from bincompress.model.roles import Kept, Kind, Role, kept_lines
from bincompress.model.runnable import Verdict, roles_of, verdict
from bincompress.records import Settings, Shared, TensorSource
from bincompress.sources.checkpoint import ITEM_BYTES, OTHER_DTYPES, Checkpoint
from bincompress.sources.hub import source_record

if TYPE_CHECKING:
    from bincompress.calibration.statistics import Statistics

# Bytes a weight beside its own and its planes' bytes, at the height of a job (measured with `benchmarks/memory.py`).
_SCRATCH = {"exact": 0.6, "greedy": 80.0, "windowed": 8.0}
_BASE_BYTES = 250 << 20  # Python, NumPy, Numba and Zarr, kernels loaded


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the plan."""

    source: TensorSource
    kind: Kind
    settings: Settings
    kept: tuple[tuple[int, int], ...]
    expected_bytes: int
    peak_memory: int  # bytes
    inputs_hash: str = ""  # of the statistics that its settings need
    shared: Shared | None = None  # where a transformation is folded into a norm: of the norm and its readers
    reason: str = ""  # why it is kept; empty where it is packed

    @property
    def packed(self) -> bool:
        """Whether planes are made of it."""
        return self.settings.method != KEEP


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    checkpoint: Checkpoint
    recipe: Recipe
    archive: bool
    tensors: tuple[PlannedTensor, ...]
    statistics: str = ""  # where they lie, where any tensor needs them
    sequence: Mapping[str, Any] | None = None  # what a run layer after layer is calibrated on, as JSON
    verdict: Verdict = field(default_factory=lambda: Verdict((), (), None))  # whether the store will run here

    def kept_lines(self) -> list[str]:
        """Return a line for each group of tensors that stays unpacked, with the reason and its share of the weights."""
        return kept_lines(Kept(t.source.name, math.prod(t.source.shape), t.reason) for t in self.tensors)

    @property
    def expected_bytes(self) -> int:
        """Bytes of all arrays to be written, before an archive's coding."""
        return sum(tensor.expected_bytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors to be read."""
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory of one worker at its height."""
        return max(tensor.peak_memory for tensor in self.tensors)

    def record(self) -> dict[str, Any]:
        """Return what has to be equal for a run to go on with a store that another run began."""
        return {
            "source": source_record(self.checkpoint),
            "config": self.checkpoint.config,
            "recipe": self.recipe.record(),
            "keep_weights": {t.source.name: [list(place) for place in t.kept] for t in self.tensors if t.kept},
            "archive": self.archive,
            "tensors": {t.source.name: "packed" if t.packed else "plain" for t in self.tensors},
            "statistics": dict(self.sequence) if self.sequence else _digest(t.inputs_hash for t in self.tensors),
        }


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    kept: Mapping[str, tuple[tuple[int, int], ...]] | None = None,
    archive: bool = False,
    statistics: "Statistics | None" = None,
    sequence: Mapping[str, Any] | None = None,
) -> Plan:
    """Return the plan for a checkpoint; raises CheckpointError or RecipeError for all that can be refused now.

    statistics: of the inputs, for settings that compensate errors; they have to be this checkpoint's. sequence: what
    they are collected on while the plan is carried out (see `sequence.in_sequence`), in place of statistics.
    """
    found = verdict(checkpoint)
    roles = roles_of(checkpoint)
    kept = dict(kept or {})
    _check_names(checkpoint, recipe, kept)
    if statistics is not None:
        _check_statistics(checkpoint, statistics)
    known = _decoder_linears(checkpoint) if sequence is not None else frozenset()
    tensors = tuple(
        _with_inputs(
            _planned(tensor, recipe, kept.get(tensor.name, ()), roles.of(tensor.name, tensor.shape)), statistics, known
        )
        for tensor in checkpoint.tensors.values()
    )
    if sequence is not None and not any(t.settings.calibrated for t in tensors):
        raise RecipeError("--sequential is for methods that need calibration, and none of these do: add --compensate")
    url = statistics.url if statistics is not None and any(t.inputs_hash for t in tensors) else ""
    return Plan(checkpoint, recipe, archive, _folded(checkpoint, tensors), url, sequence, found)


def _decoder_linears(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the matrices whose inputs a run layer after layer collects."""
    from bincompress.model.checkpoint_source import checkpoint_config

    config = checkpoint_config(checkpoint)
    return frozenset(
        tensor for layer in range(config.layers) for group in config.inputs_of_layer(layer).values() for tensor in group
    )


def _check_statistics(checkpoint: Checkpoint, statistics: "Statistics") -> None:
    found, own = statistics.attributes["source"], source_record(checkpoint)
    if found.get("fingerprint") != own["fingerprint"]:
        raise RecipeError(
            f"{statistics.url}: statistics of another model ({found.get('id')} {found.get('fingerprint')}); this is "
            f"{own['id']} {own['fingerprint']}: run `bincompress calibrate` on it"
        )


def _with_inputs(tensor: PlannedTensor, statistics: "Statistics | None", known: frozenset[str]) -> PlannedTensor:
    """Note what the tensor's settings need of the statistics; raises RecipeError where it is not there.

    known: matrices whose statistics are collected later.
    """
    if not tensor.settings.calibrated:
        return tensor
    name = tensor.source.name
    if statistics is None and not known:
        raise RecipeError(
            f"{name}: error compensation needs statistics of the inputs: run `bincompress calibrate SOURCE STATS "
            "--text FILE` first and give --stats STATS, or give --sequential FILE"
        )
    if name not in known if statistics is None else not statistics.knows(name):
        where = "the text" if statistics is None else statistics.url
        raise RecipeError(f"{name}: {where} tells nothing of its inputs; compensate only the decoder's linears")
    rows, cols = tensor.source.shape
    # The matrix in float32 as it is worked on, the Hessian with its factor and inverse in float64, and what a chunk
    # of rows takes.
    memory = tensor.peak_memory + 12 * rows * cols + 40 * cols * cols + (1 << 30)
    found = statistics.hash_of(name) if statistics is not None else ""
    return replace(tensor, inputs_hash=found, peak_memory=memory)


def _folded(checkpoint: Checkpoint, tensors: tuple[PlannedTensor, ...]) -> tuple[PlannedTensor, ...]:
    """Note for every norm into which a transformation can be folded, and for its readers, who shares it.

    It can be where all matrices that read the norm are transformed with the same settings.
    """
    if not any(tensor.settings.method == "dbellquant" for tensor in tensors):
        return tensors
    from bincompress.model.checkpoint_source import checkpoint_config

    config = checkpoint_config(checkpoint)
    names = config.declaration.names
    planned = {tensor.source.name: tensor for tensor in tensors}
    for layer in range(config.layers):
        for norm, parts in ((names.input_norm, names.qkv), (names.post_norm, names.gate_up)):
            readers = [planned[names.of_layer(layer, f"{part}.weight")] for part in parts]
            first, own = readers[0], planned[names.of_layer(layer, norm)]
            if first.settings.method != "dbellquant" or any(t.settings != first.settings for t in readers):
                continue
            members = tuple(t.source for t in readers)
            shared = Shared(members, first.settings)
            extra = sum(member.nbytes for member in members)
            for tensor in (own, *readers):
                # The norm is divided by the scale, and kept in float32 then.
                size = 4 * math.prod(own.source.shape) if tensor is own else tensor.expected_bytes
                planned[tensor.source.name] = replace(
                    tensor, shared=shared, inputs_hash=first.inputs_hash, expected_bytes=size,
                    peak_memory=tensor.peak_memory + extra,
                )  # fmt: skip
    return tuple(planned.values())


def _digest(parts: Iterable[str]) -> str:
    joined = "".join(parts)
    return xxhash.xxh3_128_hexdigest(joined.encode()) if joined else ""


def _check_names(checkpoint: Checkpoint, recipe: Recipe, kept: Mapping[str, object]) -> None:
    for override in recipe.overrides:
        if not fnmatch.filter(checkpoint.tensors, override.pattern):
            example = next(iter(checkpoint.tensors))
            raise RecipeError(
                f"pattern {override.pattern!r} matches none of the {len(checkpoint.tensors)} tensors, such as {example}"
            )
    for name in kept:
        if name not in checkpoint.tensors:
            raise RecipeError(f"kept weights name the tensor {name}, which the checkpoint does not have")


def _planned(source: TensorSource, recipe: Recipe, kept: tuple[tuple[int, int], ...], role: Role) -> PlannedTensor:
    kind = role.kind
    if kind == "linear":
        base = recipe.defaults
    elif kind == "other" or recipe.embeddings == KEEP:
        base = Settings(method=KEEP)
    else:
        base = Settings(method="uniform", bits=int(recipe.embeddings[0]), block=128)
    settings = recipe.settings_for(source.name, base)
    if settings.method == KEEP:
        if kept:
            raise RecipeError(f"{source.name}: single weights are to be kept, but the whole tensor is")
        memory = _BASE_BYTES + 2 * min(source.nbytes, 512 << 20) + source.nbytes
        if source.dtype not in ITEM_BYTES and source.dtype not in OTHER_DTYPES:
            raise RecipeError(
                f"{source.name}: dtype {source.dtype} is not known; expected a checkpoint of BF16, F16 or F32"
            )
        reason = role.reason or "asked for (keep)"
        if source.dtype not in ITEM_BYTES:
            reason = f"{source.dtype}, which the decoder does not read"
        return PlannedTensor(source, kind, settings, (), source.nbytes, memory, reason=reason)
    if len(source.shape) != 2 or min(source.shape) < 1:
        raise RecipeError(f"{source.name}: shape {list(source.shape)}; only matrices can be packed, keep it instead")
    if source.dtype not in ITEM_BYTES:
        raise RecipeError(
            f"{source.name}: dtype {source.dtype} cannot be packed; expected {', '.join(ITEM_BYTES)} "
            "(`--keep` leaves a tensor as it is)"
        )
    rows, cols = source.shape
    check_settings(settings, source.name, (rows, cols))
    for row, col in kept:
        if row >= rows or col >= cols:
            raise RecipeError(f"{source.name}: kept weight ({row}, {col}) lies outside its shape [{rows}, {cols}]")
    expected = packed_bytes(settings, rows, cols) + 12 * len(kept)
    scratch = _SCRATCH[settings.solver] * rows * cols
    if source.dtype == "F32" and settings.block == "matrix":
        scratch += 48 * rows * cols  # sorted distinct values and their prefix sums
    memory = int(_BASE_BYTES + source.nbytes + 2 * expected + scratch)
    return PlannedTensor(source, kind, settings, kept, expected, memory)


def packed_bytes(settings: Settings, rows: int, cols: int) -> int:
    """Return the bytes of planes and coefficients of a matrix, without listed weights."""
    if settings.method == "uniform":
        planes, stored = settings.bits, 2
    elif settings.method == "dbllm":
        planes, stored = 2, 2
    elif settings.method == "wgm":
        planes = 1 + (settings.groups - 1).bit_length()
        stored = 1 << (planes - 1)
    elif settings.method == "billm":
        planes, stored = 2, 7
    else:
        planes = stored = settings.plane_count
    plane_bytes = 8 * planes * rows * math.ceil(cols / 64)
    if settings.block == "matrix":
        return plane_bytes + 4 * stored
    block = settings.block if isinstance(settings.block, int) else cols
    return plane_bytes + settings.scale_bits // 8 * stored * rows * math.ceil(cols / block)


def settings_record(settings: Settings) -> dict[str, Any]:
    """Return the settings that matter to a method's bytes, as JSON."""
    everything = asdict(settings)
    if settings.calibrated:
        own = {"wgm": ["groups"], "xnor": ["planes"], "billm": [], "dbllm": [], "dbellquant": ["planes", "epsilon"]}[
            settings.method
        ]
        chosen = {key: everything[key] for key in ("method", *own, "block", "scale_bits", "compensate", "refine")}
        return {**chosen, "compensate": True, **({"planes": settings.plane_count} if "planes" in own else {})}
    used = {
        "keep": ["method"],
        "uniform": ["method", "bits", "block"],
        "dbllm": ["method", "block"],
        "xnor": ["method", "block"],
        "wgm": ["method", "groups", "solver", "window", "lam", "lam_normalized", "block"],
    }[settings.method]
    if settings.solver != "windowed" and "window" in used:
        used.remove("window")
    return {key: everything[key] for key in used}
