"""Which small files beside the weights come along: all that a loader may want, and never code."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from bincompress.errors import CheckpointError

# Names and patterns, as glob and the Hub client take them.
ASSETS = (
    "config.json",
    "generation_config.json",
    # Tokenizers of every kind that transformers, llama.cpp, vLLM or mistral-common read
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v*",
    "*.spm",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "target.spm",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "normalizer.json",
    "bpe.codes",
    "entity_vocab.json",
    # Templates and processors
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
    # Of sentence-embedding models
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
)
_FILE_LIMIT = 256 << 20  # bytes of one
_ALL_LIMIT = 512 << 20
_MOST = 256  # files
_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}/)?[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


def read_assets(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint folder that ASSETS names, by their paths in it.

    Raises CheckpointError where one is too large, or there are too many.
    """
    found: dict[str, bytes] = {}
    total = 0
    for name in asset_names(folder):
        path = folder / name
        size = path.stat().st_size
        total += size
        if size > _FILE_LIMIT or total > _ALL_LIMIT or len(found) == _MOST:
            raise CheckpointError(
                f"{path}: {size:,} bytes, {total:,} with the small files before it; expected at most {_FILE_LIMIT:,} "
                f"bytes a file, {_ALL_LIMIT:,} and {_MOST} files in all"
            )
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: not readable: {error.strerror or error}") from None
    return found


def asset_names(folder: Path) -> list[str]:
    """Return the paths in a folder of the files that ASSETS names."""
    paths = (path for pattern in ASSETS for path in sorted(folder.glob(pattern)) if path.is_file())
    return [name for name in dict.fromkeys(path.relative_to(folder).as_posix() for path in paths) if is_plain(name)]


def is_asset(name: str) -> bool:
    """Return whether ASSETS names this path, of a listing of files that are not here."""
    same_depth = (pattern for pattern in ASSETS if pattern.count("/") == name.count("/"))
    return is_plain(name) and any(fnmatchcase(name, pattern) for pattern in same_depth)


def is_plain(name: str) -> bool:
    """Return whether a path may be a small file's: a plain name, in a folder of one level at most."""
    return _PATH.fullmatch(name) is not None
