"""How much memory does a training need?"""

from bincompress.distillation.settings import HELD_OUT, DistillSettings, LayerSettings
from bincompress.model.config import ModelConfig
from bincompress.process.machine import free_memory

# Bytes a weight: its latent and two moments (float32 each), its gradient, the weight that is multiplied and what it
# comes from.
_TRAINED = 28
_STREAMS = 3 * 4  # bytes a token and column: what a layer reads, and the unquantized stream before and after it
_PROGRAM = 500_000_000  # PyTorch and Numba themselves


def of_layers(config: ModelConfig, settings: LayerSettings) -> int:
    """Return the bytes of training layer after layer: three streams of the text, one layer, the table of tokens."""
    item = _item(settings.dtype)
    streams = of_streams(config, settings)
    table = 2 * item * config.vocab * config.hidden
    layer = _layer_weights(config)
    activations = _activations(config, settings.batch * settings.context, item)
    return _PROGRAM + streams + table + layer * (_TRAINED + 2 * item) + activations


def of_streams(config: ModelConfig, settings: LayerSettings) -> int:
    """Return the bytes of the three residual streams of the text that a layer is trained on."""
    return _STREAMS * (settings.windows + HELD_OUT) * settings.context * config.hidden


def on_disk(streams: int) -> bool:
    """Return whether streams of so many bytes are kept in files on a CPU: where they take half of what is free."""
    return 2 * streams > free_memory()[0]


def of_model(config: ModelConfig, settings: DistillSettings) -> int:
    """Return the bytes of training the whole model: both models' weights, what is trained, one part of a batch."""
    item = _item(settings.dtype)
    layers = config.layers * _layer_weights(config)
    tables = (1 if config.tied else 2) * config.vocab * config.hidden
    tokens = settings.batch // settings.accumulate * settings.context
    # The best state so far is kept beside the present one.
    trained = layers * (_TRAINED + 4)
    return _PROGRAM + 2 * item * (layers + tables) + trained + config.layers * _activations(config, tokens, item)


def _item(dtype: str) -> int:
    return 2 if dtype == "bf16" else 4


def _layer_weights(config: ModelConfig) -> int:
    """Return the weights of the matrices of the largest layer."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    dense, experts = config.inner, config.experts
    rows = dense if experts is None else max(experts.count * experts.inner, 0 if all(experts.layers) else dense)
    return config.hidden * (2 * queries + 2 * keys + 3 * rows)


def _activations(config: ModelConfig, tokens: int, item: int) -> int:
    """Return the bytes that one layer keeps of tokens for its gradient."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    # Each token's experts keep what a dense layer of their summed size would.
    inner = config.inner if config.experts is None else max(config.experts.chosen * config.experts.inner, config.inner)
    in_products = 3 * inner + 3 * queries + 2 * keys + 2 * config.hidden
    in_norms = 8 * config.hidden + 3 * (queries + keys)  # float32
    return tokens * (item * in_products + 4 * in_norms)
