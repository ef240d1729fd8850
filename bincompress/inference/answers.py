"""A file of answers: what an earlier run wrote is kept, what anyone else wrote is refused and left as it is."""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bincompress.inference.prompts import PromptFileError
from bincompress.process.faults import explain
from bincompress.process.systems import replace_held, try_lock


class Answers:
    """A file of answers, JSON objects one a line, which a second run of the same prompts goes on with."""

    def __init__(self, path: Path, keys: Mapping[int, str], ids: Mapping[int, Any]) -> None:
        """keys, ids: of the prompts by their lines. Raises PromptFileError where the file holds something else."""
        self._path = path
        self._target = Path(os.path.realpath(path))  # a link stays, and what it leads to is written
        self._keys, self._ids = keys, ids
        self.done: dict[int, dict[str, Any]] = {}
        if self._target.exists() and not self._target.is_file():
            raise PromptFileError(f"{path}: not a file; give another --out")
        self._file = self._target.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if try_lock(self._file):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._target.stat()):
                    return  # else a run that has just ended put another file there
        raise PromptFileError(f"{self._path}: another run writes to it; wait for its end or give another --out")

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n") and self._is_torn(line):
                self._file.truncate(end)  # an earlier run ended in the midst of it
                break
            try:
                found = json.loads(line)
                place, key = found["line"], found["key"]
                ours = isinstance(found["error"] if "error" in found else found["text"], str)
            except (ValueError, TypeError, KeyError, RecursionError):
                ours = False
            if not ours or not line.endswith(b"\n") or type(place) is not int:
                raise PromptFileError(f"{self._path}, line {number}: no answer of `run`; give another --out")
            if place not in self._keys or self._keys[place] != key or found.get("id") != self._ids[place]:
                raise PromptFileError(
                    f"{self._path}, line {number}: answers another prompt, or is of another store or other settings; "
                    "give another --out, or remove it"
                )
            if "error" not in found:  # what failed is tried again
                self.done[place] = found
            end += len(line)

    def _is_torn(self, line: bytes) -> bool:
        """Return whether this is the beginning of a line that this run would write."""
        for place, key in self._keys.items():
            head = _encoded({"line": place, "id": self._ids[place], "key": key})[:-2]
            if head.startswith(line) or any(
                kind.startswith(line[len(head) :][: len(kind)]) for kind in _KINDS if line.startswith(head)
            ):
                return True
        return False

    def add(self, answer: dict[str, Any]) -> None:
        """Write an answer down."""
        self.done[answer["line"]] = answer
        with self._written():
            self._file.write(_encoded(answer))
            self._file.flush()

    def finish(self) -> None:
        """Put the answers in the order of their prompts, and close the file."""
        ordered = self._target.with_name(f".bincompress-{secrets.token_hex(8)}.tmp")
        with self._written():
            file = ordered.open("xb")  # a name that nobody uses: nothing of the user's is written over
            try:
                with file:
                    file.writelines(_encoded(self.done[line]) for line in sorted(self.done))
                    ordered.chmod(stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
                    file.flush()
                    os.fsync(file.fileno())
                self._take_place(ordered)
            except BaseException:
                ordered.unlink(missing_ok=True)
                raise
        self._file.close()

    def _take_place(self, ordered: Path) -> None:
        """Give the ordered answers their name; raises PromptFileError where another file came to be there."""
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._file.fileno()), self._target.stat()):
                beside = self._target.with_name(f"{self._target.name}.{secrets.token_hex(4)}")
                ordered.rename(beside)
                raise PromptFileError(
                    f"{self._path}: another program put a file of its own there, which was left as it is; the answers "
                    f"are in {beside}"
                )
        replace_held(ordered, self._target, self._file.close)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause = explain(OSError(error.errno, error.strerror))
            raise PromptFileError(
                f"{self._path}: cannot be written: {cause}; run the same command again to resume"
            ) from None

    def close(self) -> None:
        """Close the file as it is."""
        with contextlib.suppress(OSError):  # of a full disk, which `add` has told: closing writes once more
            self._file.close()


_KINDS = (b', "text": "', b', "error": "')  # what follows the head of a line


def _encoded(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
