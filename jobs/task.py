"""What runs on a node: one job, on one core, with the node's own kernel cache."""

import os
import socket
from collections.abc import Callable
from dataclasses import replace

from bincompress import __version__
from bincompress.compression.records import Job, JobReport
from bincompress.process.systems import own_temporary_folder

# Read by the libraries when they are loaded, so they have to be there before the worker's process begins.
ENVIRONMENT = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


def run_task(work: Callable[[Job], JobReport], job: Job, version: str) -> JobReport:
    """Do a job on this node; a node with another version of the program does nothing, as its bytes could differ."""
    node = socket.gethostname()
    if version != __version__:
        error = (
            f"{job.name}: node {node} has bincompress {__version__}, the driver {version}; "
            "install the same version everywhere"
        )
        return JobReport(job.name, "failed", 0.0, 0, error=error, fatal=True, store=job.store, node=node)
    # A home folder is often shared between nodes, and file locks on network file systems are slow or missing.
    if not os.environ.get("BINCOMPRESS_CACHE"):
        os.environ["BINCOMPRESS_CACHE"] = str(own_temporary_folder())
    return replace(work(job), node=node)
