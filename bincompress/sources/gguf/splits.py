"""How does a byte-level tokenizer split text before merges? By the name in `tokenizer.ggml.pre`.

Sources: transformers, integrations/gguf/gguf_tokenizer_mapping.py; llama.cpp, llama-vocab.cpp (LLAMA_VOCAB_PRE_TYPE_*).
"""

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
_OTHERS = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
_TEKKEN = rf"{_WORDS}|{_CAPITALS}|\p{{N}}{_OTHERS}"
_GPT4O = rf"{_WORDS}{_ENGLISH}?|{_CAPITALS}{_ENGLISH}?|\p{{N}}{{1,3}}{_OTHERS}"

SPLITS = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
         "dbrx", "smaug-bpe"), _LLAMA3,
    ),
    "tekken": _TEKKEN,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
}  # fmt: skip
# Single digits first, then as GPT-2 does (Granite 3 is "refact").
DIGITS = ("refact", "starcoder", "smollm", "command-r", "codeshell", "exaone4")
# As GPT-2 does; so transformers reads "default" too.
GPT2 = ("default", "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de")
