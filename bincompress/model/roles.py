"""What is each tensor to the model: a linear layer to pack, an embedding, an output head, or something to keep?

A registered architecture declares it. For the others it is told by shape (against the vocabulary and the number of
experts that config.json gives, few rows, few columns) and by the parameter names of the common families.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["linear", "embedding", "head", "other"]
FEW = 16  # rows or columns of a matrix that is kept: its error reaches all, and its scales cost as much as it does
SHARE_TO_SHOUT = 0.1

_BESIDE = re.compile(
    r"vision|visual|image|vit\b|audio|speech|video|whisper|clip|siglip|patch|pixel|multi_?modal|mm_|projector|connector"
    r"|aligner|resampler|qformer|perceiver|abstractor|codec|vocoder"
)
_EXPERTS = re.compile(r"expert|moe|block_sparse")
_ROUTER = re.compile(
    r"router|routing|gating|(^|_)gate$|^wg$|^gate_(network|net|layer|linear|fn)$|^(moe|expert|switch|noise|noisy)_gate"
)
_GATE_LINEAR = re.compile(r"^gate_(up_)?proj$|^gate_up$|^up_gate_proj$|^w_gate$|^gate_a_proj$|^gate_b_proj$")
_EMBEDDING = re.compile(
    r"embed|embd|^w[tp]e$|^(tok|token|type|pos)_emb(eddings?)?$|^shared$|^emb$|position(al)?_|^position|^pos_|"
    r"relative_attention_bias|rel_pos|token_type|rotary|^rope|^alibi|^lut$"
)
_HEAD = re.compile(
    r"lm_head|embed_out|^output$|^output_layer$|^(out|v|value|reward|score|q|qa|mc|cls|classification|prediction|ner|mlm)"
    r"_(head|outputs?)s?$|^score$|^scores$|classifier|^summary$|^head$|^heads$|_head$|_heads$|^head_out$|^logits|"
    r"unembed|^cls$|^decoder_head$|medusa|regression|seq_relationship|^final_proj$|^output_projection$"
)
_NORM = re.compile(r"norm|^ln(_|\d|$)|^ln$|_ln$|layer_?norm")
_EXPERT_COUNT = re.compile(r"expert")
_WORDS = ("vocab", "vocabulary")


@dataclass(frozen=True)
class Role:
    """What a tensor is, and where it is not a linear layer, why."""

    kind: Kind
    reason: str = ""  # for a reader: "output head", "router", ...


LINEAR = Role("linear")


class Roles:
    """Tells the roles of one model's tensors."""

    def __init__(self, config: Mapping[str, Any], declared: Mapping[str, Role] | None = None) -> None:
        """config: config.json. declared: roles of the tensors of a registered architecture, which leave no doubt."""
        sizes = {**_sizes(config), **_sizes(_text_part(config))}
        self._declared = declared
        self._vocab = {size for key, size in sizes.items() if any(word in key for word in _WORDS) and size > FEW}
        self._experts = {size for key, size in sizes.items() if _EXPERT_COUNT.search(key) and _is_count(key)}
        self._positions = {size for key, size in sizes.items() if "position" in key and size > FEW}

    def of(self, name: str, shape: tuple[int, ...]) -> Role:
        """Return the role of a tensor."""
        if self._declared is not None and name in self._declared:
            return self._declared[name]
        if len(shape) != 2 or min(shape) < 1:
            experts = _EXPERTS.search(name.lower()) and len(shape) == 3
            return Role("other", "fused experts in one 3-D tensor, which is not packed" if experts else _ranks(shape))
        parts = name.lower().split(".")
        found = self._by_name(parts, shape) or self._by_shape(parts, shape)
        if found is not None:
            return found
        if self._declared is not None:
            return Role("other", "not a part of the decoder that runs")
        if parts[-1] != "weight":
            return Role("other", "a matrix that is not called weight")
        return LINEAR

    def _by_name(self, parts: list[str], shape: tuple[int, ...]) -> Role | None:
        modules = parts[:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts
        if any(_BESIDE.search(module) for module in modules):
            return Role("other", "vision, audio or a projector of theirs")
        if any(_NORM.search(module) for module in modules[-2:]):
            return Role("other", "norm")
        rows, cols = shape
        last = modules[-1]
        inside = any(module.isdecimal() for module in modules)  # of a layer
        gates = [module for module in modules[-2:] if _ROUTER.search(module) and not _GATE_LINEAR.search(module)]
        # A gate with as many rows as columns, or more, is the gate of a feed-forward layer, not a router.
        if gates and (rows < cols or rows in self._experts or any("rout" in gate for gate in gates)):
            return Role("other", "router or gate of experts")
        if inside:
            headed = _HEAD.search(last) and ("head" in last or rows in self._vocab or rows <= FEW)
        else:
            headed = any(_HEAD.search(module) for module in modules)
        if headed or "medusa" in modules[0]:
            return Role("head", "output head or classifier")
        if _EMBEDDING.search(last) or (not inside and any(_EMBEDDING.search(module) for module in modules)):
            return Role("embedding", "embedding")
        return None

    def _by_shape(self, parts: list[str], shape: tuple[int, ...]) -> Role | None:
        rows, cols = shape
        if rows in self._vocab or cols in self._vocab:
            return Role("embedding" if rows in self._vocab else "head", "as many rows or columns as the vocabulary")
        if rows in self._positions and not any(part.isdecimal() for part in parts):
            return Role("embedding", "as many rows as positions")
        if min(rows, cols) <= FEW and self._declared is None:
            return Role("other", f"at most {FEW} rows or columns")
        return None


def _ranks(shape: tuple[int, ...]) -> str:
    if not shape or min(shape) < 1 or len(shape) == 1:
        return "norms, biases and other vectors"
    return f"a {len(shape)}-D tensor; only matrices are packed"


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {key.lower(): value for key, value in config.items() if type(value) is int and value > 0}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config", "decoder"):
        if isinstance(config.get(key), Mapping):
            return dict(config[key])
    return {}


def _is_count(key: str) -> bool:
    return not any(word in key for word in ("size", "dim", "per_tok", "topk", "top_k", "freq", "group", "interval"))


def declared_roles(config: Any) -> dict[str, Role]:
    """Return the roles of a registered architecture's tensors (of a `ModelConfig`), by name."""
    names = config.names
    kept = config.kept_matrices()
    roles = {}
    for name, shape in config.tensors().items():
        if name == names.embedding:
            roles[name] = Role("embedding", "embedding, and output head" if config.tied else "embedding")
        elif name == names.head:
            roles[name] = Role("head", "output head or classifier")
        elif name in kept:
            roles[name] = Role("other", kept[name])
        else:
            roles[name] = LINEAR if len(shape) == 2 else Role("other", _ranks(shape))
    return roles


@dataclass(frozen=True)
class Kept:
    """A tensor of a summary: how many weights it has, and why it is not packed (empty where it is)."""

    name: str
    weights: int
    reason: str


def kept_lines(tensors: Iterable[Kept]) -> list[str]:
    """Return a line for each group of kept tensors, by reason, with its share of the weights, the largest first.

    A first line shouts where more than a tenth of the weights stays unpacked. Numbers in names are written as *.
    """
    everything = list(tensors)
    total = max(1, sum(tensor.weights for tensor in everything))
    groups: dict[tuple[str, str], list[Kept]] = {}
    for tensor in everything:
        if tensor.reason:
            pattern = ".".join("*" if part.isdecimal() else part for part in tensor.name.split("."))
            # Vectors have many names and few weights: one line for all.
            key = "" if tensor.reason == _ranks((1,)) else pattern
            groups.setdefault((tensor.reason, key), []).append(tensor)
    sizes = {group: sum(tensor.weights for tensor in members) for group, members in groups.items()}
    kept = sum(sizes.values())
    lines = []
    if kept > SHARE_TO_SHOUT * total:
        lines.append(
            f"NOTE: {100 * kept / total:.1f}% of the weights stay unpacked ({kept:,} of {total:,}), for these reasons:"
        )
    for (reason, pattern), size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        count = len(groups[reason, pattern])
        what = f"{pattern}: " if pattern else ""
        lines.append(
            f"kept  {100 * size / total:5.1f}%  {what}{reason} ({count} tensor{'s' * (count > 1)}, {size:,} weights)"
        )
    return lines
