"""Under which names does a checkpoint or a store hold the decoder's tensors, and which tensor is its output head?

config.json does not say: a bare model has no "model." before its names, the text part of a larger model has a longer
prefix, and a tied pair may be stored as either of its two or, wrongly, as two that differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
_ROOT = "model."  # what the registered names begin with
_PREFIXES = (_ROOT, "", "model.language_model.", "language_model.model.")


def settle(config: ModelConfig, found: Shapes, same: Callable[[str, str], bool]) -> ModelConfig:
    """Return the config with the names, and the head, that these tensors have.

    found: shapes by name. same: whether two tensors hold the same values; asked only where a tied head is stored
    beside the embedding. Where tensors are missing, the names that would be expected stay.
    """
    return _with_head(_with_prefix(config, found), found, same)


def _with_prefix(config: ModelConfig, found: Shapes) -> ModelConfig:
    """Return the config with the prefix under which most of the decoder's tensors are; the usual one where none is."""
    forms = [config, *(replace(config, names=names) for names in ARCHITECTURES[config.architecture].other_names)]
    known = [_prefixed(form, prefix, found) for form in forms for prefix in _PREFIXES]
    missing = [sum(name not in found for name in tried.tensors()) for tried in known]
    if min(missing):
        end = config.names.of_layer(0, f"{config.names.out}.weight").removeprefix(_ROOT)
        for prefix in sorted(name.removesuffix(end) for name in found if name.endswith(f".{end}")):
            for tried in (_prefixed(form, prefix, found) for form in forms):
                # A prefix that nobody knows has to fit in all, since a tower beside the decoder may look like one.
                if all(found.get(name) == shape for name, shape in tried.tensors().items()):
                    return tried
    return known[missing.index(min(missing))]


def _prefixed(config: ModelConfig, prefix: str, found: Shapes) -> ModelConfig:
    names = config.names

    def moved(name: str) -> str:
        return prefix + name.removeprefix(_ROOT)

    parts = prefix.split(".")[:-1]
    heads = (".".join([*parts[:depth], names.head]) for depth in range(len(parts) + 1))
    head = next((name for name in heads if name in found), names.head)
    layer, norm, embedding = moved(names.layer), moved(names.norm), moved(names.embedding)
    return replace(config, names=replace(names, embedding=embedding, norm=norm, layer=layer, head=head))


def _with_head(config: ModelConfig, found: Shapes, same: Callable[[str, str], bool]) -> ModelConfig:
    """Settle a tied head as transformers does: stored with other values it counts, and stored alone it is both."""
    names = config.names
    if not config.tied or names.head not in found:
        return config
    if names.embedding not in found:
        note = f"{names.embedding} is not stored; {names.head}, to which config.json ties it, is used as both"
        return replace(config, names=replace(names, embedding=names.head), notes=(*config.notes, note))
    if found[names.head] == found[names.embedding] and same(names.head, names.embedding):
        return config
    note = (
        f"config.json ties {names.head} to {names.embedding}, but both are stored with different values: "
        f"{names.head} is used"
    )
    return replace(config, tied=False, notes=(*config.notes, note))
