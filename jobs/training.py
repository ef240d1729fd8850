"""Who trains layers that do not read each other's output? A Ray cluster: each layer is a task.

A task takes a GPU where the cluster has some, else as many cores as it has threads. It reads the checkpoint, the store
to begin with and the windows, and writes the trained layer to the work folder: every node has to reach them.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bincompress import __version__
from bincompress.distillation.independent import LayerJob, LayerRunner, train_job
from bincompress.distillation.memory import of_layers
from bincompress.errors import BincompressError
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.process.systems import own_temporary_folder

from .nodes import PATIENCE_SECONDS, Nodes, death_of
from .runner import absolute_checkpoint, absolute_url, by_value, connected, import_ray
from .task import ENVIRONMENT

_MOST_DEATHS = 3  # of the workers and nodes that had one layer


def run_on_ray(address: str | None, *, patience: float = PATIENCE_SECONDS) -> LayerRunner:
    """Return a runner that trains layers beside each other on a Ray cluster; address and patience: as for `run_ray`.

    A killed worker costs the work on one layer, which another worker begins anew, three times at most.
    """
    import_ray()

    def run(jobs: Sequence[LayerJob]) -> Iterator[int]:
        if not jobs:
            return
        with connected(address) as ray:
            by_value(ray, run_layer)
            remote = _remote(ray, jobs[0])
            jobs = [_absolute(job) for job in jobs]
            waiting = {job.layer: remote.remote(job, __version__) for job in jobs}
            try:
                for job in jobs:
                    _finish(ray, remote, job, waiting, patience)
                    yield job.layer
            finally:
                for reference in waiting.values():
                    ray.cancel(reference, force=True)

    return run


def run_layer(job: LayerJob, version: str) -> None:
    """Train one layer on this node; a node with another version of the program does nothing."""
    if version != __version__:
        raise BincompressError(
            f"this node has bincompress {__version__}, the driver {version}; install the same version everywhere"
        )
    if not os.environ.get("BINCOMPRESS_CACHE"):
        os.environ["BINCOMPRESS_CACHE"] = str(own_temporary_folder())
    train_job(job)


def _remote(ray: Any, job: LayerJob) -> Any:
    """Return the task, with what it claims of a node; raises BincompressError where no node has as much."""
    nodes, memory = Nodes(ray), of_layers(checkpoint_config(job.checkpoint), job.settings)
    nodes.look()
    if nodes.cpus and not nodes.hold(memory):
        raise BincompressError(
            f"training a layer takes about {memory / 1e9:.1f} GB, and the largest node has "
            f"{nodes.largest_memory / 1e9:.1f} GB; lower --windows or --layer-batch, or add a larger node"
        )
    gpus = 1 if job.places.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    # Its own retries after the memory monitor's kills would be endless.
    return ray.remote(
        num_cpus=job.places.threads or 1, num_gpus=gpus, memory=memory, max_retries=0,
        runtime_env={"env_vars": ENVIRONMENT},
    )(run_layer)  # fmt: skip


def _finish(ray: Any, remote: Any, job: LayerJob, waiting: dict[int, Any], patience: float) -> None:
    """Wait for a layer, and begin it anew where its worker dies."""
    deaths = 0
    while (error := death_of(ray, waiting[job.layer], patience, f"layer {job.layer} and those behind it")) is not None:
        deaths += 1
        if isinstance(error, ray.exceptions.RayTaskError) or deaths == _MOST_DEATHS:
            reason = str(error).strip().splitlines()[-1]
            raise BincompressError(
                f"layer {job.layer}: {reason}; the same command resumes with the layers that are left"
            )
        waiting[job.layer] = remote.remote(job, __version__)
    del waiting[job.layer]


def _absolute(job: LayerJob) -> LayerJob:
    """Return it with the driver's relative paths resolved: workers run in other folders."""
    places = replace(job.places, threads=job.places.threads or 1)
    return replace(
        job, checkpoint=absolute_checkpoint(job.checkpoint), start=absolute_url(job.start), work=job.work.absolute(),
        places=places,
    )  # fmt: skip
