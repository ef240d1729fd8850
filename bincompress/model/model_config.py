"""The record of a model: its shape, its parts, and the names and shapes of the tensors that the decoder reads."""

from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field

from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.declaration import Activation, Architecture, Names, QkNorm
from bincompress.model.expert_fields import Experts
from bincompress.model.positions import Window
from bincompress.model.recurrence_fields import Recurrent
from bincompress.model.rope import Rope


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and options."""

    architecture: str
    vocab: int
    hidden: int
    inner: int  # rows of the gate of the dense layers, or of the experts where there are none
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    context: int
    ropes: tuple[Rope, ...]  # per layer
    windows: tuple[Window, ...]  # per layer
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = ""
    norm_offset: float = 0.0  # what is added to every stored weight of a norm
    activation: Activation = "silu"
    sinks: bool = False  # whether each head has a score that takes part in the softmax and has no value
    rotates_in_pairs: bool = False  # each item of a head with its neighbour
    query_scale: float | None = None  # of queries before their product with keys; None: 1 / sqrt(head_dim)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and the MLP add to the stream
    logit_divisor: float = 1.0
    rounds_inputs: bool = False  # of the layers' matrices: to 8 bits a token, as BitNet is trained with
    experts: Experts | None = None
    recurrent: Recurrent | None = None  # the layers that have a state in place of attention
    gated: bool = False  # whether what attention gives is gated, by rows that lie with those of the queries
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    names: Names = dataclass_field(default_factory=Names)  # as this model's tensors are called
    notes: tuple[str, ...] = dataclass_field(default=(), compare=False)  # what a user should know of how it is read

    @property
    def declaration(self) -> Architecture:
        """The architecture's entry in the registry, with this model's names of tensors."""
        return replace(ARCHITECTURES[self.architecture], names=self.names)

    @property
    def rope(self) -> Rope:
        """The rotary embedding of the first layer."""
        return self.ropes[0]

    @property
    def context_limit(self) -> str:
        """Return, in words, what limits the context."""
        kind = next((rope.kind for rope in self.ropes if rope.most_positions == self.context), None)
        return "this model's limit" if kind is None else f"rope type {kind!r} is not supported beyond that"

    def of_layer(self, layer: int) -> "ModelConfig":
        """Return the config of a model that has this layer alone."""
        experts = self.experts and replace(self.experts, layers=(self.experts.layers[layer],))
        recurrent = self.recurrent and replace(self.recurrent, layers=(self.recurrent.layers[layer],))
        return replace(
            self, layers=1, ropes=(self.ropes[layer],), windows=(self.windows[layer],), experts=experts,
            recurrent=recurrent,
        )  # fmt: skip

    def is_recurrent(self, layer: int) -> bool:
        """Return whether a layer's tokens read a state, in place of attention."""
        return self.recurrent is not None and self.recurrent.layers[layer]

    @property
    def has_recurrent_biases(self) -> bool:
        """Whether the matrices of layers without attention have biases."""
        return self.recurrent is not None and self.recurrent.biased

    def has_gates(self, layer: int) -> bool:
        """Return whether small matrices that say what a state learns and forgets read a layer's input."""
        return self.is_recurrent(layer) and self.names.recurrent is not None and bool(self.names.recurrent.gates)

    def mixing_of(self, layer: int) -> tuple[tuple[str, ...], str]:
        """Return the names within a layer of the matrices that read its input, and of that which reads what they mix.

        Queries, keys and values are those of a layer of attention.
        """
        if self.is_recurrent(layer) and self.names.recurrent is not None:
            return self.names.recurrent.read, self.names.recurrent.out
        return self.names.qkv, self.names.out

    def experts_of(self, layer: int) -> Experts | None:
        """Return the mixture of experts that a layer has in place of a dense MLP, if it has one."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None

    def inputs_of_layer(self, layer: int) -> dict[str, list[str]]:
        """Return a layer's distinct inputs in their order, by the first matrix that reads each: its readers."""
        return {key: readers for stage in self.stages_of_layer(layer) for key, readers in stage.items()}

    def stages_of_layer(self, layer: int) -> list[dict[str, list[str]]]:
        """Return `inputs_of_layer` in the four steps of a layer: of qkv, out, gate and up, and down.

        Each expert has inputs of its own in the last two: those of the tokens that chose it.
        """
        names, experts = self.names, self.experts_of(layer)
        read, written = self.mixing_of(layer)
        qkv, out = ([names.of_layer(layer, f"{part}.weight") for part in group] for group in (read, (written,)))
        if experts is None:
            mlp = [
                [[names.of_layer(layer, f"{part}.weight") for part in group]]
                for group in (names.gate_up, (names.down,))
            ]
        else:
            found = [names.of_expert(layer, expert) for expert in range(experts.count)]
            mlp = [[list(gate_up) for gate_up, _ in found], [[down] for _, down in found]]
            if experts.shared:
                gate_up, down = names.of_shared(layer)
                mlp[0].append(list(gate_up))
                mlp[1].append([down])
        return [{group[0]: group for group in stage} for stage in ([qkv], [out], *mlp)]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that the decoder reads."""
        names = self.names
        shapes: dict[str, tuple[int, ...]] = {names.embedding: (self.vocab, self.hidden)}
        for layer in range(self.layers):
            parts: dict[str, tuple[int, ...]] = {}
            for norm in (names.input_norm, names.post_norm, names.out_norm, names.down_norm):
                if norm:
                    parts[norm] = (self.hidden,)
            experts, attends = self.experts_of(layer), not self.is_recurrent(layer)
            if names.mixed_norm and attends:
                parts[names.mixed_norm] = (self.heads * self.head_dim,)
            if names.inner_norm and experts is None:
                parts[names.inner_norm] = (self.inner,)
            parts |= self._attention_vectors() if attends else {}
            shapes |= {names.of_layer(layer, part): shape for part, shape in parts.items()}
            if experts is not None:
                shapes |= self._expert_tensors(experts, layer)
            parts = self._attention_matrices() if attends else self._recurrent_tensors()
            parts |= self._dense_matrices() if experts is None else {}
            shapes |= {names.of_layer(layer, part): shape for part, shape in parts.items()}
        shapes[names.norm] = (self.hidden,)
        if not self.tied:
            shapes[names.head] = (self.vocab, self.hidden)
        return shapes

    def _attention_vectors(self) -> dict[str, tuple[int, ...]]:
        names = self.names
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.qk_norm:
            whole = self.qk_norm == "whole"
            shapes[names.q_norm] = (queries if whole else self.head_dim,)
            shapes[names.k_norm] = (keys if whole else self.head_dim,)
        if self.sinks:
            shapes[names.sinks] = (self.heads,)
        return shapes

    def _attention_matrices(self) -> dict[str, tuple[int, ...]]:
        names, (q, k, v) = self.names, self.names.qkv
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        read = 2 * queries if self.gated else queries
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in ((q, read), (k, keys), (v, keys)):
            shapes |= _matrix(part, rows, self.hidden, self.qkv_bias)
        return shapes | _matrix(names.out, self.hidden, queries, self.out_bias)

    def _dense_matrices(self) -> dict[str, tuple[int, ...]]:
        names, (gate, up) = self.names, self.names.gate_up
        shapes: dict[str, tuple[int, ...]] = {}
        for part in (gate, up):
            shapes |= _matrix(part, self.inner, self.hidden, self.mlp_bias)
        return shapes | _matrix(names.down, self.hidden, self.inner, self.mlp_bias)

    def _recurrent_tensors(self) -> dict[str, tuple[int, ...]]:
        sizes, names = self.recurrent, self.names.recurrent
        if sizes is None or names is None:
            return {}
        shapes: dict[str, tuple[int, ...]] = {f"{names.convolution}.weight": (sizes.channels, 1, sizes.width)}
        if sizes.biased:
            shapes[f"{names.convolution}.bias"] = (sizes.channels,)
        rows = (sizes.rows,) if len(names.read) == 1 else (sizes.channels, sizes.out)
        for part, height in zip(names.read, rows, strict=True):
            shapes |= _matrix(part, height, self.hidden, sizes.biased)
        for part in names.gates:
            shapes |= _matrix(part, 2 * sizes.heads // len(names.gates), self.hidden, False)
        if sizes.kind == "delta":
            shapes |= {names.rates: (sizes.heads,), names.offsets: (sizes.heads,), names.norm: (sizes.value_dim,)}
        return shapes | _matrix(names.out, self.hidden, sizes.out, sizes.biased)

    def _expert_tensors(self, experts: Experts, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {self.router_of(layer): (experts.count, self.hidden)}
        if experts.has_offsets:
            shapes[self.names.of_layer(layer, self.names.router_offset)] = (experts.count,)
        if experts.biased:
            first, second = self.expert_biases_of(layer)
            shapes |= {self.router_of(layer, "bias"): (experts.count,)}
            shapes |= {first: (experts.count, 2 * experts.inner), second: (experts.count, self.hidden)}
        for expert in range(experts.count):
            (gate, up), down = self.names.of_expert(layer, expert)
            shapes |= {gate: (experts.inner, self.hidden), up: (experts.inner, self.hidden)}
            shapes[down] = (self.hidden, experts.inner)
        if experts.shared:
            (gate, up), down = self.names.of_shared(layer)
            shapes |= {gate: (experts.shared, self.hidden), up: (experts.shared, self.hidden)}
            shapes[down] = (self.hidden, experts.shared)
            if self.names.shared_gate:
                shapes[self.shared_gate_of(layer)] = (1, self.hidden)
        return shapes

    def shared_gate_of(self, layer: int) -> str:
        """Return the name of the row that says how much of a layer's shared expert a token gets."""
        return self.names.of_layer(layer, f"{self.names.shared_gate}.weight")

    def router_of(self, layer: int, part: str = "weight") -> str:
        """Return the name of the matrix that chooses a layer's experts, or of its bias."""
        return self.names.of_layer(layer, f"{self.names.router}.{part}")

    def expert_biases_of(self, layer: int) -> tuple[str, str]:
        """Return the names of the biases of all experts of a layer: of gate and up in turns, and of down."""
        first, second = self.names.expert_biases
        return self.names.of_layer(layer, first), self.names.of_layer(layer, second)

    def kept_matrices(self) -> dict[str, str]:
        """Return the tensors of two axes that are no linear layers and stay as they are, each with the reason."""
        found = {}
        for layer in range(self.layers):
            experts = self.experts_of(layer)
            if experts is not None:
                found[self.router_of(layer)] = "router of experts, which decides what runs"
                if experts.biased:
                    found |= dict.fromkeys(self.expert_biases_of(layer), "biases of experts")
                if experts.shared and self.names.shared_gate:
                    found[self.shared_gate_of(layer)] = "gate of the shared expert"
            gates = self.names.recurrent.gates if self.names.recurrent is not None else ()
            for part in gates if self.has_gates(layer) else ():
                found[self.names.of_layer(layer, f"{part}.weight")] = "gates of a state: what it learns and forgets"
        return found


def _matrix(part: str, rows: int, cols: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a matrix and of its bias, if it has one."""
    return {f"{part}.weight": (rows, cols), **({f"{part}.bias": (rows,)} if bias else {})}
