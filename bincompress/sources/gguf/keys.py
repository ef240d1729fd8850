"""Which key of a GGUF file holds which field of config.json? Read in `config`, and written by an export."""

# Keys of every architecture by the fields of config.json; a writer of GGUF files uses these, too.
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
EPSILON = "attention.layer_norm_rms_epsilon"
THETA, LOCAL_THETA, ROTATED = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"
SCALING, FACTOR, ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
VALUE_LENGTH, LOGIT_CAP = "attention.value_length", "final_logit_softcapping"
MULTIPLIERS = {  # of Granite
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
