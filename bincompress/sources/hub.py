"""Where does a source lie: a folder on this machine, or a model on the Hugging Face Hub?"""

import errno
import json
import re
from pathlib import Path
from typing import Any

from bincompress.errors import BincompressError, CheckpointError
from bincompress.process.faults import explain
from bincompress.sources.assets import is_asset
from bincompress.sources.checkpoint import INDEX, Checkpoint, checkpoint_of, open_checkpoint, read_json
from bincompress.sources.gguf.opening import is_gguf, open_gguf
from bincompress.sources.hub_client import ANSWER_SECONDS, asked, check_sums, in_cache
from bincompress.sources.shapes import has_only_config, open_shapes
from bincompress.tensors.weight import TensorSource

_HUB_ID = re.compile(r"(?P<id>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[\w.\-/]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_A_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENOENT)


def open_source(source: str, *, headers_only: bool = False) -> Checkpoint:
    """Return the checkpoint that `source` names: a folder, a GGUF file, or a Hub id.

    A Hub id may have an @revision; the model is downloaded into the cache.

    headers_only: of a Hub model only config.json and the safetensors headers are fetched (its folder then has no
    weights), and of a folder that holds only config.json the tensors are those it describes. Raises CheckpointError
    where there is none or the Hub cannot be reached.
    """
    if is_gguf(Path(source)):
        return open_gguf(Path(source))
    if Path(source).is_dir():
        if headers_only and has_only_config(Path(source)):
            return open_shapes(Path(source))
        return open_checkpoint(Path(source))
    match = _HUB_ID.fullmatch(source)
    if source.endswith(".zip") and Path(source).is_file():
        raise CheckpointError(f"{source}: a packed store, not a checkpoint; give the checkpoint that it was made from")
    if match is None or Path(source).exists():
        raise CheckpointError(
            f"{source}: neither a folder nor a Hub id (owner/name or owner/name@revision), nor a .gguf file"
        )
    return _from_hub(match["id"], match["revision"], headers_only)


def is_checkpoint(place: str | Path) -> bool:
    """Return whether a place here is a checkpoint's folder or a GGUF file, and no store."""
    return (Path(place) / "config.json").is_file() or is_gguf(Path(place))


def parts_of(name: str) -> tuple[str | None, str | None]:
    """Return the repository and the revision of a Hub id; None and None where it is none."""
    match = _HUB_ID.fullmatch(name)
    if match is None or {".", ".."} & set(match["id"].split("/")):
        return None, None
    return match["id"], match["revision"]


def _from_hub(repo: str, revision: str | None, headers_only: bool) -> Checkpoint:
    """Return a model of the Hub: as it is there now, or where the Hub does not answer, as it lies in the cache."""
    huggingface_hub = asked(ANSWER_SECONDS)
    if revision is not None and COMMIT.fullmatch(revision) and not headers_only:
        cached = _from_cache(repo, revision)  # what a commit names never changes
        if cached is not None:
            return cached
    try:
        info = huggingface_hub.model_info(repo, revision=revision, timeout=ANSWER_SECONDS)
        if headers_only:
            return _headers_from_hub(repo, info.sha or "")
        names = {file.rfilename for file in info.siblings or []}
        wanted = [name for name in sorted(names) if is_asset(name)] + _weights(repo, info.sha or "", names)
        there = in_cache(repo, wanted, info.sha or "")
        # By the name of the branch, which the cache remembers for a day without the Hub.
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=[_literal(n) for n in wanted]
        )
        check_sums(repo, Path(folder), (name for name in wanted if name not in there))
        return open_checkpoint(Path(folder), repo, Path(folder).name)
    except BincompressError:
        raise
    except Exception as error:  # of the client and of whatever library it speaks HTTP with
        cached = None if _refused(error) else _from_cache(repo, revision)
        if cached is not None:
            return cached
        raise CheckpointError(f"{repo}: {reason(error)}") from None


def _weights(repo: str, commit: str, names: set[str]) -> list[str]:
    """Return the files that hold the weights: those of the index, or model.safetensors; never a second set."""
    import huggingface_hub

    if "model.safetensors" in names:  # which comes before an index, in transformers and in `sources.files`
        return ["model.safetensors"]
    if INDEX in names:
        index = read_json(Path(huggingface_hub.hf_hub_download(repo, INDEX, revision=commit)))
        found = index.get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise CheckpointError(f"{repo}: {INDEX}: expected a weight_map of tensor names to file names")
        return [INDEX, *sorted(set(found.values()))]
    others = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if not others:
        gguf = next((name for name in sorted(names) if name.lower().endswith(".gguf")), None)
        hint = f"; download one ({gguf}) and give the file" if gguf else "; other formats are not read"
        raise CheckpointError(f"{repo}: no safetensors files there{hint}")
    return others


def _literal(name: str) -> str:
    """Return a pattern that only this name fits."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _from_cache(repo: str, revision: str | None) -> Checkpoint | None:
    """Return what an earlier download left, None where it is not all there."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
        )
        return open_checkpoint(folder, repo, folder.name)
    except (OSError, ValueError, CheckpointError):
        return None


def _refused(error: Exception) -> bool:
    """Return whether the Hub answered, and the answer is no: then an old copy would be a wrong answer."""
    return _status(error) in (401, 403, 404)


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _cause(error: Exception) -> BaseException:
    """Return what made a download fail: the client says only that neither the Hub nor the cache has the file."""
    found: BaseException = error
    while "LocalEntryNotFoundError" in {kind.__name__ for kind in type(found).__mro__} and found.__cause__ is not None:
        found = found.__cause__
    return found


def reason(error: Exception, what: str = "folder") -> str:
    """Return why a model could not be had from the Hub, and what to do; what: that which is not here either."""
    cause = _cause(error)
    status, text = _status(cause), _line(cause)
    names = {kind.__name__ for kind in type(cause).__mro__}
    if status == 404 or names & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        return (
            f"no such {what} here, and the Hub says: {text}; check the name, or log in (hf auth login) for private and "
            "gated models"
        )
    if status in (401, 403):
        return f"the Hub says: {text}; log in (hf auth login), and ask for access on the model's page if it is gated"
    if status == 429:
        return "the Hub says that there were too many requests (429); wait some minutes, or log in (hf auth login)"
    if status >= 500:
        return f"the Hub is out of order (status {status}), and the cache lacks the model; try again later"
    if "OfflineModeIsEnabled" in names:
        return "the cache lacks the model, or a part of it, and HF_HUB_OFFLINE forbids asking the Hub"
    if names & {"TimeoutException", "TimeoutError"}:
        return f"the Hub gave no answer within {ANSWER_SECONDS:.0f} s, and the cache lacks the model; try again later"
    if "RemoteProtocolError" in names or text.startswith("Consistency check failed"):
        return f"the download broke off: {text}; run the same command again to go on"
    if "TooManyRedirects" in names:
        return f"what answers is not the Hub: it redirects in circles ({text}); does HF_ENDPOINT fit?"
    if isinstance(cause, ValueError):
        return f"what answers is not the Hub ({text}); does this network ask to sign in first? does HF_ENDPOINT fit?"
    if isinstance(cause, RuntimeError) and (told := explain(cause)) is not None:
        return told
    if isinstance(cause, OSError) and cause.errno in _OF_A_DISK:
        where = cause.filename or "HF_HOME"
        return f"the Hub's cache cannot be written: {where}: {cause.strerror}; set HF_HOME to a folder with space"
    return f"no such {what} here, and the Hub could not be reached: {text}; the cache lacks the model, too"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _headers_from_hub(repo: str, commit: str) -> Checkpoint:
    import huggingface_hub

    config = read_json(Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=commit)))
    metadata = huggingface_hub.get_safetensors_metadata(repo, revision=commit)
    tensors: dict[str, TensorSource] = {}
    for file, content in metadata.files_metadata.items():
        for name, info in content.tensors.items():
            begin, end = info.data_offsets
            tensors[name] = TensorSource(name, info.dtype, tuple(info.shape), file, begin, end - begin)
    return checkpoint_of(Path(), repo, commit, config, tensors)


def source_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a store says of its source: id, revision and a fingerprint of config and headers, no paths."""
    import xxhash

    digest = xxhash.xxh3_128(json.dumps(checkpoint.config, sort_keys=True).encode())
    for tensor in checkpoint.tensors.values():
        bare = tensor.moved(lambda file: Path(file).name)
        digest.update(repr(bare).encode())
        if bare.encoding is not None:
            digest.update(repr(bare.encoding).encode())
    return {"id": checkpoint.name, "revision": checkpoint.revision, "fingerprint": digest.hexdigest()}
