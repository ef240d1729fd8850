"""What lm-evaluation-harness asks of a model, apart from its base class: this module does not import the harness."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from bincompress import __version__
from bincompress.model.errors import PromptError, TemplateError
from bincompress.model.packed_linear import ActivationSettings
from bincompress.scoring.models import load_scored
from bincompress.scoring.scorer import Progress, Scorer

_AUTO_AT_ONCE = 8


class Instance(Protocol):
    """A request; what it holds depends on the method that it is for."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The request."""


class HarnessRequests:
    """Answers requests of lm-evaluation-harness with a store, or an unquantized checkpoint in float32."""

    cache_hook: Any = None  # the harness's, which writes answers down as they come

    def __init__(
        self,
        store: str,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        threads: int | None = None,
        activation_bits: int = 8,
        activation_scale: str = "segment",
        kernel: str | None = None,
        memory: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load the model.

        store: a store, a checkpoint folder or a .gguf file. batch_size: contexts that share a pass over the weights, or
        "auto"; continuations of one context always do. max_length, max_gen_toks, prefix_token_id, add_bos_token: as the
        harness's `hf` backend has them. threads to memory: as for `bincompress.load`. max_batch_size, device: which the
        harness always gives; they change nothing, as there is one device and "auto" is a fixed number.
        """
        settings = ActivationSettings(activation_bits, activation_scale)  # type: ignore[arg-type]
        at_once = _AUTO_AT_ONCE if str(batch_size).startswith("auto") else batch_size
        if not str(at_once).isdecimal():
            raise PromptError(f'batch_size: expected a number or "auto", found {batch_size!r:.40}')
        if memory is not None and type(memory) is not int:
            raise PromptError(f"memory: expected a number of bytes, found {memory!r:.40}")
        scored = load_scored(store, threads, settings, kernel, memory)
        self.scorer = Scorer(scored, max_length, int(at_once), prefix_token_id, add_bos_token)
        self._store, self._activations = store, scored.activations
        self._max_gen_toks = max_gen_toks

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log probability of each (context, continuation), and whether greedy decoding writes it."""
        asked = [request.args for request in requests]
        with _bar("loglikelihood", len(asked), disable_tqdm) as progress:
            found = self.scorer.loglikelihood([(context, text) for context, text in asked], progress)
        return self._noted("loglikelihood", asked, found)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each whole text."""
        asked = [request.args for request in requests]
        with _bar("loglikelihood_rolling", None, disable_tqdm) as progress:
            found = self.scorer.rolling([text for (text,) in asked], progress)
        return self._noted("loglikelihood_rolling", asked, found)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each (context, generation_kwargs)."""
        asked = [request.args for request in requests]
        with _bar("generate_until", len(asked), disable_tqdm) as progress:
            texts = self.scorer.generate([(context, wanted) for context, wanted in asked], progress, self._max_gen_toks)
        return self._noted("generate_until", asked, texts)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's template writes it."""
        return self.scorer.rendered(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's template for the harness's records; None where it is not asked for."""
        if chat_template is False or chat_template is None:
            return None
        template = self.scorer.model.template
        if template is None:
            raise TemplateError("the model has no chat template; leave --apply_chat_template out")
        if isinstance(chat_template, str) and chat_template != "default":
            raise TemplateError(f"chat template: expected 'default', the one that is used, found {chat_template!r:.40}")
        return template.source

    @property
    def tokenizer_name(self) -> str:
        """What tells this model's requests from others in the harness's cache."""
        return self._store.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside the results."""
        model = self.scorer.model
        return {
            "model_store": self._store,
            "model_activations": self._activations,
            "model_cache": model.defaults.cache,
            "model_max_length": self.scorer.max_length,
            "bincompress_version": __version__,
        }

    def _noted(self, kind: str, asked: Sequence[tuple[Any, ...]], found: list[Any]) -> list[Any]:
        if self.cache_hook is not None:
            for request, answer in zip(asked, found, strict=True):
                self.cache_hook.add_partial(kind, request, answer)
        return found


@contextlib.contextmanager
def _bar(title: str, total: int | None, hidden: bool) -> Iterator[Progress]:
    """Draw a progress bar; yield what is to be called with the number of requests that are done."""
    with tqdm(desc=title, total=total, disable=True if hidden else None) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        yield progress
