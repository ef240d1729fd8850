"""Where does a source lie: a folder on this machine, or a model on the Hugging Face Hub?"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.sources.checkpoint import ASSETS, INDEX, Checkpoint, open_checkpoint, read_json
from bincompress.sources.shapes import has_only_config, open_shapes
from bincompress.tensors.weight import TensorSource

_HUB_ID = re.compile(r"(?P<id>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[\w.\-/]+))?")
_FILES = [*ASSETS, INDEX, "*.safetensors"]


def open_source(source: str, *, headers_only: bool = False) -> Checkpoint:
    """Return the checkpoint that `source` names: a folder, or a Hub id with an optional @revision (downloaded, cached).

    headers_only: of a Hub model only config.json and the safetensors headers are fetched (its folder then has no
    weights), and of a folder that holds only config.json the tensors are those it describes. Raises CheckpointError
    where there is none or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        if headers_only and has_only_config(Path(source)):
            return open_shapes(Path(source))
        return open_checkpoint(Path(source))
    match = _HUB_ID.fullmatch(source)
    if match is None or Path(source).exists():
        raise CheckpointError(f"{source}: neither a folder nor a Hub id (owner/name or owner/name@revision)")
    return _from_hub(match["id"], match["revision"], headers_only)


def _from_hub(repo: str, revision: str | None, headers_only: bool) -> Checkpoint:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError

    # The HTTP library's own base error: which library it is has changed between versions of the Hub client.
    http_error: Any = HfHubHTTPError.__mro__[1]
    try:
        commit = huggingface_hub.model_info(repo, revision=revision).sha or ""
        if headers_only:
            return _headers_from_hub(repo, commit)
        folder = huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=_FILES)
    except NotASafetensorsRepoError:
        raise CheckpointError(f"{repo}: no safetensors files there; other formats are not read") from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo}: the Hub cannot be reached and the cache lacks it: {_line(error)}") from None
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo}: no such folder here, and the Hub says: {_line(error)}; check the name, or log in "
            "(hf auth login) for gated models"
        ) from None
    except (OSError, http_error) as error:
        raise CheckpointError(
            f"{repo}: no such folder here, and the Hub could not be reached: {_line(error)}"
        ) from None
    return open_checkpoint(Path(folder), repo, commit)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _headers_from_hub(repo: str, commit: str) -> Checkpoint:
    import huggingface_hub

    config = read_json(Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=commit)))
    metadata = huggingface_hub.get_safetensors_metadata(repo, revision=commit)
    tensors: dict[str, TensorSource] = {}
    for file, content in metadata.files_metadata.items():
        for name, info in content.tensors.items():
            begin, end = info.data_offsets
            tensors[name] = TensorSource(name, info.dtype, tuple(info.shape), file, begin, end - begin)
    return Checkpoint(Path(), repo, commit, config, dict(sorted(tensors.items())))


def source_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a store says of its source: id, revision and a fingerprint of config and headers, no paths."""
    import xxhash

    digest = xxhash.xxh3_128(json.dumps(checkpoint.config, sort_keys=True).encode())
    for tensor in checkpoint.tensors.values():
        bare = replace(tensor, file=Path(tensor.file).name)
        digest.update(repr(bare).encode())
    return {"id": checkpoint.name, "revision": checkpoint.revision, "fingerprint": digest.hexdigest()}
