"""What does a model card say of a store: what it was made of, what it takes, how good it is, how to check it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bincompress import __version__
from bincompress.compression.recipe import not_given
from bincompress.errors import BincompressError
from bincompress.methods import KEEP, embeddings, method_named
from bincompress.reporting.inspection import inspect
from bincompress.store.hub import FILE
from bincompress.store.layout import SEAL
from bincompress.store.store import Store

_NUMBERS = ("perplexity", "baseline_perplexity", "kl_divergence", "top1_agreement")


@dataclass(frozen=True)
class Facts:
    """What a card says that the store does not."""

    repo: str  # where it is to be uploaded
    base: str | None  # the Hub id of the model that it was made from
    revision: str | None  # the commit of that
    licence: Mapping[str, str]  # by the card's keys
    evaluations: Sequence[Mapping[str, Any]]  # as `evaluate --json` prints them
    sha256: str  # of the packed file
    nbytes: int


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return what `evaluate --json` has printed into a file; raises BincompressError where it is not that."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BincompressError(f"{path}: not readable as JSON: {error}") from None
    wanted = isinstance(found, dict) and isinstance(found.get("text"), str)
    for key in (*_NUMBERS, "tokens") if wanted else ():
        value = found.get(key)
        optional = key not in ("perplexity", "tokens")
        if isinstance(value, bool) or not (isinstance(value, int | float) or (optional and value is None)):
            wanted = False
    if not wanted:
        raise BincompressError(f"{path}: expected what `bincompress evaluate STORE --text FILE --json` prints")
    return dict(found)


def model_card(store: Store, facts: Facts) -> str:
    """Return a store's README.md: metadata of the Hub, then the page."""
    import huggingface_hub

    fields: dict[str, Any] = dict(facts.licence)
    if facts.base:
        fields |= {"base_model": facts.base, "base_model_relation": "quantized"}
    data = huggingface_hub.ModelCardData(
        library_name="bincompress", pipeline_tag="text-generation", tags=["bincompress"], **fields
    )
    parts = (_head(store, facts), _quality(facts), _use(facts), _made(store, facts), _check(store, facts))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _head(store: Store, facts: Facts) -> str:
    total = inspect(store)["total"]
    binary = total["binary"]
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else f"`{total['source']['id']}`"
    lines = [
        f"# {facts.repo.split('/')[-1]}",
        "",
        f"{base} in binary planes, made with bincompress. It runs on CPUs, from this one file.",
        "",
        "| | |",
        "|---|---|",
        f"| file | `{FILE}`, {facts.nbytes / 1e6:,.1f} MB |",
        f"| stored bits a weight, whole model | {total['stored_bits']:.3f} ({total['weights']:,} weights) |",
        f"| stored bits a weight, binary planes | {binary['stored_bits']:.3f} ({binary['weights']:,} weights) |",
        f"| relative squared error of the planes | {binary['relative_error']:.3g} |",
    ]
    lines += [f"| {line.split(': ', 1)[0]} | {line.split(': ', 1)[1]} |" for line in total["trained"]]
    return "\n".join(lines)


def _quality(facts: Facts) -> str:
    if not facts.evaluations:
        return "## Quality\n\nNot evaluated."
    lines = [
        "## Quality",
        "",
        "| text | tokens scored | perplexity | unquantized | ratio | KL divergence, nats | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in facts.evaluations:
        base, kl, same = (found.get(key) for key in _NUMBERS[1:])
        ratio = f"{found['perplexity'] / base:.3f}" if base else ""
        lines.append(
            f"| {Path(found['text']).name.replace('|', ' ')} | {found['tokens']:,} | {found['perplexity']:.4f} | "
            f"{f'{base:.4f}' if base else ''} | {ratio} | {'' if kl is None else f'{kl:.5f}'} | "
            f"{'' if same is None else f'{100 * same:.2f}%'} |"
        )
    return "\n".join(lines)


def _use(facts: Facts) -> str:
    return f"""## Run

    pip install bincompress
    bincompress generate {facts.repo} "The scheduler" --max-tokens 60
    bincompress chat {facts.repo}

In Python:

    import bincompress
    model = bincompress.load("{facts.repo}")
    print("".join(model.stream("The scheduler")))"""


def _made(store: Store, facts: Facts) -> str:
    """Return the recipe and the command; what a command cannot say stands beside it."""
    attributes = store.attributes
    source = facts.base or attributes["source"]["id"]
    revision = f"@{facts.revision}" if facts.base and facts.revision else ""
    command = f"bincompress compress {source}{revision} ./store --recipe recipe.toml"
    notes = []
    statistics = attributes.get("statistics")
    if isinstance(statistics, dict):
        command += f" --sequential TEXT --samples {statistics.get('samples')} --context {statistics.get('context')}"
    elif statistics:
        command += " --stats STATS"
        notes.append("STATS are the statistics of `bincompress calibrate`, which are not part of the store.")
    if attributes.get("keep_weights"):
        command += " --keep-weights kept.txt"
        kept = [f"{name} {r} {c}" for name, places in attributes["keep_weights"].items() for r, c in places]
        notes.append("kept.txt:\n\n" + "\n".join(f"    {line}" for line in kept))
    command += " --archive" if attributes.get("archive") else ""
    if {"training", "distillation"} & set(attributes):
        notes.append("The store was trained after that (see above), so this command alone does not give its bytes.")
    recipe = "\n".join(f"    {line}".rstrip() for line in recipe_toml(attributes["recipe"]).splitlines())
    return "\n\n".join(["## How it was made", f"    {command}", "recipe.toml:", recipe, *notes])


def recipe_toml(record: Mapping[str, Any]) -> str:
    """Return a store's record of its recipe as the TOML file that gives it."""
    defaults = dict(record["defaults"])
    method = str(defaults.pop("method", KEEP.method))
    own: set[str] = set()
    used = [method, embeddings()[record["embeddings"]].method, *(t.get("method", "") for t in record["tensor"])]
    for name in used:
        own |= set() if name in ("", KEEP.method) else set(method_named(name).options())
    lines = ["[defaults]", f"method = {json.dumps(method)}"]
    lines += [f"{k} = {json.dumps(v)}" for k, v in defaults.items() if k in own and not not_given(k, v)]
    lines.append(f"embeddings = {json.dumps(record['embeddings'])}")
    for tensor in record["tensor"]:
        lines += ["", "[[tensor]]", *(f"{key} = {json.dumps(value)}" for key, value in tensor.items())]
    return "\n".join(lines)


def _check(store: Store, facts: Facts) -> str:
    source, seal = store.attributes["source"], store.attributes.get(SEAL) or {}
    lines = ["## Check it", "", f"    bincompress verify {facts.repo}"]
    trained = {"training", "distillation"} & set(store.attributes)
    sequential = isinstance(store.attributes.get("statistics"), dict)
    if facts.base and not trained and not sequential:
        revision = f"@{facts.revision}" if facts.revision else ""
        statistics = " --statistics STATS" if store.attributes.get("statistics") else ""
        lines.append(f"    bincompress verify {facts.repo} --source {facts.base}{revision} --sample 20{statistics}")
    lines += [
        "",
        "The first holds every byte against its hash. The second, where it stands here, makes tensors from the "
        "unquantized model once more, and compares every byte.",
        "",
        "| fingerprint | |",
        "|---|---|",
        f"| SHA-256 of `{FILE}` | `{facts.sha256}` |",
        f"| source: config and headers (xxh3-128) | `{source.get('fingerprint', '')}` |",
        f"| store: attributes of the root (xxh3-128) | `{seal.get('hash', '')}` |",
        f"| card written by | bincompress {__version__} |",
    ]
    return "\n".join(lines)
