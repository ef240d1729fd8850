"""How are the inputs of packed matrices rounded while these are trained, so that they learn what the engine will do?"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from bincompress.distillation.settings import DistillError
from bincompress.store.store import Store
from bincompress.tensors.forms import is_low_rank
from cpu_kernels.matmul.activations import LEVELS, SEGMENT


class RoundedInputs:
    """The rounding of packed matrices' inputs to a few bits, with a scale for each token and 128 columns."""

    def __init__(self, bits: int, scales: Mapping[str, Tensor | None]) -> None:
        """bits: 8 or 6; scales: by packed matrix, what its input is multiplied by before it is rounded, (cols,)."""
        self._levels = LEVELS[bits]
        self._scales = scales

    def plain(self, name: str) -> bool:
        """Return whether a matrix's input is rounded as it is, so that others with this input share the result."""
        return name in self._scales and self._scales[name] is None

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Return an input (..., cols) as the matrix multiplies it; the gradient is as if it were not rounded."""
        if name not in self._scales:
            return x
        scale = self._scales[name]
        if scale is None:
            return x + (rounded(x.detach(), self._levels) - x.detach())
        values = rounded(x.detach().float() * scale, self._levels)
        back = torch.where(scale != 0, values / scale, 0.0).to(x.dtype)
        return x + (back - x.detach())


def rounded(x: Tensor, levels: int) -> Tensor:
    """Return x (..., cols) in steps of each 128 columns' greatest magnitude over `levels`, as the kernels round it."""
    cols = x.shape[-1]
    missing = -cols % SEGMENT
    padded = functional.pad(x, (0, missing)) if missing else x
    parts = padded.float().unflatten(-1, (-1, SEGMENT))
    greatest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(greatest > 0, levels / greatest, 0.0)
    values = (parts * inverse).round().clamp_(-levels, levels) * (greatest / levels)
    found: Tensor = values.flatten(-2)[..., :cols].to(x.dtype)
    return found


def rounded_inputs(store: Store, names: Collection[str], bits: int, device: torch.device) -> RoundedInputs | None:
    """Return the rounding of the inputs of those of these tensors that a store has packed; None for 16 bits."""
    if bits == 16:
        return None
    kinds = store.tensors()
    scales: dict[str, Tensor | None] = {}
    for name in names:
        if kinds.get(name) == "packed":
            if is_low_rank(store.complete_attributes(name)):
                raise DistillError(
                    f"{name}: is stored in low-rank form, whose two products round their inputs in another way than "
                    "training knows; leave --activation-bits out"
                )
            found = store.read_packed(name).in_scale
            scales[name] = None if found is None else torch.from_numpy(found.copy()).to(device)
    return RoundedInputs(bits, scales)
