"""What is in a store, tensor by tensor and as a whole, in numbers that a machine or a table can show?"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bincompress.errors import DamagedError
from bincompress.methods import KEEP, METHODS
from bincompress.reporting.experts import by_kind
from bincompress.store.laid_out import forms_in
from bincompress.store.store import Store

_LONGEST = 1e9  # seconds
_LONGEST_NAME = 80
_SUMS = ("squared_error", "squared_norm", "stored_bytes", "weights")


def inspect(store: Store) -> dict[str, Any]:
    """Return `{"tensors": {name: report}, "total": {...}}`; bits are per weight, errors relative and squared."""
    tensors: dict[str, dict[str, Any]] = {}
    hidden = {"histogram", *(name for method in METHODS for name in method.histograms)}
    for name in sorted(store.tensors()):
        attributes = store.node_attributes(name)
        if attributes.get("status") != "complete":
            tensors[name] = {"method": None, "status": "missing"}
            continue
        report = {key: value for key, value in store.report(name).items() if key not in hidden}
        shape = list(store.shape(name))
        tensors[name] = {**report, "shape": shape, "status": "complete", "seconds": _seconds(store, name)}
    not_finite = {name: report["not_finite"] for name, report in tensors.items() if report.get("not_finite")}
    return {"tensors": tensors, "total": {**_total(store, list(tensors.values())), "not_finite": not_finite}}


def _seconds(store: Store, name: str) -> float | None:
    """Return how long a tensor took, None where the log, which is under no hash, does not say."""
    found = store.read_log(name).get("seconds")
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return float(found) if 0 <= found <= _LONGEST else None


def _total(store: Store, reports: list[dict[str, Any]]) -> dict[str, Any]:
    done = [report for report in reports if report["status"] == "complete"]
    packed = [report for report in done if report["method"] != KEEP.method]
    others = {method.name for method in METHODS if not method.binary}
    linear = [report for report in packed if report["method"] not in others]
    attributes = store.attributes
    if "source" not in attributes:
        raise DamagedError(f"{store.url}: zarr.json: source: missing; expected an object")
    return {
        "status": attributes["status"],
        "source": attributes["source"],
        "failures": attributes["failures"],
        "tensors": len(reports),
        "complete": len(done),
        "weights": sum(report["weights"] for report in done),
        "stored_bytes": sum(report["stored_bytes"] for report in done),
        "stored_bits": _bits(done),
        "store_bytes": store.total_bytes(),
        "laid_out": forms_in(store),
        "packed": _part(packed),
        "binary": _part(linear),
        "ranks": sorted(report["rank"] for report in packed if type(report.get("rank")) is int),
        "additions_saved": _additions_saved(packed),
        "lossless": _lossless(done, packed),
        "seconds": sum(report["seconds"] or 0.0 for report in done),
        "trained": trained_lines(attributes),
        "source_formats": _source_formats(done),
    }


def _source_formats(reports: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many tensors were dequantized from each format of a quantized source."""
    named = (report["source_format"] for report in reports if isinstance(report.get("source_format"), str))
    return dict(sorted(Counter(" ".join(name.split())[:_LONGEST_NAME] for name in named).items()))


def trained_lines(attributes: Mapping[str, Any]) -> list[str]:
    """Return how a store was trained, from its root's attributes; empty where it was not."""
    training, whole = attributes.get("training"), attributes.get("distillation")
    lines = []
    beside, after = (training.get(key, []) if training is not None else [] for key in ("independent", "reports"))
    for reports, how in ((beside, "each by itself"), (after, "one after the other")):
        if training is None or not reports:
            continue
        settings = training["layers"]["settings"]
        passes = settings["finish_passes"] if beside and reports is after else settings["passes"]
        start, end = (sum(r[key] for r in reports) / len(reports) for key in ("held_out_start", "held_out"))
        lines.append(
            f"{len(reports)} layers {how} on {settings['windows']} windows of {settings['context']} tokens, each "
            f"{passes} times, mean held-out loss {start:.3f} -> {end:.3f}"
        )
    if whole is not None:
        settings, held_out = whole["settings"], whole["held_out"]
        what = "the whole model" if training is not None else "coefficients"
        best = min(perplexity for _, perplexity in held_out)
        lines.append(
            f"{what} in {whole['steps']} steps of {settings['batch']} x {settings['context']} tokens, held-out "
            f"perplexity {held_out[0][1]:.4g} -> {best:.4g} (unquantized {whole['teacher_perplexity']:.4g})"
        )
    return [f"{'trained' if number == 0 else 'then'}: {line}" for number, line in enumerate(lines)]


def _bits(reports: list[dict[str, Any]]) -> float:
    weights = sum(report["weights"] for report in reports)
    return 8 * sum(report["stored_bytes"] for report in reports) / weights if weights else 0.0


def _part(reports: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(report[key] for report in reports) for key in _SUMS}
    weights = sums["weights"] or 1
    return {
        "tensors": len(reports),
        "weights": sums["weights"],
        "nominal_bits": sum(report["nominal_bits"] * report["weights"] for report in reports) / weights,
        "stored_bits": _bits(reports),
        "relative_error": sums["squared_error"] / sums["squared_norm"] if sums["squared_norm"] else 0.0,
    }


def _lossless(done: list[dict[str, Any]], packed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many packed tensors give every weight exactly, whether all of the model does, and which was to."""
    exact = sum(report.get("lossless") is True for report in packed)
    scaled = any("transformation" in report for report in done)
    return {
        "tensors": exact,
        "whole": bool(packed) and exact == len(packed) and not scaled,
        "failed": sum("not_lossless" in report for report in packed),
    }


def _lossless_lines(total: Mapping[str, Any]) -> list[str]:
    found, packed = total["lossless"], total["packed"]["tensors"]
    lines = []
    if found["whole"] and total["status"] == "complete":
        lines.append("lossless       every weight has the value that it has in the source")
    elif found["tensors"]:
        lines.append(f"lossless       {found['tensors']} of {packed} packed tensors; the others are not")
    if found["failed"]:
        lines.append(
            f"NOT LOSSLESS   {found['failed']} tensors have more levels than their sampled rows showed, and were "
            "packed with a loss; `inspect STORE TENSOR` says where (not_lossless)"
        )
    return lines


def _additions_saved(packed: list[dict[str, Any]]) -> float | None:
    """Return the share of additions that a machine skipping zeros saves in {0, 1} planes; None where there are none."""
    known = [report for report in packed if "additions_saved" in report]
    weights = sum(report["weights"] for report in known)
    return sum(report["additions_saved"] * report["weights"] for report in known) / weights if weights else None


def table(found: dict[str, Any], experts: bool = False) -> str:
    """Return an inspection as text: a line a tensor, then the whole.

    experts: a line for each expert's matrices; else one for a kind of all experts of a layer.
    """
    lines = [("tensor", "shape", "method", "groups", "nominal", "stored", "rel. error", "time")]
    tensors = found["tensors"] if experts else by_kind(found["tensors"])
    for name, report in tensors.items():
        if report["status"] != "complete":
            count = f"{report['missing']} of {report['experts']} " if "experts" in report else ""
            lines.append((name, "", f"{count}missing", "", "", "", "", ""))
            continue
        seconds = report["seconds"]
        kept = report["method"] == KEEP.method
        lines.append(
            (
                name,
                " x ".join(map(str, report["shape"])),
                report["method"],
                "" if kept else str(report["groups"]),
                "" if kept else f"{report['nominal_bits']:.3f}",
                f"{report['stored_bits']:.3f}",
                "" if kept else f"{report['relative_error']:.3g}",
                "" if seconds is None else f"{seconds:.3f} s",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    worst = [_worst_expert(tensors)] if len(tensors) < len(found["tensors"]) else []
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", *worst, *totals(found["total"])])


def _worst_expert(kinds: dict[str, dict[str, Any]]) -> str:
    """Return a line that says what * stands for, and which expert's matrix has the greatest error."""
    done = {name: kind for name, kind in kinds.items() if "worst_error" in kind}
    note = "* stands for every expert of a layer (--experts: a line for each)"
    if not done:
        return note
    name = max(done, key=lambda name: (done[name]["worst_error"], name))
    matrix = name.replace("*", str(done[name]["worst_expert"]))
    return f"{note}; greatest error of one: {matrix}, {done[name]['worst_error']:.3g}"


def totals(total: dict[str, Any]) -> list[str]:
    """Return the whole-model lines of an inspection."""
    lines = []
    binary = total["binary"]
    if binary["tensors"]:
        lines.append(
            f"binary planes  {binary['tensors']} tensors, {binary['weights']:,} weights: "
            f"stored {binary['stored_bits']:.3f} bits "
            f"(nominal, the paper's formula: {binary['nominal_bits']:.3f}), "
            f"relative squared error {binary['relative_error']:.3g}"
        )
    if total["ranks"]:
        least, most = total["ranks"][0], total["ranks"][-1]
        ranks = f"rank {least}" if least == most else f"ranks {least} to {most}"
        lines.append(f"low rank       {len(total['ranks'])} tensors as two factors of ±1, {ranks}")
    if total["additions_saved"] is not None:
        lines.append(
            f"{{0, 1}} planes  hardware that skips zeros would save {100 * total['additions_saved']:.1f}% of the "
            "additions (these kernels do not skip any: they work on whole words of a plane)"
        )
    lines.append(
        f"whole model    {total['complete']} tensors, {total['weights']:,} weights: "
        f"stored {total['stored_bits']:.3f} bits, "
        f"embeddings, norms and head as stored; {total['store_bytes']:,} bytes in the store"
    )
    if total["laid_out"]:
        from cpu_kernels.matmul.prepacking import described

        lines += [
            f"laid out       for {described(form)}, too: {nbytes:,} bytes more in the file"
            for form, nbytes in total["laid_out"].items()
        ]
    lines += _lossless_lines(total)
    if total["status"] != "complete":
        missing = total["tensors"] - total["complete"]
        lines.append(f"NOT COMPLETE: {missing} tensors missing; run the same `bincompress compress` again to finish")
    if total["source_formats"]:
        listed = ", ".join(f"{count} tensors from {name}" for name, count in total["source_formats"].items())
        lines.append(f"quantized source, dequantized as it was read: {listed}")
    lines += total["trained"]
    lines += [f"NOT FINITE: {name}: {problem}; it will not run" for name, problem in total["not_finite"].items()]
    lines += [f"failed: {name}: {cause.removeprefix(f'{name}: ')}" for name, cause in total["failures"].items()]
    return lines
