"""Kill `compress` at random moments and run it again: `python -m tests.kill_many MODEL [--kills 100] [--workers 2]`.

Prints how many reruns went on, verified and gave the bytes of a run that was left alone; exit code 1 if one did not.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def tree(store: Path) -> dict[str, bytes]:
    """Read a store's files, without the logs, which hold times."""
    files = {str(path.relative_to(store)): path for path in store.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("log/")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="Each time over a store made with other settings.")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    run = [sys.executable, "-m", "bincompress", "compress", options.model]
    more = ["--workers", str(options.workers)]
    bad = killed = 0
    with tempfile.TemporaryDirectory() as folder:
        store, whole, other = (Path(folder) / name for name in ("store", "whole", "other"))
        subprocess.run([*run, whole, *more], check=True, capture_output=True)
        subprocess.run([*run, other, "--groups", "4"], check=True, capture_output=True)
        begin = time.monotonic()
        subprocess.run([*run, store, *more], check=True, capture_output=True)
        seconds = time.monotonic() - begin
        expected = tree(whole)
        for number in range(options.kills):
            shutil.rmtree(store)
            if options.overwrite:
                shutil.copytree(other, store)
            over = ["--overwrite"] if options.overwrite else []
            first = subprocess.Popen(
                [*run, store, *more, *over],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            if chance.random() < 0.5:  # in the first moments of the store, which are short
                while first.poll() is None and not (store / "zarr.json").exists():
                    time.sleep(0.0005)
                time.sleep(chance.random() * 0.05)
            else:
                time.sleep(chance.random() * seconds)
            if first.poll() is None:
                os.killpg(first.pid, signal.SIGKILL)
                killed += 1
            first.wait()
            # The settings of a store that was not touched before the kill are others: it is overwritten once more.
            again = subprocess.run([*run, store, *more, *over], check=False, capture_output=True, text=True)
            if again.returncode or tree(store) != expected:
                bad += 1
                print(f"{number}: exit code {again.returncode}, {again.stderr.strip()[-200:]}")
            store.mkdir(exist_ok=True)
    print(f"{killed} of {options.kills} runs were killed in time; {bad} reruns did not go on to the same bytes")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
