"""What do requests to an object store cost? Requests and time of each step, with a server that answers after a delay.

python -m benchmarks.object_store [--model FOLDER] [--delay 0.1] [--json]

The server is moto's, on this machine; every request waits for the delay before it is sent. Needs the extra `test`.
"""

import argparse
import asyncio
import importlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bincompress
from tests.s3 import s3_server

DEMO_MODEL = Path(bincompress.__file__).parent / "demo_model"
URL = "s3://bucket/store"


def delay_requests(seconds: float) -> list[str]:
    """Let every request of s3fs wait; returns a list that takes the method of each."""
    session: Any = importlib.import_module("aiobotocore.httpsession").AIOHTTPSession
    sent: list[str] = []
    real = session.send

    async def send(self: Any, request: Any) -> Any:
        sent.append(request.method)
        await asyncio.sleep(seconds)
        return await real(self, request)

    session.send = send
    return sent


def measured(model: Path, delay: float) -> dict[str, dict[str, float]]:
    """Return the seconds and requests of writing, resuming, loading and verifying a store, each once."""
    steps: dict[str, Callable[[], object]] = {
        "compress": lambda: bincompress.compress(model, URL),
        "the same again, all complete": lambda: bincompress.compress(model, URL),
        "load": lambda: bincompress.load(URL),
        "verify": lambda: bincompress.verify(URL),
    }
    with tempfile.TemporaryDirectory() as folder:  # kernels are compiled before anything is timed
        bincompress.load(bincompress.compress(model, f"{folder}/store").store)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    found = {}
    with s3_server() as (host, port):
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        sent = delay_requests(delay)
        for name, step in steps.items():
            sent.clear()
            begin = time.perf_counter()
            step()
            found[name] = {"seconds": time.perf_counter() - begin, "requests": float(len(sent))}
    return found


def main() -> None:
    """Print a row a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="a checkpoint folder; the demo model if not given"
    )
    parser.add_argument("--delay", type=float, default=0.1, help="seconds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measured(options.model, options.delay)
    if options.json:
        print(json.dumps(found))
        return
    print(f"| {options.delay:g} s a request | requests | seconds |\n|---|---|---|")
    for name, step in found.items():
        print(f"| {name} | {step['requests']:.0f} | {step['seconds']:.1f} |")


if __name__ == "__main__":
    main()
