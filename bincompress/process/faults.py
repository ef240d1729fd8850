"""What is wrong when something other than our own checks fails: an object store, a package, a disk? In one line."""

import errno
import os
import re
from collections.abc import Iterator

from cpu_kernels.errors import KernelError

_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "SSOError", "NoAuthTokenError", "DefaultCredentialsError",
    "RefreshError", "ClientAuthenticationError", "ProfileNotFound", "ConfigNotFound",
}  # fmt: skip
_UNREACHABLE = {"ClientConnectorError", "ClientConnectorDNSError", "gaierror", "ProxyConnectionError", "InvalidURL"}
# What object stores answer, by its code: none of these gets better with another tensor.
_DENIED = {
    "AccessDenied": "access is denied", "403": "access is denied", "Forbidden": "access is denied",
    "ExpiredToken": "the token has expired", "ExpiredTokenException": "the token has expired",
    "TokenRefreshRequired": "the token has expired", "InvalidToken": "the token is not valid",
    "InvalidAccessKeyId": "the access key is not known", "SignatureDoesNotMatch": "the secret key does not fit",
    "RequestTimeTooSkewed": "this machine's clock is wrong", "NoSuchBucket": "there is no such bucket",
    "400": "the request is refused (has the token expired?)", "401": "the credentials are refused",
    "AllAccessDisabled": "access is denied", "AccountProblem": "access is denied",
    "InvalidSecurity": "access is denied",
    "AuthorizationHeaderMalformed": "the region is wrong", "PermanentRedirect": "the region is wrong",
}  # fmt: skip
_STORES = {"botocore", "aiobotocore", "s3fs", "aiohttp", "gcsfs", "google", "adlfs", "azure", "fsspec", "urllib3"}
_EXTRAS = {"s3fs": "bincompress[s3]", "ray": "bincompress[ray]", "matplotlib": "bincompress[report]"}
_RUST = {"safetensors", "tokenizers"}
_OF_THE_MACHINE = (
    errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
)  # fmt: skip


def explain(error: BaseException) -> str | None:
    """Return what is wrong in one line, and what to do about it; None for what no user can have caused."""
    if isinstance(error, KernelError):
        return str(error)
    return _of_an_object_store(error) or _of_the_machine(error)


def stops_everything(error: BaseException) -> bool:
    """Return whether whatever is tried next would fail as well: no credentials, no package, no space."""
    if isinstance(error, KernelError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        return True
    links = list(_chain(error))
    names = {name for link in links for name in _names(link)}
    return (
        isinstance(error, ImportError | PermissionError)
        or bool(names & (_CREDENTIALS | _UNREACHABLE))
        or any(_code(link) in _DENIED for link in links)
    )


def hinders(error: BaseException) -> bool:
    """Return whether reading failed for a reason that says nothing about what lies there."""
    if isinstance(error, MemoryError | ConnectionError | TimeoutError) or stops_everything(error):
        return True
    return any(_package(link) in _STORES or _code(link) for link in _chain(error))


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an error's text on one line, or its type where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def _of_an_object_store(error: BaseException) -> str | None:
    links = list(_chain(error))
    names = {name for link in links for name in _names(link)}
    code = next((code for link in links if (code := _code(link))), "")
    if names & _CREDENTIALS:
        return (
            f"no usable credentials for the object store ({one_line(error)}); for S3 set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or log in (aws configure)"
        )
    if code in _DENIED:
        return (
            f"the object store says: {_DENIED[code]} ({code}: {one_line(error)}); check credentials, bucket and region"
        )
    if code in ("PreconditionFailed", "412"):
        return f"an object was changed while it was read ({code}); run the same command again"
    if code:
        return f"the object store says: {code}: {one_line(error)}; try again later"
    if names & _UNREACHABLE or any(_package(link) in _STORES for link in links):
        if isinstance(error, ImportError):
            return None
        return (
            f"the object store cannot be reached or does not answer as one: {one_line(error)}; check the URL, "
            "AWS_ENDPOINT_URL and the network"
        )
    if isinstance(error, PermissionError) and error.errno is None:
        return f"the object store says: access is denied ({one_line(error)}); check the credentials and what they allow"
    if isinstance(error, ValueError) and str(error).startswith("Protocol not known"):
        return f"{one_line(error)}: not a kind of URL that can be read; file paths, s3:// and gs:// are"
    return None


def _of_the_machine(error: BaseException) -> str | None:
    if (memory := _of_memory(error)) is not None:
        return memory
    if isinstance(error, ImportError):
        return _of_a_package(error)
    if isinstance(error, TimeoutError):
        return f"no answer in time: {one_line(error)}; check the network and try again"
    if (number := _of_the_system(error)) is not None:
        error = OSError(number, os.strerror(number))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        advice = {
            errno.ENOSPC: "; free some space", errno.EDQUOT: "; free some space", errno.EMFILE: "; raise `ulimit -n`",
            errno.EACCES: "; choose a path that you may use", errno.EROFS: "; choose a path that can be written",
        }.get(error.errno or 0, "")  # fmt: skip
        return f"{where}{error.strerror or one_line(error)}{advice}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "no more threads can be started; give fewer --threads, or raise the limit (`ulimit -u`, pids.max)"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib
        return "this user has no home folder; set HOME to one that can be written (or HF_HOME, for the Hub's cache)"
    package = _package(error)
    if package in ("zarr", "ray", "huggingface_hub", "httpx", "httpx2", "requests"):
        return f"{package}: {one_line(error)}"
    return None


def _of_memory(error: BaseException) -> str | None:
    """Memory or a thread's stack could not be had, or a library found no place: then what a limit says counts."""
    from bincompress.process import limits  # reads the machine, which most errors do not need

    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return limits.limit_reached() or (
            "not enough memory; close other programs or raise the limit (`--dry-run` shows what compressing needs)"
        )
    starved = ("failed to map", "Cannot allocate memory", "cannot allocate memory", "can't start new thread")
    if any(text in str(link) for link in _chain(error) for text in starved):
        return limits.limit_reached()
    return None


def _of_the_system(error: BaseException) -> int | None:
    """Return the errno in what a library written in Rust says, such as safetensors."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if _package(error) in _RUST else None
    return int(found[1]) if found else None


def _of_a_package(error: ImportError) -> str | None:
    asked = re.search(r"nstall (\w+) to", str(error))  # as fsspec says it
    name = asked[1] if asked else (error.name or "").split(".")[0]
    if name in ("bincompress", "cpu_kernels", "jobs"):
        return None
    if name and (asked or isinstance(error, ModuleNotFoundError)):
        return f"the package {name} is not installed: pip install '{_EXTRAS.get(name, name)}'"
    return f"the package {name or '?'} cannot be loaded: {one_line(error)}; install it anew"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came of."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _code(error: BaseException) -> str:
    """Return the code in an answer of S3, as botocore's ClientError has it."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}) if isinstance(response, dict) else {}
    return str(found.get("Code", "")) if isinstance(found, dict) else ""
