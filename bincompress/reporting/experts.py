"""Matrices of experts as lines of a table: one for all experts' matrices of a kind, as a model has thousands."""

import re
from collections.abc import Mapping
from typing import Any

_EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..*)$")
_SUMS = ("weights", "stored_bytes", "squared_error", "squared_norm")
_MEANS = ("nominal_bits", "stored_bits", "output_error")  # by weights


def by_kind(tensors: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the reports of an inspection, those of a layer's experts together under a name with * for the expert.

    Such a report has sums of weights, bytes, errors and seconds, means of bits, and the worst expert with its error. A
    kind of which a matrix is missing is missing.
    """
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    places: dict[str, str] = {}
    for name in tensors:
        match = _EXPERT.match(name)
        places[name] = f"{match[1]}*{match[3]}" if match else name
        if match:
            groups.setdefault(places[name], {})[int(match[2])] = tensors[name]
    return {place: _together(groups[place]) if place in groups else tensors[name] for name, place in places.items()}


def _together(experts: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    reports = list(experts.values())
    missing = sum(report["status"] != "complete" for report in reports)
    if missing:
        return {"method": None, "status": "missing", "experts": len(reports), "missing": missing}
    sums = {key: sum(report[key] for report in reports) for key in _SUMS}
    weights = max(1, sums["weights"])
    means = {
        key: sum(report[key] * report["weights"] for report in reports) / weights
        for key in _MEANS
        if all(key in report for report in reports)
    }
    worst = max(experts, key=lambda expert: (experts[expert]["relative_error"], -expert))
    seconds = [report["seconds"] for report in reports]
    shapes = {tuple(report["shape"]) for report in reports}
    groups = sorted({report["groups"] for report in reports})
    return {
        **sums,
        **means,
        "method": ", ".join(sorted({report["method"] for report in reports})),
        "status": "complete",
        "experts": len(reports),
        "shape": [len(reports), *(shapes.pop() if len(shapes) == 1 else ())],
        "groups": groups[0] if len(groups) == 1 else f"{groups[0]} to {groups[-1]}",
        "relative_error": sums["squared_error"] / sums["squared_norm"] if sums["squared_norm"] else 0.0,
        "worst_expert": worst,
        "worst_error": experts[worst]["relative_error"],
        "seconds": None if None in seconds else sum(seconds),
    }
