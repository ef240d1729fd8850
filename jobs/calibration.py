"""Who runs the samples of a calibration? A Ray cluster: each part of a layer is a task on one core of some node.

The residual stream and the sums go through the statistics store, so that tasks carry names in and nothing but their
name out; the driver adds the sums in the order of the parts, as the local runner does.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress import __version__
from bincompress.calibration.collect import Calibration, LayerRunner, PartRunner, Sum
from bincompress.calibration.statistics import open_unfinished
from bincompress.errors import BincompressError
from bincompress.process.systems import own_temporary_folder

from .nodes import PATIENCE_SECONDS, death_of
from .runner import absolute_checkpoint, absolute_url, by_value, connect, import_ray
from .task import ENVIRONMENT

Floats = NDArray[np.float32]
_MOST_DEATHS = 3  # of the workers and nodes that had one part


def run_on_ray(address: str | None, url: str, *, patience: float = PATIENCE_SECONDS) -> LayerRunner:
    """Return a runner that does all parts of a layer at once on a Ray cluster.

    url: of the statistics store, which every node has to reach. address and patience: as for `run_ray`.
    """
    ray = import_ray()
    url = absolute_url(url)
    by_value(ray, run_part)
    if not ray.is_initialized():
        connect(ray, address)
    # Its own retries after the memory monitor's kills would be endless.
    task = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": ENVIRONMENT})(run_part)

    def run(work: Calibration, layer: int, stream: Floats) -> Iterator[tuple[Floats, dict[str, Sum]]]:
        work = replace(work, checkpoint=absolute_checkpoint(work.checkpoint))
        found = open_unfinished(url)
        found.write_work(f"stream-{layer}", stream)
        parts = range(len(work.parts))
        waiting = {number: task.remote(url, work, layer, number, __version__) for number in parts}
        try:
            for number in parts:
                deaths = 0
                while (error := death_of(ray, waiting[number], patience, f"the rest of layer {layer}")) is not None:
                    deaths += 1
                    if isinstance(error, ray.exceptions.RayTaskError) or deaths == _MOST_DEATHS:
                        reason = str(error).strip().splitlines()[-1]
                        raise BincompressError(
                            f"layer {layer}, part {number}: {reason}; the same command resumes after the last "
                            "completed layer"
                        )
                    waiting[number] = task.remote(url, work, layer, number, __version__)
                del waiting[number]
                yield _take(found, work, layer, number)
        finally:
            for reference in waiting.values():
                ray.cancel(reference, force=True)

    return run


def run_part(url: str, work: Calibration, layer: int, number: int, version: str) -> None:
    """Run one part of a layer on this node, from the statistics store and back into it."""
    if version != __version__:
        raise BincompressError(
            f"this node has bincompress {__version__}, the driver {version}; install the same version everywhere"
        )
    if not os.environ.get("BINCOMPRESS_CACHE"):
        os.environ["BINCOMPRESS_CACHE"] = str(own_temporary_folder())
    found = open_unfinished(url)
    stream = found.read_work(f"stream-{layer}", work.parts[number])
    if stream is None:
        raise BincompressError(f"{url}: the activations before layer {layer} are missing; can this node read it?")
    after, sums = PartRunner(work, layer)(stream)
    for key, part in sums.items():
        found.write_work(_name(layer, number, f"{key}-gram"), part.gram)
        found.write_work(_name(layer, number, f"{key}-absmax"), part.absmax)
        found.write_work(_name(layer, number, f"{key}-tokens"), np.array([part.tokens], np.int64))
    found.write_work(_name(layer, number, "stream"), after)


def _name(layer: int, number: int, what: str) -> str:
    return f"part-{layer}-{number}/{what}"


def _take(found: Any, work: Calibration, layer: int, number: int) -> tuple[Floats, dict[str, Sum]]:
    def read(what: str) -> Floats:
        values = found.read_work(_name(layer, number, what))
        if values is None:
            raise BincompressError(f"{found.url}: the output of part {number} of layer {layer} is missing")
        return np.asarray(values)

    sums = {
        key: Sum(read(f"{key}-gram"), read(f"{key}-absmax"), int(read(f"{key}-tokens")[0]))
        for key in work.config.inputs_of_layer(layer)
    }
    after = read("stream")
    found.remove_work(f"part-{layer}-{number}")
    return after, sums
