"""What does the fuzzer begin with? Sound inputs of each kind, small, made here."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import DEMO_MODEL, tiny_config, tiny_tensors, tiny_tokenizer, write_model
from tests.fuzz_mutations import Files

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{%- set ns = namespace(found=false, tools='') %}{%- macro show(tool, depth=0) -%}{{ '  ' * depth }}"
    "{{ tool.name | upper }}: {{ tool | tojson(indent=2) }}{%- endmacro %}{%- if tools is defined and tools %}"
    "{%- for tool in tools %}{{ show(tool) }}{%- set ns.found = true %}{%- set ns.tools = ns.tools ~ tool.name %}"
    "{%- endfor %}{{ ns.tools }}{%- endif %}{{ strftime_now('%d %b %Y') }}{%- for m in messages | reverse %}"
    "{%- if m.content is string %}{{ m.content | trim }}{%- else %}{%- for part in m.content %}{{ part.text }}"
    "{%- endfor %}{%- endif %}{%- generation %}{{ m.role }}{%- endgeneration %}{%- if loop.last %}{%- break %}"
    "{%- endif %}{%- endfor %}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
)


def checkpoints(folder: Path) -> list[Files]:
    """Return checkpoints' files: one file of weights, shards, and every dtype beside what the decoder needs."""
    random = np.random.default_rng(0)
    odd = {
        "buffers.flag": np.array(True), "buffers.none": np.empty((0, 4), np.float16),
        "buffers.bytes": random.integers(0, 255, (3, 4)).astype(np.uint8),
        "buffers.f64": random.standard_normal((2, 3)),
    }  # fmt: skip
    made = [
        write_model(folder / "one", tiny_tensors(1, 64, 64), tiny_config(1, 64, 64)),
        write_model(folder / "shards", tiny_tensors(1, 64, 64), tiny_config(1, 64, 64), shards=2),
        write_model(folder / "odd", tiny_tensors(1, 64, 64) | odd, tiny_config(1, 64, 64)),
    ]
    return [files_of(path) for path in made]


def files_of(folder: Path) -> Files:
    """Return a folder's files by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stores(folder: Path) -> list[Files]:
    """Return finished stores: planes of several methods, low rank, an archive, listed weights, 4-bit embeddings."""
    model = write_model(folder / "model", tiny_tensors(1, 64, 128), tiny_config(1, 64, 128))
    kept = {"model.layers.0.mlp.up_proj.weight": ((0, 1), (5, 7))}
    made: list[tuple[dict[str, Any], bool]] = [
        ({"embeddings": "4bit"}, False),
        ({"groups": 4, "block": "row"}, True),
        ({"method": "dbllm"}, False),
        ({"method": "lowrank", "rank": 24}, False),
    ]
    found = []
    for number, (given, archive) in enumerate(made):
        store = folder / f"store{number}"
        plan = make_plan(open_checkpoint(model), load_recipe(None, given), kept if not number else None, archive)
        assert compress(plan, str(store)).complete
        found.append({name: data for name, data in files_of(store).items() if not name.endswith(".lock")})
    return found


def configs() -> list[Files]:
    """Return config.json of all registered architectures and kinds of rope, alone."""
    base = tiny_config(1, 64, 64)
    llama3: dict[str, Any] = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    qwen: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 0, "layer_types": ["sliding_attention"],
    }  # fmt: skip
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "attention_bias": True}
    changes: list[dict[str, Any]] = [{}, {"rope_scaling": llama3}, qwen, mistral, linear]
    return [{"config.json": json.dumps(base | change).encode()} for change in changes]


def tokenizer_files() -> list[Files]:
    """Return tokenizers with the files beside them: of words, of bytes, of pieces, and the demo model's."""
    from tests.test_model_tokenizer import byte_level, sentencepiece

    special = {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    beside: list[dict[str, Any]] = [
        {"generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0}, "added_tokens.json": {"<x>": 400},
         "special_tokens_map.json": {"bos_token": special, "additional_special_tokens": ["<a>"]},
         "tokenizer_config.json": {"eos_token": "</s>", "extra_special_tokens": ["<e>"]}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"0": special, "401": {**special, "content": "<y>"}},
         "bos_token": special, "extra_special_tokens": {"image_token": "<img>"}, "split_special_tokens": False}},
    ]  # fmt: skip
    unigram: dict[str, Any] = {
        **tiny_tokenizer(1), "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                  "vocab": [["<unk>", 0.0], ["\u2581a", -1.0], ["b", -2.0], ["\u2581", -3.0]]},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Strip", "strip_left": True,
                       "strip_right": True}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
    }  # fmt: skip
    kinds = [json.dumps(tiny_tokenizer(96)).encode(), byte_level(), sentencepiece(), json.dumps(unigram).encode()]
    found = [
        {"tokenizer.json": kind, **{name: json.dumps(value).encode() for name, value in more.items()}}
        for kind in kinds
        for more in beside
    ]
    demo = {name: (DEMO_MODEL / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    return [*found, demo]


def templates() -> list[Files]:
    """Return files with chat templates: in a file of their own, in tokenizer_config.json as text and as a list."""
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    named = [{"name": "default", "template": LLAMA2}, {"name": "tool_use", "template": TOOLS}]
    return [
        *({"chat_template.jinja": text.encode(), "tokenizer_config.json": json.dumps(tokens).encode()}
          for text in (CHATML, LLAMA2, TOOLS)),
        {"tokenizer_config.json": json.dumps({**tokens, "chat_template": CHATML}).encode()},
        {"tokenizer_config.json": json.dumps({**tokens, "chat_template": named}).encode()},
        {"chat_template.jinja": LLAMA2.encode(), "additional_chat_templates/tool_use.jinja": TOOLS.encode()},
    ]  # fmt: skip


# What may stand in such files somewhere: parts of tokenizers that the library knows.
TOKENIZER_PARTS: tuple[Any, ...] = (
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Prepend", "prepend": ""},
    {"type": "NFKC"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
    {"Regex": "(a|a)*(a|a)*(a|a)*$"},
    {"Regex": "("},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
    {"Regex": ""},
    {"String": ""},
    {"Regex": "(?=a)*"},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithPrevious", "invert": True},
    {"type": "Metaspace", "replacement": "__", "prepend_scheme": "always"},
    {"type": "ByteLevel", "add_prefix_space": True},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1 << 40, "stop": 1 << 40},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}] * 50},
    {"type": "FixedLength", "length": 0},
    {"type": "FixedLength", "length": 1 << 40},
    {"type": "Digits"},
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {
        "type": "RobertaProcessing",
        "sep": ["</s>", 2],
        "cls": ["<s>", 0],
        "trim_offsets": True,
        "add_prefix_space": True,
    },
    {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": 2.0, "unk_token": "z"},
    {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]},
    {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "z"},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True, "unk_token": "z", "fuse_unk": True},
    {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]},
    {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]},
    {"type": "Unigram", "unk_id": 0, "vocab": []},
    {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", 1e308]]},
    {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "zz"},
    {
        "type": "WordPiece",
        "vocab": {"a": 0},
        "unk_token": "zz",
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 0,
    },
    {
        "id": 4294967295,
        "content": "",
        "special": True,
        "single_word": False,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
    },
    {
        "id": 0,
        "content": "a",
        "special": False,
        "single_word": True,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
    },
    {"max_length": 0, "strategy": "LongestFirst", "stride": 1 << 40, "direction": "Right"},
    {
        "strategy": {"Fixed": 1 << 40},
        "direction": "Left",
        "pad_to_multiple_of": 0,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    },
)
