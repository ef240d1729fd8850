"""Compiled kernels in one file, for machines with the same CPU and the same versions: export and import of the cache.

A file holds native code, in pickles of Numba: whoever imports it lets it run. So it is read only where its SHA-256 is
the one that the caller gives, who trusts it; the names and sizes in it are checked all the same.
"""

import hashlib
import io
import json
import os
import re
import secrets
import sys
import zipfile
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np

from cpu_kernels.errors import KernelError
from cpu_kernels.jit.kernel_cache import cache_folder, cpu_name, sources_digest
from cpu_kernels.jit.numba_settings import code_settings

FORMAT, VERSION = "bincompress kernels", 1
_MANIFEST = "kernels.json"
_FILE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*-[0-9a-f]{12}/[A-Za-z0-9_][A-Za-z0-9_.\-]*\.nb[ic]")
_MOST_BYTES, _MOST_FILES = 1 << 30, 10_000
_LONGEST_MANIFEST = 1 << 20  # bytes
_WHEN = (1980, 1, 1, 0, 0, 0)  # the same kernels are the same bytes


def machine() -> dict[str, Any]:
    """Return what a kernel is compiled for, by the words that a refusal uses."""
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "Numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "NumPy": np.__version__,
        "kernel sources": sources_digest(),
        "CPU": cpu_name(),
        "Numba settings": code_settings(),
    }


def export_kernels(file: Path) -> tuple[int, str]:
    """Write the kernels of this process's cache into a file; returns how many there are, and the file's SHA-256.

    Raises KernelError where there is no cache or nothing in it, or a file of another kind is there, OSError where it
    cannot be written.
    """
    folder = _cache()
    kept = sorted(path for pattern in ("*.nbi", "*.nbc") for path in folder.glob(f"*/{pattern}"))
    names = {path.parent.name for path in kept}
    if not names:
        raise KernelError(f"{folder}: no kernels are compiled yet; `bincompress warmup` compiles them")
    if file.exists() and not _holds_kernels(file):
        raise KernelError(f"{file}: is there, and is no file of kernels; nothing was changed: choose another name")
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            told = {"format": FORMAT, "version": VERSION, **machine()}
            _add(archive, _MANIFEST, json.dumps(told, indent=1).encode())
            for path in kept:
                _add(archive, f"{path.parent.name}/{path.name}", path.read_bytes())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return len(names), digest_of(file)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _WHEN), content, zipfile.ZIP_DEFLATED)


def digest_of(file: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def import_kernels(file: Path, digest: str) -> tuple[int, int]:
    """Put a file's kernels into this process's cache; returns how many are new, and how many were there.

    digest: the SHA-256 that a trusted file has. Raises KernelError where the file has another one, is no such file, or
    was made for another CPU or by other versions.
    """
    folder = _cache()
    content = file.read_bytes()  # once: what is checked is what is used, whatever happens to the file
    found = hashlib.sha256(content).hexdigest()
    if found != digest.lower():
        raise KernelError(f"{file}: SHA-256 {found}, expected {digest}: another file than was exported; get it anew")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = _checked_names(archive, file)
            _check_machine(archive, file)
            files = {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise KernelError(f"{file}: no file of kernels ({error})") from None
    kernels: dict[str, list[str]] = {}
    for name in sorted(files):  # .nbc before the .nbi that names it
        kernels.setdefault(name.split("/")[0], []).append(name)
    there = {kernel for kernel in kernels if any((folder / kernel).glob("*.nbi"))}
    for kernel in kernels.keys() - there:
        (folder / kernel).mkdir(exist_ok=True)
        for name in kernels[kernel]:
            partial = folder / kernel / f".{secrets.token_hex(8)}.partial"
            partial.write_bytes(files[name])
            os.replace(partial, folder / name)
    return len(kernels) - len(there), len(there)


def _holds_kernels(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(_MANIFEST) as manifest:
            return bool(json.loads(manifest.read(_LONGEST_MANIFEST))["format"] == FORMAT)
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, KeyError, TypeError):
        return False


def _cache() -> Path:
    folder = cache_folder()
    if folder is None:
        raise KernelError("there is no folder in which compiled kernels are kept; BINCOMPRESS_CACHE names one")
    return folder


def _checked_names(archive: zipfile.ZipFile, file: Path) -> list[str]:
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > _MOST_BYTES or len(entries) > _MOST_FILES:
        raise KernelError(f"{file}: no file of kernels: more than {_MOST_BYTES >> 20} MB or {_MOST_FILES:,} files")
    names = [entry.filename for entry in entries if entry.filename != _MANIFEST]
    for name in names:
        if not _FILE.fullmatch(name):
            raise KernelError(f"{file}: no file of kernels: it has an entry {name!r:.80}")
    if len(names) != len(entries) - 1 or len(set(names)) != len(names):
        raise KernelError(f"{file}: no file of kernels: expected one {_MANIFEST}, and every name once")
    return names


def _check_machine(archive: zipfile.ZipFile, file: Path) -> None:
    try:
        told = json.loads(archive.read(_MANIFEST))
        known = told["format"] == FORMAT and told["version"] == VERSION
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise KernelError(f"{file}: not a file of kernels that this version reads ({FORMAT}, version {VERSION})")
    for what, here in machine().items():
        if told.get(what) != here:
            raise KernelError(
                f"{file}: made for another {what}: {_short(told.get(what))}, here {_short(here)}; kernels fit the same "
                "CPU and versions alone: `bincompress warmup` compiles them here"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
