"""How do several small steps become one pass over memory on a GPU?"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., object])


def fused(function: _Function, where: Tensor) -> _Function:
    """Return a function compiled into one pass for a GPU; for a CPU, where that needs a C++ compiler, as it is."""
    return cast(_Function, _compiled(function)) if where.is_cuda else function


@functools.cache
def _compiled(function: Callable[..., object]) -> Any:
    return torch.compile(function, dynamic=True)
