"""Memory of texts that have ended goes back: to the earlier texts' bound, and to the system."""

import gc
import platform
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference import scheduler as scheduling
from bincompress.inference.generate import Model
from bincompress.inference.load import load
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.inference.sequence import Request
from bincompress.process.pages import zeros_by_page
from tests.serving import until

_FILLED = """
import re, numpy as np
from pathlib import Path
from bincompress.process.pages import zeros_by_page
from bincompress.process.systems import give_back_freed_memory
def resident():
    return int(re.findall(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) << 10
freed = [np.ones(8 << 20, np.uint8) for _ in range(9)]
del freed
between = [np.ones(2 << 20, np.uint8) for _ in range(8)]
del between[:7]  # what is left keeps them in the heap
give_back_freed_memory()
untouched = [{zeros}((2 << 20,), np.uint8) for _ in range(7)]
print(resident())
"""


@pytest.fixture(scope="module")
def model(demo_store: Path) -> Model:
    return load(str(demo_store), threads=1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_zeros_take_no_memory_before_they_are_filled() -> None:
    """Also once other arrays were freed, after which glibc takes large ones from its heap."""

    def resident(zeros: str) -> int:
        code = [sys.executable, "-c", _FILLED.format(zeros=zeros)]
        return int(subprocess.run(code, capture_output=True, check=True, cwd=Path(__file__).parents[1]).stdout)

    assert resident("zeros_by_page") + (12 << 20) < resident("np.zeros")


def test_more_zeros_than_there_can_be() -> None:
    for shape in ((1 << 46,), (1 << 40, 1 << 40)):
        with pytest.raises(MemoryError):
            zeros_by_page(shape, np.float32)
    found = zeros_by_page((3, 1 << 16), np.float32)
    found += 1  # it can be written to
    assert float(found.sum()) == 3 << 16
    assert zeros_by_page((0, 5), np.int8).shape == (0, 5)


def test_a_text_that_has_ended_holds_no_cache(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked may hold it; what it begins with belongs to the earlier texts, within their bound."""
    given_back: list[float] = []
    monkeypatch.setattr(scheduling, "give_back_freed_memory", lambda: given_back.append(1.0))
    monkeypatch.setattr(scheduling, "_GIVEN_BACK", 0.0)
    made: list[Any] = []
    own = model.decoder.new_cache
    monkeypatch.setattr(model.decoder, "new_cache", lambda *sizes: _noted(made, own(*sizes)))
    scheduler = Scheduler(model, Limits(parallel=2, context=64, prefix_bytes=0))
    try:
        texts = scheduler.submit([(Request((5, 7, token)), lambda event: None) for token in (9, 11, 13)])
        texts[1].cancel()
        until(lambda: all(text.ended for text in texts) and not scheduler.active)
        until(lambda: all(text.cache is None for text in texts))
        gc.disable()  # cycles are not to be waited for
        until(lambda: all(reference() is None for reference in made))
    finally:
        gc.enable()
        scheduler.close()
    assert made
    assert given_back


def _noted(made: list[Any], cache: Any) -> Any:
    made.append(weakref.ref(cache))
    return cache
