"""Where does a text's residual stream lie while layers are trained: in memory, or in a file where that is too small?"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bincompress.distillation.memory import on_disk
from bincompress.distillation.train import writable

_STREAMS = 3  # of one training


class Streams:
    """Room for the streams of one training, all of one shape.

    A file is mapped, so that the system keeps in memory what there is room for; the result is the same. Only a CPU's
    streams lie in files: a GPU reads them too often. At the end of the `with` block the files are removed.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, folder: Path) -> None:
        """shape: (windows, n, hidden) of float32; folder: of the files."""
        self._shape = shape
        self._device = device
        self._folder = folder
        self._bytes = 4 * math.prod(shape)
        self.on_disk = device.type == "cpu" and on_disk(_STREAMS * self._bytes)
        self._files: list[Path] = []

    def room(self) -> Tensor:
        """Return room for one stream; raises DistillError where the disk is full."""
        if not self.on_disk:
            return torch.empty(self._shape, device=self._device)
        path = self._folder / f"stream-{len(self._files)}.bin"
        self._files.append(path)
        with writable(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with open(path, "wb") as file:
                _fill(
                    file.write, self._bytes
                )  # blocks that the disk does not have show here, and not as a lost process
            return torch.from_file(str(path), shared=True, size=self._bytes // 4, dtype=torch.float32).view(self._shape)

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)


def _fill(write: Callable[[bytes], object], nbytes: int, piece: int = 1 << 24) -> None:
    for begin in range(0, nbytes, piece):
        write(bytes(min(piece, nbytes - begin)))
