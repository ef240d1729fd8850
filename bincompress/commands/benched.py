"""How are the speeds of `bincompress bench` shown?"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from bincompress.commands.shared import print_json
from bincompress.inference.benchmark import Speed
from bincompress.inference.load import Loaded

FORMATS = ("md", "csv", "json", "jsonl")


@dataclass(frozen=True)
class Bench:
    """What was measured, and of what."""

    store: str
    loaded: Loaded
    activations: str
    cache: str
    bandwidth: float | None  # bytes a second that this machine reads with the same threads
    speeds: Sequence[Speed]

    def rate(self, speed: Speed) -> float | None:
        """Return the bytes of weights that are read a second; None for prompts, and where a token chooses experts."""
        if speed.cache_bytes is None or self.loaded.decoder.config.experts is not None:
            return None
        return self.loaded.nbytes * speed.mean

    def share(self, speed: Speed) -> float | None:
        """Return what part of the bandwidth reading weights and cache takes."""
        rate = self.rate(speed)
        if rate is None or not self.bandwidth or speed.cache_bytes is None:
            return None
        return (rate + speed.cache_bytes * speed.mean) / self.bandwidth

    def figures(self, speed: Speed) -> dict[str, Any]:
        """Return what is known of a test."""
        return {
            "mean": speed.mean, "spread": speed.spread, "weight_bytes_per_second": self.rate(speed),
            "share_of_bandwidth": self.share(speed), "joules_per_token": speed.joules,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Return what is the same for all tests."""
        return {
            "store": self.store, "bytes": self.loaded.nbytes, "threads": self.loaded.decoder.workers.threads,
            "activations": self.activations, "cache": self.cache, "bandwidth": self.bandwidth,
        }  # fmt: skip


def print_bench(bench: Bench, form: str) -> None:
    """Print the speeds in one of FORMATS."""
    rows = [{**bench.about(), "test": speed.test, **bench.figures(speed)} for speed in bench.speeds]
    residents = bench.loaded.decoder.residents
    if form == "json":
        print_json(
            {
                **bench.about(), "paths": bench.loaded.paths,
                "tests": {speed.test: bench.figures(speed) for speed in bench.speeds},
                **({} if residents is None else {"experts_chosen": residents.asked, "experts_read": residents.read}),
            }
        )  # fmt: skip
    elif form == "jsonl":
        for row in rows:
            click.echo(json.dumps(row))
    elif form == "csv":
        written = io.StringIO()
        names = [*bench.about(), "test", "mean", "spread"]
        names += ["weight_bytes_per_second", "share_of_bandwidth", "joules_per_token"]
        table = csv.DictWriter(written, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        click.echo(written.getvalue(), nl=False)
    else:
        _print_table(bench)


def _print_table(bench: Bench) -> None:
    loaded, config = bench.loaded, bench.loaded.decoder.config
    threads, width = loaded.decoder.workers.threads, max([6, *(len(speed.test) for speed in bench.speeds)])
    head = f"| {'store':20s} | {'size':>10s} | threads | activations        | {'test':{width}s} | {'t/s':>18s} |"
    line = f"| {'-' * 20} | {'-' * 9}: | ------: | ------------------ | {'-' * width} | {'-' * 17}: |"
    click.echo(f"{head}     GB/s |  share |")
    click.echo(f"{line} -------: | -----: |")
    for speed in bench.speeds:
        rate, share = bench.rate(speed), bench.share(speed)
        shown = f"{'' if rate is None else f'{rate / 1e9:.2f}':>8s} | {'' if share is None else f'{share:.0%}':>6s}"
        click.echo(
            f"| {bench.store[-20:]:20s} | {loaded.nbytes / 1e6:7.1f} MB | {threads:7d} | {bench.activations:18s} "
            f"| {speed.test:{width}s} | {speed.mean:9.2f} +- {speed.spread:5.2f} | {shown} |"
        )
    if bench.bandwidth:
        click.echo(f"read bandwidth of this machine with {threads} threads: {bench.bandwidth / 1e9:.1f} GB/s")
    for speed in bench.speeds:
        if speed.joules is not None:
            click.echo(f"{speed.test}: {speed.joules:.3f} J a token (the whole CPU)")
    if loaded.decoder.residents is not None and config.experts is not None:
        click.echo(loaded.decoder.residents.line(config.experts.count * sum(config.experts.layers)))
