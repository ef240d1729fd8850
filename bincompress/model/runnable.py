"""Will a store of this checkpoint run here? Told from headers, config.json and tokenizer.json, before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bincompress.errors import BincompressError, CheckpointError, RecipeError
from bincompress.model.checkpoint_source import checkpoint_config, refuse_dtype
from bincompress.model.config import ModelConfig
from bincompress.model.generation_fields import not_obeyed
from bincompress.model.roles import Roles, declared_roles
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import ITEM_BYTES, Checkpoint
from bincompress.sources.multimodal import is_multimodal

_QUANTIZED = {  # how tensors of a quantized checkpoint end, and what made them
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    "_blocks": "MXFP4",
    ".qzeros": "GPTQ or AWQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".W_q": "HQQ",
}
_SHAPES = {  # of Llama and its kin, for architectures that are not registered
    "embed_tokens.weight": ("vocab_size", "hidden_size"),
    "self_attn.q_proj.weight": ("heads", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "heads"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}

# What may stand before the names of a language model by itself. Source: transformers 5, from_pretrained.
_PREFIXES_OF_TRANSFORMERS = ("", "model.", "model.model.")


@dataclass(frozen=True)
class Verdict:
    """Whether the store will run here, why not, and what a user should know of how the model is read."""

    faults: tuple[str, ...]
    notes: tuple[str, ...]
    config: ModelConfig | None  # None where config.json is not one that runs

    @property
    def runs(self) -> bool:
        """Whether nothing stands against it."""
        return not self.faults

    def line(self) -> str:
        """Return the verdict as one line."""
        if self.runs:
            return "this store will run here"
        return f"will compress and export, but not run here: {'; '.join(self.faults)}"

    def require(self, export_only: bool) -> None:
        """Raise RecipeError where the store would not run and is not meant for export alone."""
        if not self.runs and not export_only:
            raise RecipeError(f"{self.line()}; --export-only compresses it all the same")


def verdict(checkpoint: Checkpoint) -> Verdict:
    """Return what stands against running a store of this checkpoint.

    Raises CheckpointError where it cannot be compressed either: it is quantized already, the decoder needs a tensor of
    a dtype that is not read, or shapes contradict config.json.
    """
    refuse_quantized(checkpoint)
    faults: list[str] = []
    config = None
    try:
        config = checkpoint_config(checkpoint)
    except BincompressError as error:
        faults.append(str(error))
    if config is None:
        _check_known_shapes(checkpoint)
    else:
        faults += _decoder_faults(checkpoint, config)
    notes = [*checkpoint.notes, *(config.notes if config else ()), *(_of_names(checkpoint, config) if config else ())]
    if Path(next(iter(checkpoint.tensors.values())).file).is_file():  # else a plan of headers alone
        faults += _text_faults(checkpoint)
        notes += () if faults else (*not_obeyed(checkpoint.assets()), *_of_answers(checkpoint.assets()))
    return Verdict(tuple(faults), tuple(notes), config)


def roles_of(checkpoint: Checkpoint) -> Roles:
    """Return what tells the roles of a checkpoint's tensors: the registered architecture, where it is one."""
    try:
        config = checkpoint_config(checkpoint)
    except BincompressError:
        return Roles(checkpoint.config)
    return Roles(checkpoint.config, declared_roles(config))


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where tensors are those of a checkpoint quantized in a way that is not read."""
    declared = checkpoint.config.get("quantization_config")
    method = str(declared.get("quant_method", "")) if isinstance(declared, dict) else ""
    for name, tensor in checkpoint.tensors.items():
        made_by = next((maker for end, maker in _QUANTIZED.items() if name.endswith(end)), "")
        if made_by in ("MXFP4", "FP8 or compressed-tensors") and not method and tensor.dtype in ITEM_BYTES:
            made_by = ""
        if tensor.dtype.startswith(("F8_", "F4", "F6_")) and len(tensor.shape) == 2:
            made_by = made_by or "FP8"
        integers = tensor.dtype in ("U8", "I8", "I32") and len(tensor.shape) == 2 and name.endswith(".weight")
        if made_by or integers:
            by = f"{method}, as config.json says" if method else made_by or f"its weights are {tensor.dtype}"
            # What is read has been taken for what it stands for when the checkpoint was opened.
            read = "" if method else "without quantization_config in config.json its numbers cannot be understood; "
            raise CheckpointError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}: the checkpoint is quantized already ({by}); {read}"
                "give the unquantized model it was made from, or dequantize it first (transformers: "
                "model.dequantize(), then save_pretrained)"
            )


def _decoder_faults(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """Return what the decoder lacks; raises CheckpointError for shapes and dtypes that cannot be."""
    missing = []
    for name, shape in sorted(config.tensors().items()):
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            missing.append(name)
        elif tensor.shape != shape:
            raise CheckpointError(_contradiction(name, tensor.shape, shape))
        else:
            refuse_dtype(tensor)
    if not missing:
        return []
    more = f" and {len(missing) - 1} more tensors are" if len(missing) > 1 else " is"
    why = ""
    if missing == [config.names.head]:
        why = " (an output head; add it, or tie_word_embeddings to config.json if the model has none)"
    return [f"{missing[0]}{more} missing; config.json asks for it{why}"]


def _check_known_shapes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where matrices of an architecture that is not registered contradict its config.json."""
    sizes: dict[str, Any] = {key: value for key, value in checkpoint.config.items() if type(value) is int}
    if sizes.get("num_attention_heads") and sizes.get("head_dim"):
        sizes["heads"] = sizes["num_attention_heads"] * sizes["head_dim"]
    for tensor in checkpoint.tensors.values():
        for suffix, keys in _SHAPES.items():
            if not tensor.name.endswith("." + suffix) or not all(key in sizes for key in keys):
                continue
            expected = tuple(sizes[key] for key in keys)
            if tensor.shape != expected:
                raise CheckpointError(_contradiction(tensor.name, tensor.shape, expected))


def _contradiction(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{name}: shape {list(found)} contradicts config.json, which gives {list(expected)}; are the weights and "
        "config.json of one model?"
    )


def _text_faults(checkpoint: Checkpoint) -> list[str]:
    """Return what stands against reading and writing text."""
    assets = checkpoint.assets()
    if "tokenizer.json" not in assets:
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if name in assets]
        made = f" (it can be made of {others[0]}: transformers' AutoTokenizer, then save_pretrained)" if others else ""
        return [f"{checkpoint.folder}: has no tokenizer.json{made}"]
    try:
        load_tokenizer(assets)
    except BincompressError as error:
        return [str(error)]
    return []


def _of_names(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """Return that transformers would not find the decoder's tensors, in the checkpoint as in an export, if so."""
    prefix = config.names.layer.split("layers.")[0]
    if prefix in _PREFIXES_OF_TRANSFORMERS or is_multimodal(checkpoint.config):
        return []
    return [
        f"names of tensors begin with {prefix!r}: read here as {config.architecture}, but transformers reads them as "
        f"missing and fills in random weights, also from an export; rename them to 'model.' for it"
    ]


def _of_answers(assets: Mapping[str, bytes]) -> list[str]:
    """Return what generating and chatting will refuse, each by itself, while the store runs."""
    from bincompress.inference.chat import load_template
    from bincompress.inference.load import default_sampling

    notes = []
    try:
        default_sampling(assets)
    except BincompressError as error:
        notes.append(f"{error}; text is generated only where an option gives this value")
    try:
        template = load_template(assets)
        if template is not None:
            for tools in (False, True):
                template.takes("messages", tools)
    except BincompressError as error:
        notes.append(f"{error}; chat will refuse it")
    return notes
