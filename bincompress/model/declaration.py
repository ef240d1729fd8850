"""What a declaration of an architecture says: names of tensors, parts, and the defaults of absent fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Which layers see a window of positions: where layer_types does not say, every layer (always, or if
# use_sliding_window), those from max_window_layers on (if use_sliding_window), all but every so many-th (`pattern`), or
# those without rotary embedding (if use_sliding_window).
Windows = Literal["never", "every layer", "every layer if used", "by layer_types", "by pattern", "without rope"]
BiasRule = Literal["never", "always", "attention_bias", "attention_out_bias", "qkv_bias"]
# By what experts are chosen, and what their weights are: the softmax over all, logits and the softmax over the chosen
# ones alone, or the sigmoid of each.
Choice = Literal["softmax", "logits", "sigmoid"]
QkNorm = Literal["", "head", "whole"]  # queries and keys are not normalized, or each head is, or all heads at once
Activation = Literal["silu", "gelu_tanh", "relu2"]

# What config.json calls the activations of the gate.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class RecurrentNames:
    """Names of a layer whose tokens read a state in place of the tokens before them; those that it lacks are empty."""

    read: tuple[str, ...]  # matrices that read the layer's input
    out: str
    convolution: str
    gates: tuple[str, ...] = ()  # small matrices of learning and forgetting, which read the layer's input too
    norm: str = ""
    rates: str = ""  # logarithms of how fast the heads forget
    offsets: str = ""


@dataclass(frozen=True)
class Recurrence:
    """Which layers of an architecture read a state, and how."""

    kind: Literal["delta", "convolution"]
    layer_type: str  # as layer_types calls them
    listed: str = ""  # where layer_types is absent: a field with the layers of attention; absent too, all are
    interval: str = ""  # or a field: every so many-th layer has attention, every fourth where it is absent
    in_turns: bool = False  # whether the rows of queries, keys, values and gates take turns by head of keys


@dataclass(frozen=True)
class Names:
    """Tensor names; those of a layer are completed with its number. A norm that an architecture lacks is empty."""

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"  # before attention
    post_norm: str = "post_attention_layernorm.weight"  # before the MLP
    out_norm: str = ""  # of what attention gives, before it is added to the stream
    down_norm: str = ""  # of what the MLP gives, before it is added to the stream
    mixed_norm: str = ""  # of what attention mixes, before the matrix that reads it
    inner_norm: str = ""  # of the gated values, before the matrix that reads them
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"  # of a mixture of experts; an expert's matrices are completed with its number
    expert_gate_up: tuple[str, str] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"
    router_offset: str = ""  # what is added to what experts are chosen by
    expert_biases: tuple[str, str] = ("", "")  # of all experts of a layer: of gate and up in turns, and of down
    shared_gate_up: tuple[str, str] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"  # empty where all of the shared expert is each token's
    sinks: str = ""  # scores of heads that take part in the softmax and have no value
    recurrent: "RecurrentNames | None" = None  # of the layers whose tokens read a state

    def of_layer(self, layer: int, part: str) -> str:
        """Return the full name of a layer's tensor."""
        return self.layer.format(layer=layer) + part

    def of_shared(self, layer: int) -> tuple[tuple[str, str], str]:
        """Return the full names of the gate and up matrices of a layer's shared expert, and of its down matrix."""
        gate, up = (self.of_layer(layer, f"{part}.weight") for part in self.shared_gate_up)
        return (gate, up), self.of_layer(layer, f"{self.shared_down}.weight")

    def of_expert(self, layer: int, expert: int) -> tuple[tuple[str, str], str]:
        """Return the full names of an expert's gate and up matrices, and of its down matrix."""
        gate, up = (self.of_layer(layer, f"{part.format(expert=expert)}.weight") for part in self.expert_gate_up)
        return (gate, up), self.of_layer(layer, f"{self.expert_down.format(expert=expert)}.weight")


@dataclass(frozen=True)
class BiasFields:
    """Which matrices of attention and of the dense MLP have biases: none, all, or as a field of config.json says."""

    qkv: BiasRule = "never"
    out: BiasRule = "never"
    mlp: bool = False  # whether the field mlp_bias is obeyed
    default: bool = False  # a field where absent; attention_out_bias and mlp_bias are false then


ATTENTION_BIASES = BiasFields("attention_bias", "attention_bias")
ALL_BIASES = BiasFields("attention_bias", "attention_bias", mlp=True)


@dataclass(frozen=True)
class Mixture:
    """How an architecture's layers choose among experts."""

    count: int  # num_experts or num_local_experts, where absent
    chosen: int  # num_experts_per_tok where absent
    inner_field: str  # which field has the rows of an expert's gate
    inner: int  # that field where absent
    normalized: bool | None = None  # whether the chosen weights sum to one; None: as norm_topk_prob says
    sums_to_one: bool = False  # norm_topk_prob where absent
    choice: Choice = "softmax"
    added: float = 1e-6  # to the sum of the chosen sigmoids before they are divided by it
    offset_field: str = ""  # whether a number of each expert is added to what it is chosen by; true where absent
    dense_field: str = ""  # how many layers, from the first on, have a dense MLP
    dense_default: int = 0  # where absent
    biased: bool = False  # whether router and experts have biases
    clamp: tuple[float, float] | None = None  # of a clamped gate: swiglu_alpha and swiglu_limit where absent
    shared: int = 0  # rows of an expert that is each token's, shared_expert_intermediate_size where absent; 0: none
    shared_count_field: str = ""  # or a field: as many times the rows of another expert's gate, once where absent
    count_fields: tuple[str, ...] = ("num_experts", "num_local_experts")  # names of the number of experts
    dense_layers: bool = False  # whether mlp_only_layers and decoder_sparse_step give some layers a dense MLP


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from the others."""

    model_type: str
    context: int  # max_position_embeddings where config.json does not say
    kv_heads: int | None = None  # num_key_value_heads where absent; None: as many as heads
    head_dim: int | None = None  # head_dim where absent; None: hidden_size / num_attention_heads
    epsilon: float = 1e-6  # rms_norm_eps where absent
    tied: bool = False  # tie_word_embeddings where absent
    tied_field: str = ""  # a field that comes before it
    adjusted_inner: bool = False  # whether the fields that begin with block_ may give a dense layer other rows
    inner_field: str = "intermediate_size"  # which field has the rows of a dense layer's gate
    biases: BiasFields = BiasFields()
    norm_offset: float = 0.0  # what is added to every stored weight of a norm
    qk_norm: QkNorm = ""
    qk_norm_field: str = ""  # a field without whose value true there is no such norm
    activation: str = "silu"  # of the gate, where absent
    activation_field: str = "hidden_act"
    activation_names: Mapping[str, str] = field(default_factory=dict)  # activations by other names
    embedding_scaled: bool = False  # by the square root of hidden_size
    rope_theta: float = 10000.0  # where absent
    original_context: int | None = None  # where absent, before what rope_scaling says; None: that, or the context
    rope_names: Mapping[str, str] = field(default_factory=dict)  # kinds of rope by other names
    rope: Mapping[str, object] = field(default_factory=dict)  # rope_parameters where absent
    rope_in_windows: bool = False  # whether layers without a window have none, if sliding_window says that some have
    rotates_in_pairs: bool = False  # each item with its neighbour, in place of the one half the rotated ones further
    rope_switch: str = ""  # a field without whose value "rope" no layer has a rotary embedding
    query_growth: str = ""  # a field of rope_parameters by which queries grow from one original context to the next
    local_rope_theta: float | None = None  # of layers with a window, where they have a rotary embedding of their own
    local_rope_field: str = ""  # which field may say another
    windows: Windows = "never"
    window: int | None = 4096  # sliding_window where absent
    pattern: int = 0  # with windows "by pattern": every so many-th layer has none
    pattern_field: str = ""  # which field may say another
    without_layer_types: str = ""  # why nothing runs where layer_types is absent; empty where the rules above apply
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # fields with the values that are supported
    reads: tuple[str, ...] = ()  # fields of UNHANDLED that are obeyed
    names: Names = Names()
    recurrence: Recurrence | None = None
    gated: bool = False  # whether what attention gives is gated, by rows that lie with those of the queries
    rope_share: float = 1.0  # partial_rotary_factor where absent
    rope_items_field: str = ""  # which field may say how many items of a head are rotated, in its place
    epsilon_field: str = "rms_norm_eps"
    other_names: tuple[Names, ...] = ()  # that checkpoints of another form have
    other_classes: tuple[str, ...] = ()  # that config.json may name beside model_type, as transformers writes it
    mixture: Mixture | None = None
