"""What commands share: progress bars, the kernel compiler's one-time message, JSON."""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import click

address_option = click.option(
    "--address", help="ray: auto, HOST:PORT or ray://HOST:10001.  [default: RAY_ADDRESS, or this machine]"
)


def print_json(found: Any) -> None:
    """Print an object as JSON."""
    click.echo(json.dumps(found, indent=1))


@contextlib.contextmanager
def kernels_announced(
    say: Callable[[str], None] = lambda line: click.echo(line, err=True), ahead: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Say once, on standard error, when kernels are compiled instead of loaded: it takes seconds and happens once.

    say: writes a line. ahead: called then, to compile others meanwhile.
    """
    from cpu_kernels.jit.compiler import announce
    from cpu_kernels.jit.kernel_cache import cache_is_kept

    told = False

    def tell(name: str) -> None:
        nonlocal told
        if not told:
            told = True
            ahead()
            kept = " (once; later runs load them from the cache)" if cache_is_kept() else ""
            say(f"compiling kernels for this CPU{kept} ...")

    with announce(tell):
        yield


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Pause the garbage collector, and exempt what exists afterwards: modules, which live as long as the process.

    Collecting takes a tenth of the time that importing Numba takes.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextlib.contextmanager
def decoding_announced() -> Iterator[None]:
    """`kernels_announced` for a command that runs a model: a second process compiles some of the decoder's kernels."""
    with _nothing_collected():
        import bincompress.inference.load  # noqa: F401 (for the command, which imports it too)
        from bincompress.inference.warmup import compiling_ahead

    with compiling_ahead() as ahead, kernels_announced(ahead=ahead):
        yield


def byte_bar(total: int, title: str, hidden: bool) -> Any:
    """Return a progress bar over bytes, on standard error; hidden where asked or where nobody watches."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        disable=True if hidden else None,
        dynamic_ncols=True,
        smoothing=0.1,
    )


@contextlib.contextmanager
def stage_bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (stage, done, total) that draws a bar for each stage: over tensors of a check, else bytes."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def on_stage(stage: str, done: int, total: int) -> None:
        bar = bars.get(stage)
        if bar is None or done < bar.n:  # a stage that comes again
            if bar is not None:
                bar.close()
            unit = {"unit": "tensor"} if stage == "verify" else {"unit": "B", "unit_scale": True}
            bar = bars[stage] = tqdm(total=total, desc=stage, disable=True if quiet else None, **unit)
        bar.update(done - bar.n)

    try:
        yield on_stage
    finally:
        for bar in bars.values():
            bar.close()
