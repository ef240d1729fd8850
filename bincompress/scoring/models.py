"""A model that is scored: a store as the engine runs it, or an unquantized checkpoint in float32."""

from collections.abc import Mapping
from dataclasses import dataclass

from bincompress.errors import BincompressError
from bincompress.inference.chat import load_template
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import default_sampling, load_baseline, load_decoder
from bincompress.model.added_tokens import special_tokens
from bincompress.model.cache import cache_type
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import Tokenizer, load_tokenizer
from bincompress.sources.hub import is_checkpoint, open_source


@dataclass(frozen=True)
class Scored:
    """A model with what scores depend on."""

    model: Model
    activations: str  # how they are rounded, in words
    prefix_token: int | None  # the tokenizer's beginning-of-text token, else its end-of-text token


def load_scored(
    place: str,
    threads: int | None = None,
    settings: ActivationSettings = ActivationSettings(),
    kernel: str | None = None,
    memory: int | None = None,
    baseline: bool = False,
    kv_bits: int = 16,
) -> Scored:
    """Load a store, or an unquantized checkpoint folder or GGUF file, which runs in float32.

    threads, settings, kernel, memory: as for `load`. Keys and values of a store are kept as `generate` and `serve` keep
    them, in so many bits. baseline: only an unquantized checkpoint will do, also a Hub id. Raises the errors of `load`,
    or CheckpointError.
    """
    if baseline or is_checkpoint(place):
        source = open_source(place)
        assets, decoder = source.assets(), load_baseline(source, threads)
        activations, defaults = "float32", GenerationSettings(sampling=default_sampling(assets), cache="float32")
    else:
        kept = cache_type(kv_bits)
        loaded = load_decoder(place, threads, settings, kernel, memory)
        assets, decoder = loaded.assets, loaded.decoder
        activations = activations_of(settings) + ("" if kv_bits == 16 else f", keys and values {kv_bits} bits")
        defaults = GenerationSettings(sampling=default_sampling(assets), cache=kept)
    if "tokenizer.json" not in assets:
        raise BincompressError(f"{place}: has no tokenizer.json, so it cannot read text; add it to the checkpoint")
    tokenizer = load_tokenizer(assets)
    model = Model(decoder, tokenizer, load_template(assets), defaults)
    return Scored(model, activations, _prefix_token(tokenizer, assets))


def activations_of(settings: ActivationSettings) -> str:
    """Return in words how a store's activations are rounded."""
    return "float32" if settings.bits == 16 else f"{settings.bits} bits per {settings.per}"


def _prefix_token(tokenizer: Tokenizer, assets: Mapping[str, bytes]) -> int | None:
    """Return the token that transformers' tokenizer names first; config.json counts where it names none."""
    texts = special_tokens(assets).texts
    named = [tokenizer.id_of(texts[name]) for name in ("bos_token", "eos_token") if name in texts]
    known = (*named, tokenizer.bos_id, min(tokenizer.eos_ids, default=None))
    return next((token for token in known if token is not None), None)
