"""What does a store look like? One self-contained HTML page with plots."""

import io
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from bincompress import __version__
from bincompress.errors import BincompressError, StoreError
from bincompress.methods import KEEP, METHODS
from bincompress.reporting.experts import by_kind
from bincompress.reporting.inspection import inspect, totals
from bincompress.store.store import Store
from bincompress.tensors.dequantize import dequantize

_SAMPLE_ROWS = 256  # of the shown tensor, dequantized for its histogram
_LAYER = re.compile(r"layers\.(\d+)\.(.*?)(?:\.weight)?$")


def report_page(store: Store, tensor: str | None = None) -> str:
    """Return the page: bits and error per layer and kind, one tensor's weights with its levels, times, settings.

    tensor: the one to show; by default the packed tensor of greatest relative error. Raises StoreError where the store
    has no packed tensor, BincompressError where matplotlib is not installed.
    """
    found = inspect(store)
    packed = {
        name: report
        for name, report in found["tensors"].items()
        if report["status"] == "complete" and report["method"] != KEEP.method
    }
    if not packed:
        raise StoreError(f"{store.url}: no packed tensor yet, so there is nothing to report")
    if tensor is None:
        tensor = max(packed, key=lambda name: (packed[name]["relative_error"], name))
    elif tensor not in packed:
        raise StoreError(f"{store.url}: no packed tensor {tensor!r}; `bincompress inspect` lists them")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((files("bincompress.reporting") / "report.html.jinja").read_text("utf-8"))
    kinds = {name: kind for name, kind in by_kind(packed).items() if kind["status"] == "complete"}
    calibrated = {name: report for name, report in kinds.items() if "output_error" in report}
    plots = {
        "error": _by_layer(kinds, "relative_error", "relative squared error"),
        "outputs": _by_layer(calibrated, "output_error", "relative squared error of outputs") if calibrated else "",
        "bits": _by_layer(kinds, "stored_bits", "stored bits per weight"),
        "times": _times(packed),
        "histogram": _histogram(store, tensor),
        "transformation": "".join(_histograms(store.report(tensor))),
    }
    distillation = store.attributes.get("distillation")
    if distillation is not None:
        plots["distillation"] = _distillation(distillation)
    training = store.attributes.get("training")
    trained_layers = training and (training["reports"] or training.get("independent"))
    if trained_layers:
        plots["layers"] = _trained_layers(trained_layers)
    return template.render(
        store=store.url, version=__version__, totals=totals(found["total"]), tensors=by_kind(found["tensors"]),
        plots=plots, tensor=tensor, shown=packed[tensor], distillation=distillation, trained=training is not None,
        recipe=_settings(store.attributes), source=found["total"]["source"],
    )  # fmt: skip


def _figure(width: float = 9, height: float = 3.4) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BincompressError(
            "the report draws with matplotlib, which is not installed: pip install 'bincompress[report]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def _by_layer(packed: dict[str, dict[str, Any]], key: str, title: str) -> str:
    """Plot a figure of the tensors of every layer, a line a kind; tensors outside layers as a dashed line."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    figure = _figure()
    axes = figure.subplots()
    for name, report in packed.items():
        match = _LAYER.search(name)
        if match:
            kind = "experts " if "experts" in report else ""
            lines[kind + match[2].split(".")[-1]].append((int(match[1]), report[key]))
        else:
            axes.axhline(report[key], ls="--", lw=1, color="gray")
            axes.annotate(
                name, (0.995, report[key]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
            )
    for kind, points in sorted(lines.items()):
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=8, ncols=2, loc="best")
    return _svg(figure)


def _times(packed: dict[str, dict[str, Any]]) -> str:
    figure = _figure(height=3)
    axes = figure.subplots()
    timed = [report for report in packed.values() if report["seconds"] is not None]
    if not timed:
        axes.annotate(
            "the store has no times: its log/ is not there", (0.5, 0.5), xycoords="axes fraction", ha="center"
        )
        axes.set_axis_off()
        return _svg(figure)
    axes.scatter([report["weights"] for report in timed], [report["seconds"] for report in timed], s=14)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("weights in the tensor")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    return _svg(figure)


def _trained_layers(reports: list[dict[str, Any]]) -> str:
    """Plot each layer's held-out loss before and after it was trained, and the share of weights that changed level."""
    figure = _figure()
    axes = figure.subplots()
    layers = [report["layer"] for report in reports]
    axes.plot(layers, [report["held_out_start"] for report in reports], marker="o", ms=3, color="C7", label="before")
    axes.plot(layers, [report["held_out"] for report in reports], marker="o", ms=3, color="C3", label="after")
    axes.set_xlabel("layer")
    axes.set_ylabel("held-out loss")
    axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    twin = axes.twinx()
    twin.bar(layers, [100 * report["flips"] for report in reports], alpha=0.25, color="C0")
    twin.set_ylabel("% of the weights changed level (bars)", color="C0")
    return _svg(figure)


def _distillation(record: dict[str, Any]) -> str:
    """Plot the loss of every step and the perplexity on held-out text, with the unquantized model's."""
    figure = _figure()
    axes = figure.subplots()
    losses = record["losses"]
    steps = [min((i + 1) * losses["every"], record["steps"]) for i in range(len(losses["mean"]))]
    axes.plot(steps, losses["mean"], lw=1, color="C7", label="loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss against the unquantized model")
    twin = axes.twinx()
    twin.plot(*zip(*record["held_out"], strict=True), marker="o", ms=3, color="C3", label="held-out perplexity")
    twin.axhline(record["teacher_perplexity"], ls="--", lw=1, color="C3")
    twin.set_yscale("log")
    twin.set_ylabel("held-out perplexity (dashed: unquantized)", color="C3")
    axes.grid(alpha=0.3)
    return _svg(figure)


def _histogram(store: Store, tensor: str) -> str:
    """Plot the original weights (the sample kept at compression) and the levels that stand for them."""
    figure = _figure()
    axes = figure.subplots()
    kept = store.report(tensor)["histogram"]
    counts = np.array(kept["counts"], np.float64)
    edges = np.linspace(kept["low"], kept["high"], counts.size + 1)
    width = edges[1] - edges[0] or 1.0
    axes.stairs(
        counts / counts.sum() / width, edges, fill=True, alpha=0.4, label=f"weights (sample of {int(counts.sum()):,})"
    )
    levels = _levels(store, tensor)
    distinct, seen = np.unique(levels, return_counts=True)
    share = seen / seen.sum()
    if distinct.size <= 256:
        twin = axes.twinx()
        twin.vlines(distinct, 0, share, color="C3", lw=1.2)
        twin.set_ylabel("share of weights at a level", color="C3")
        twin.set_ylim(bottom=0)
        axes.plot([], [], color="C3", label=f"{distinct.size} levels")
    else:
        values, places = np.histogram(levels, bins=200, range=(kept["low"], kept["high"]), density=True)
        axes.stairs(values, places, color="C3", label="levels of all row-blocks")
    axes.set_xlabel("weight")
    axes.set_ylabel("density")
    axes.legend(fontsize=8)
    return _svg(figure)


def _histograms(report: dict[str, Any]) -> Iterator[str]:
    """Plot the histograms before and after a transformation that a method's report holds."""
    for method in METHODS:
        for name, reach in method.histograms.items():
            if method.name == report["method"] and name in report:
                yield _before_and_after(report[name], reach)


def _before_and_after(found: dict[str, list[int]], reach: float) -> str:
    """Plot a tensor's weights before and after the transformation, in mean magnitudes of their row-blocks."""
    figure = _figure()
    for axes, (name, counts) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        edges = np.linspace(-reach, reach, len(counts) + 1)
        density = np.array(counts, np.float64) / max(1, sum(counts)) / (edges[1] - edges[0])
        axes.stairs(density, edges, fill=True, alpha=0.4, color="C0" if name == "before" else "C2")
        for target in (-1.0, 1.0):
            axes.axvline(target, color="C3", lw=1.2)
        axes.set_title(f"{name} the transformation", fontsize=9)
        axes.set_xlabel("weight / mean magnitude of its row-block")
    return _svg(figure)


def _levels(store: Store, tensor: str) -> NDArray[np.float32]:
    packed = store.read_stored(tensor)
    return dequantize(packed, slice(0, min(_SAMPLE_ROWS, packed.shape[0]))).reshape(-1)


def _settings(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe, with the text where the run was calibrated on one layer after layer."""
    calibrated = attributes.get("statistics")
    return {**attributes["recipe"], **({"sequential": calibrated} if isinstance(calibrated, dict) else {})}
