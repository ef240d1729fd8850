"""The model that is served, from before it is loaded until the server ends."""

import asyncio
import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from bincompress.errors import BincompressError
from bincompress.inference.constraint import Grammars
from bincompress.inference.generate import Model
from bincompress.inference.request_fields import shown
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.serving.metrics import Metrics
from bincompress.serving.reading import RequestError
from bincompress.serving.settings import ServeSettings

_READERS = 4

log = logging.getLogger("bincompress.serve")


class Service:
    """Loads a model in a thread of its own, and answers for what is asked before it is there."""

    def __init__(self, settings: ServeSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits
        self.created = int(time.time())
        self.load_seconds = 0.0
        self.facts: dict[str, object] = {}  # about the store, for the page
        self.failure: BaseException | None = None
        self.scheduler: Scheduler | None = None
        self.metrics = Metrics(lambda: self.scheduler)
        self.body_bytes = 0  # of requests that are being read; the event loop's thread alone changes it
        # Making tokens of a long text takes seconds; so many texts at a time, so that the model is not held up.
        self.embedding = asyncio.Semaphore(1)
        self.readers = ThreadPoolExecutor(_READERS, "read")
        self.compilers = ThreadPoolExecutor(1, "grammar")
        self.compiling = (
            0  # requests whose grammars are compiled or wait for it; the event loop's thread alone changes it
        )
        self._grammars: Grammars | None = None

    def load(self, load: Callable[[], Model], failed: Callable[[], None]) -> None:
        """Begin to load the model; `failed` is called, in the thread that loads, where it cannot be."""

        def run() -> None:
            begin = time.monotonic()
            try:
                model = load()
                self._grammars = Grammars(model.tokenizer, model.decoder.config.vocab)
                self._prepare_grammars(self._grammars)
                self.scheduler = Scheduler(model, self.limits)
                self.load_seconds = time.monotonic() - begin
                log.info("the model is loaded: %.1f s", self.load_seconds)
            except BaseException as error:
                self.failure = error
                failed()

        threading.Thread(target=run, name="load", daemon=True).start()

    @staticmethod
    def _prepare_grammars(grammars: Grammars) -> None:
        """Make what grammars need before anyone is answered; where it cannot be, only they are refused, each time."""
        if importlib.util.find_spec("llguidance") is None:
            return
        try:
            grammars.prepare()
        except BincompressError as error:
            log.warning("answers of a given form are refused: %s", error)

    @property
    def most_body(self) -> int:
        """The most bytes of a request."""
        given = self.settings.most_body
        return (64 << 10) + 64 * self.limits.context if given is None else given

    def ready(self) -> Scheduler:
        """Return the scheduler; raise RequestError while there is none."""
        if self.scheduler is None:
            raise RequestError(503, "the model is being loaded; try again later", retry_after=1)
        return self.scheduler

    @property
    def model(self) -> Model:
        """The model; raises RequestError while there is none."""
        return self.ready().model

    @property
    def grammars(self) -> Grammars:
        """What compiles grammars for the model's tokens; raises RequestError while there is no model."""
        self.ready()
        assert self._grammars is not None
        return self._grammars

    def unknown_model(self, name: str) -> NoReturn:
        """Refuse a request for another model."""
        raise RequestError(
            404, f"model {shown(name)} is not served here; expected {self.settings.model_name!r}", "model"
        )

    def close(self) -> None:
        """Let the texts at hand be finished or cancel them, within `closing_seconds`."""
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.compilers.shutdown(wait=False, cancel_futures=True)
        if self.scheduler is not None:
            self.scheduler.close(self.settings.closing_seconds)
