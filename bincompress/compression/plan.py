"""What will be done? From headers alone: settings, expected bytes and memory per tensor, and every refusal."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import xxhash

from bincompress.compression.recipe import Recipe
from bincompress.compression.records import Shared
from bincompress.errors import RecipeError
from bincompress.methods import KEEP, Settings, embeddings, method_named
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.model.config import ModelConfig
from bincompress.model.lowering import MOST_PLANES
from bincompress.model.roles import Kept, Kind, Role, kept_lines
from bincompress.model.runnable import Verdict, roles_of, verdict
from bincompress.sources.checkpoint import ITEM_BYTES, OTHER_DTYPES, Checkpoint
from bincompress.sources.hub import source_record
from bincompress.store.layout import LOW_RANK_VERSION
from bincompress.tensors.weight import TensorSource

if TYPE_CHECKING:
    from bincompress.calibration.statistics import Statistics

_EXPERT = re.compile(r"\.experts\.\d+\.")
_SMALLEST = "4bit"  # of what embeddings can become
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
    fallback: Settings | None = None  # in place of settings that give every weight exactly, where they cannot

    @property
    def packed(self) -> bool:
        """Whether planes are made of it."""
        return self.settings != KEEP


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

    def decoded_lines(self) -> list[str]:
        """Return a line where tensors have too many terms for the engine's kernels, which makes a store slow to run."""
        sizes = [method_named(t.settings.method).size(t.settings).coefficients for t in self.tensors if t.packed]
        many = [size for size in sizes if size > MOST_PLANES]
        if not many:
            return []
        return [
            f"slow to run: {len(many)} tensors have more than {MOST_PLANES} terms (up to {max(many):,}), which no "
            "kernel multiplies; the engine decodes their weights for every product"
        ]

    def expert_lines(self) -> list[str]:
        """Return a line where the model has mixtures of experts, and one where some saw too few tokens."""
        config = self.verdict.config
        if config is None or config.experts is None:
            return []
        experts, sparse = config.experts, sum(config.experts.layers)
        packed = sum(
            t.packed and t.kind == "linear" and _EXPERT.search(t.source.name) is not None for t in self.tensors
        )
        return [
            f"{config.architecture}: {sparse} of {config.layers} layers have {experts.count} experts each, "
            f"{experts.chosen} for each token; {packed:,} of {3 * experts.count * sparse:,} matrices of experts are "
            "packed, each on its own; routers are kept"
        ]

    def saving_lines(self) -> list[str]:
        """Return a line where embeddings and output head stay as they are: what packing them would save."""
        smaller = replace(self.recipe, embeddings=_SMALLEST)
        kept = saved = 0
        for tensor in self.tensors:
            source = tensor.source
            if tensor.kind not in ("embedding", "head") or tensor.packed or source.dtype not in ITEM_BYTES:
                continue
            settings = smaller.settings_for(source.name, embeddings()[_SMALLEST])
            if settings == KEEP or len(source.shape) != 2 or settings.problem((source.shape[0], source.shape[1])):
                continue  # as an override asks for it
            kept += tensor.expected_bytes
            saved += tensor.expected_bytes - packed_bytes(settings, *source.shape)
        if saved <= 0:
            return []
        return [
            f"embeddings and output head stay as they are, {kept:,} of {self.expected_bytes:,} bytes: "
            f"--embeddings {_SMALLEST} would save {saved:,} bytes"
        ]

    @property
    def low_rank(self) -> bool:
        """Whether a tensor will have, or may have, the low-rank form, which other versions of the store do not."""
        settings = [one for t in self.tensors for one in (t.settings, t.fallback) if one not in (None, KEEP)]
        return any(method_named(one.method).low_rank for one in settings if one is not None)

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
            # Named only where it is not the usual one.
            **({"version": LOW_RANK_VERSION} if self.low_rank else {}),
            "source": source_record(self.checkpoint),
            "config": self.checkpoint.config,
            "recipe": self.recipe.record(),
            "keep_weights": {t.source.name: [list(place) for place in t.kept] for t in self.tensors if t.kept},
            "archive": self.archive,
            "tensors": {t.source.name: "packed" if t.packed else "plain" for t in self.tensors},
            # Named only where there are any, so that other stores stay as they are, byte for byte.
            **({"fused": list(self.checkpoint.fused)} if self.checkpoint.fused else {}),
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
        raise RecipeError("--sequential needs a method that uses calibration; add --compensate")
    url = statistics.url if statistics is not None and any(t.inputs_hash for t in tensors) else ""
    return Plan(checkpoint, recipe, archive, folded(checkpoint, tensors), url, sequence, found)


def _decoder_linears(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the matrices whose inputs a run layer after layer collects."""
    config = checkpoint_config(checkpoint)
    if config.experts is not None:
        raise RecipeError(
            f"--sequential does not know mixtures of experts yet ({config.architecture}): run `bincompress calibrate "
            "SOURCE STATS --text FILE` and give --stats STATS"
        )
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
        raise RecipeError(
            f"{name}: {where} has no statistics for its inputs; only the decoder's linear layers can be compensated"
        )
    rows, cols = tensor.source.shape
    # The matrix in float32 as it is worked on, the Hessian with its factor and inverse in float64, and what a chunk
    # of rows takes.
    memory = tensor.peak_memory + 12 * rows * cols + 40 * cols * cols + (1 << 30)
    found = statistics.hash_of(name) if statistics is not None else ""
    return replace(tensor, inputs_hash=found, peak_memory=memory)


def folded(checkpoint: Checkpoint, tensors: tuple[PlannedTensor, ...]) -> tuple[PlannedTensor, ...]:
    """Note for every norm into which a channel scale can be folded, and for its readers, who shares it.

    It can be where all matrices that read the norm have the same settings, of a method that scales channels.
    """
    if not any(_scales_channels(tensor) for tensor in tensors):
        return tensors
    config = checkpoint_config(checkpoint)
    planned = {tensor.source.name: tensor for tensor in tensors}
    for norm, readers in _norms_with_readers(config, planned):
        first = readers[0]
        if not _scales_channels(first) or any(reader.settings != first.settings for reader in readers):
            continue
        shared = Shared(tuple(reader.source for reader in readers), first.settings, config.norm_offset)
        extra = sum(member.memory for member in shared.members)
        for tensor in (norm, *readers):
            # The norm is divided by the scale, and kept in float32 then.
            size = 4 * math.prod(norm.source.shape) if tensor is norm else tensor.expected_bytes
            planned[tensor.source.name] = replace(
                tensor, shared=shared, inputs_hash=first.inputs_hash, expected_bytes=size,
                peak_memory=tensor.peak_memory + extra,
            )  # fmt: skip
    return tuple(planned.values())


def _scales_channels(tensor: PlannedTensor) -> bool:
    return tensor.packed and method_named(tensor.settings.method).channel_scale is not None


def _norms_with_readers(
    config: ModelConfig, planned: Mapping[str, PlannedTensor]
) -> list[tuple[PlannedTensor, list[PlannedTensor]]]:
    """Return each layer's norms with the matrices that read their outputs."""
    names = config.declaration.names
    return [
        (planned[names.of_layer(layer, norm)], [planned[names.of_layer(layer, f"{part}.weight")] for part in parts])
        for layer in range(config.layers)
        for norm, parts in ((names.input_norm, config.mixing_of(layer)[0]), (names.post_norm, names.gate_up))
        if norm  # else they read the residual stream itself, into which nothing can be folded
        # A router reads what the experts read, and the gates of a state what its matrices read; they stay as they are.
        if (config.experts_of(layer) is None if norm == names.post_norm else not config.has_gates(layer))
    ]


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
    base = KEEP if kind == "other" else embeddings()[recipe.embeddings]
    settings = recipe.settings_for(source.name, None if kind == "linear" else base)
    if settings == KEEP:
        if kept:
            raise RecipeError(
                f"{source.name}: --keep-weights names single weights, but the whole tensor is kept already"
            )
        memory = _BASE_BYTES + 2 * min(source.value_bytes, 512 << 20) + source.memory
        if source.dtype not in ITEM_BYTES and source.dtype not in OTHER_DTYPES:
            raise RecipeError(
                f"{source.name}: dtype {source.dtype} is not known; expected a checkpoint of BF16, F16 or F32"
            )
        reason = role.reason or "asked for (keep)"
        if source.dtype not in ITEM_BYTES:
            reason = f"{source.dtype}, which the decoder does not read"
        return PlannedTensor(source, kind, settings, (), source.value_bytes, memory, reason=reason)
    if len(source.shape) != 2 or min(source.shape) < 1:
        raise RecipeError(
            f"{source.name}: shape {list(source.shape)}; only matrices can be packed; use --keep for this tensor"
        )
    if source.dtype not in ITEM_BYTES:
        raise RecipeError(
            f"{source.name}: dtype {source.dtype} cannot be packed; expected {', '.join(ITEM_BYTES)} "
            "(`--keep` leaves a tensor as it is)"
        )
    rows, cols = source.shape
    problem = settings.problem((rows, cols))
    if problem:
        raise RecipeError(f"{source.name}: {problem}")
    for row, col in kept:
        if row >= rows or col >= cols:
            raise RecipeError(f"{source.name}: kept weight ({row}, {col}) lies outside its shape [{rows}, {cols}]")
    expected = packed_bytes(settings, rows, cols) + 12 * len(kept)
    return PlannedTensor(source, kind, settings, kept, expected, peak_memory(source, settings, expected))


def peak_memory(source: TensorSource, settings: Settings, expected: int) -> int:
    """Return the bytes of memory of a job without calibration; expected: bytes of what it writes."""
    scratch = method_named(settings.method).scratch_bytes(settings, source.dtype) * math.prod(source.shape)
    return int(_BASE_BYTES + source.memory + 2 * expected + scratch)


def packed_bytes(settings: Settings, rows: int, cols: int) -> int:
    """Return the bytes of planes and coefficients of a matrix, without listed weights."""
    method = method_named(settings.method)
    if method.nbytes is not None:
        return method.nbytes(settings, rows, cols)
    size = method.size(settings)
    plane_bytes = 8 * size.planes * rows * math.ceil(cols / 64)
    blocks = 1 if settings.block == "matrix" else rows * math.ceil(cols / settings.block_columns(cols))
    return plane_bytes + settings.coefficient_bytes * size.coefficients * blocks
