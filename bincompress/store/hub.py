"""A packed store on the Hugging Face Hub: found by owner/name, kept in the Hub's cache, and uploaded."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bincompress.errors import DamagedError, StoreError
from bincompress.process.faults import one_line
from bincompress.sources.hub import COMMIT, parts_of, reason
from bincompress.sources.hub_client import ANSWER_SECONDS, asked, forget
from bincompress.store.files import is_local
from bincompress.store.reading import StoreReader, read_root
from bincompress.store.verify import verify

FILE = "model.bincompress.zip"  # what a store is called there
CARD = "README.md"
_UPLOAD_SECONDS = 300.0  # for the Hub to take a part of a file, or to make a commit
_OURS = re.compile(r"^library_name: bincompress$", re.M)


@dataclass(frozen=True)
class CachedModel:
    """A model of the Hub that lies in the cache."""

    name: str
    revision: str  # the commit
    kind: str  # "store" or "checkpoint"
    nbytes: int
    path: str


def located(name: str) -> str:
    """Return where a store lies that is named by a path, a URL, or owner/name[@revision] on the Hub.

    A path that exists wins. A store of the Hub is downloaded, or found in the cache where the Hub does not answer; a
    fresh download is held against all its hashes. Raises StoreError, or DamagedError where the download is damaged.
    """
    if not is_local(name) or Path(name).exists():
        return name
    repo, revision = parts_of(name)
    return name if repo is None else _downloaded(repo, revision)


def _downloaded(repo: str, revision: str | None) -> str:
    huggingface_hub = asked(ANSWER_SECONDS)
    before = huggingface_hub.try_to_load_from_cache(repo, FILE, revision=revision)
    if isinstance(before, str) and revision is not None and COMMIT.fullmatch(revision):
        return str(before)  # what a commit names never changes
    try:
        # Asked once: a download that finds nobody asks six times, for half a minute.
        url = huggingface_hub.hf_hub_url(repo, FILE, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_SECONDS)
    except Exception as error:
        if isinstance(before, str) and _status(error) not in (401, 403, 404):
            return str(before)
        raise _not_had(repo, error) from None
    try:
        path = huggingface_hub.hf_hub_download(repo, FILE, revision=revision, etag_timeout=ANSWER_SECONDS)
    except Exception as error:  # of the client and of whatever library it speaks HTTP with
        raise _not_had(repo, error) from None
    path = str(path)
    if path != before:
        _check(repo, Path(path))
    return path


def _not_had(repo: str, error: Exception) -> StoreError:
    if "EntryNotFoundError" in {kind.__name__ for kind in type(error).__mro__} and _status(error) == 404:
        return StoreError(
            f"{repo}: has no {FILE} on the Hub; `bincompress compress {repo} ./store` makes a store of it"
        )
    return StoreError(f"{repo}: {reason(error, 'store')}")


def _opened(path: str) -> StoreReader:
    attributes, files = read_root(path)
    return StoreReader(path, attributes, files=files)


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _check(repo: str, path: Path) -> None:
    """Raise DamagedError where a file that has just come is not whole; it is then removed from the cache."""
    try:
        store = _opened(str(path))
        problem = next((f"{name}: {problem}" for name, problem in verify(store) if problem), "")
    except StoreError as error:
        problem = str(error)
    except BaseException as error:  # Ctrl-C among them: what was not checked to its end would not be checked again
        forget(path)
        if isinstance(error, Exception) and not isinstance(error, OSError | MemoryError):
            raise DamagedError(
                f"{repo}: {FILE} cannot be checked, and was removed from the cache: {one_line(error)}"
            ) from error
        raise
    if problem:
        forget(path)
        raise DamagedError(f"{repo}: {FILE} came damaged, and was removed from the cache: {problem}")


def cached_models() -> list[CachedModel]:
    """Return the models in the Hub's cache: packed stores, and checkpoints."""
    found = []
    for repo in _cached_repos():
        for revision in sorted(repo.revisions, key=lambda one: one.commit_hash):
            names = {file.file_name for file in revision.files}
            kind = "store" if FILE in names else "checkpoint" if any(n.endswith(".safetensors") for n in names) else ""
            if kind:
                found.append(
                    CachedModel(
                        repo.repo_id, revision.commit_hash, kind, revision.size_on_disk, str(revision.snapshot_path)
                    )
                )
    return sorted(found, key=lambda one: (one.name, one.revision))


def _cached_repos() -> list[Any]:
    import huggingface_hub

    try:
        return [repo for repo in huggingface_hub.scan_cache_dir().repos if repo.repo_type == "model"]
    except huggingface_hub.CacheNotFound:
        return []


def remove_cached(name: str) -> tuple[list[CachedModel], int]:
    """Remove a model's revisions from the cache; returns them, and the bytes that are free by it.

    name: owner/name, or owner/name@commit (its first letters are enough). Raises StoreError where it is not there.
    """
    import huggingface_hub

    repo, revision = parts_of(name)
    chosen = [one for one in cached_models() if one.name == repo and one.revision.startswith(revision or "")]
    if not chosen:
        raise StoreError(f"{name}: not in the cache; `bincompress models` lists what is")
    strategy = huggingface_hub.scan_cache_dir().delete_revisions(*(one.revision for one in chosen))
    strategy.execute()
    return chosen, int(strategy.expected_freed_size)


def card_fields(repo: str) -> dict[str, str]:
    """Return what a model's card says of its licence, by the card's keys; empty where it cannot be asked."""
    import huggingface_hub

    try:
        data = huggingface_hub.model_info(repo, timeout=ANSWER_SECONDS).card_data
    except Exception:  # the caller says that the licence is not known
        return {}
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: str(value) for key, value in found.items() if value}


def upload(
    repo: str,
    file: Path,
    card: str,
    assets: Mapping[str, bytes],
    *,
    revision: str | None,
    private: bool,
    overwrite: bool,
) -> str:
    """Upload a packed store, its card and the model's small files as one commit, and return the commit's URL.

    What is there unchanged is not uploaded again. overwrite: a card that another program wrote is replaced. Raises
    StoreError.
    """
    huggingface_hub = asked(_UPLOAD_SECONDS)
    api = huggingface_hub.HfApi()
    if not sys.stderr.isatty():  # as this program's own bars
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo, timeout=ANSWER_SECONDS)
        if private and info.private is False:
            raise StoreError(f"{repo}: exists and is public; --private is for a new repository: change it on its page")
        branch = revision if revision is not None and revision != "main" else None
        there = info if branch is None else _branch(api, repo, branch)
        if not overwrite and there is not None and _has_card(there):
            _check_card(api, repo, branch, _has_card(info))
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        contents: dict[str, Any] = {**assets, CARD: card.encode(), FILE: str(file)}
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in sorted(contents.items())
        ]
        done = api.create_commit(repo, operations, commit_message="Upload a bincompress store", revision=revision)
    except StoreError:
        raise
    except Exception as error:  # of the client and of whatever library it speaks HTTP with
        raise StoreError(f"{repo}: not uploaded: {_refusal(error)}") from None
    return str(done.commit_url)


def _refusal(error: Exception) -> str:
    """Return why the Hub did not take an upload, and what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # of one file of several
    status, text = _status(cause), one_line(cause)
    if status in (401, 403) or "LocalTokenNotFoundError" in {kind.__name__ for kind in type(cause).__mro__}:
        return f"the Hub says: {text}; log in (hf auth login) with a token that may write to it"
    if status >= 500 or status == 429:
        return f"the Hub is out of order or asked too often (status {status}); run the same command again later"
    return f"{text}; run the same command again to go on"


def _branch(api: Any, repo: str, branch: str) -> Any:
    """Return what the Hub says of a branch; None where there is none yet."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(repo, revision=branch, timeout=ANSWER_SECONDS)
    except RevisionNotFoundError:
        return None


def _has_card(info: Any) -> bool:
    return any(sibling.rfilename == CARD for sibling in info.siblings or [])


def _check_card(api: Any, repo: str, branch: str | None, on_main: bool) -> None:
    """Raise StoreError where the card of a branch (of main where None is given) is not one that `push` has written.

    on_main: whether main has a card. A new branch begins with a copy of it, which may be replaced: main keeps it.
    """
    there = Path(api.hf_hub_download(repo, CARD, revision=branch)).read_bytes()
    if _OURS.search(there.decode("utf-8", "replace")):
        return
    if branch is not None and on_main and Path(api.hf_hub_download(repo, CARD)).read_bytes() == there:
        return
    where = f"{repo} (branch {branch})" if branch is not None else repo
    raise StoreError(
        f"{where}: has a {CARD} that bincompress did not write; nothing was uploaded: choose another "
        f"{'branch' if branch is not None else 'repository'}, or --overwrite replaces it"
    )
