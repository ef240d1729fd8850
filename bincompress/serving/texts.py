"""The texts of one HTTP request, from the scheduler's thread to a client that may go away."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from bincompress.errors import BincompressError
from bincompress.inference.generate import TooLongError
from bincompress.inference.request_fields import FieldError
from bincompress.inference.scheduler import BusyError, ClosedError, Scheduler
from bincompress.inference.sequence import CancelledError, DeadlineError, Ended, Piece, PromptRead, Request
from bincompress.model.errors import PromptError, SamplingError, TemplateError
from bincompress.serving.outlet import Outlet
from bincompress.serving.reading import RequestError
from bincompress.serving.service import log

Event = PromptRead | Piece | Ended
Found = TypeVar("Found")
_LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class Made(Protocol):
    """An answer that is being made of what is told of its texts; the scheduler's thread calls all but `complete`."""

    def note(self, number: int, event: Event) -> None:
        """Note what is told of one of the texts."""

    def chunk(self, number: int, event: Event) -> bytes:
        """Return what a stream says of it, perhaps nothing; it was noted before."""

    def begin(self) -> bytes:
        """Return what a stream begins with."""

    def end(self) -> bytes:
        """Return what a stream ends with once all texts have ended."""

    def failed(self, error: RequestError) -> bytes:
        """Return what a stream ends with where a text failed."""

    def complete(self) -> dict[str, Any]:
        """Return the answer as a whole, once all texts have ended."""


class Texts:
    """Texts that were asked for together; leaving the block cancels what is not finished."""

    def __init__(
        self,
        scheduler: Scheduler,
        asked: Sequence[Request],
        tell: Callable[[int, Event], None],
        done: Callable[[RequestError | None], None],
    ) -> None:
        """tell, done: are called in the scheduler's thread; done, at last: with the error, where a text failed."""
        self._tell, self._done = tell, done
        self._open = len(asked)
        try:
            self._texts = scheduler.submit([(request, self._listener(n)) for n, request in enumerate(asked)])
        except Exception as error:
            raise refused(error, scheduler) from error

    def _listener(self, number: int) -> Callable[[Event], None]:
        return lambda event: self._heard(number, event)

    def _heard(self, number: int, event: Event) -> None:
        if not self._open:
            return  # one has failed
        try:
            if isinstance(event, Ended) and event.error is not None:
                raise event.error
            self._tell(number, event)
            if isinstance(event, Ended):
                self._open -= 1
                if not self._open:
                    self._done(None)
        except Exception as error:
            self._open = 0
            found = refused(error)
            if found.status == 500:
                log.error("a text failed", exc_info=error)
            self._done(found)

    def __enter__(self) -> "Texts":
        return self

    def __exit__(self, *error: object) -> None:
        for text in self._texts:
            text.cancel()
        self._texts.clear()  # each knows who listens, which is this: nothing is to wait for the collector of cycles


async def respond(
    http: HttpRequest, scheduler: Scheduler, asked: Sequence[Request], answer: Made, stream: str | None
) -> Response:
    """Return the answer to a request: as JSON once it is whole, or as a stream of a media type."""
    http.state.answer = answer
    if stream is not None:
        return _streamed(scheduler, asked, answer, stream)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: RequestError | None) -> None:
        if not ended.done():
            ended.set_result(None) if error is None else ended.set_exception(error)

    def done(error: RequestError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would be told
            loop.call_soon_threadsafe(settle, error)

    with Texts(scheduler, asked, answer.note, done):
        await while_connected(http.receive, ended)
    return JSONResponse(answer.complete())


def _streamed(scheduler: Scheduler, asked: Sequence[Request], answer: Made, media_type: str) -> "Streamed":
    outlet = Outlet()
    outlet.put(answer.begin())

    def tell(number: int, event: Event) -> None:
        answer.note(number, event)
        if data := answer.chunk(number, event):
            outlet.put(data)

    def done(error: RequestError | None) -> None:
        outlet.put(answer.end() if error is None else answer.failed(error), last=True)

    return Streamed(Texts(scheduler, asked, tell, done), outlet, media_type)


def refused(error: Exception, scheduler: Scheduler | None = None) -> RequestError:
    """Return what a client is told of an error."""
    match error:
        case RequestError():
            return error
        case FieldError():
            return RequestError(400, error.message, error.param)
        case BusyError():
            return RequestError(429, str(error), retry_after=_wait(scheduler))
        case ClosedError() | CancelledError():
            return RequestError(503, "the server is ending", retry_after=1)
        case DeadlineError():
            return RequestError(504, str(error))
        case TooLongError():
            return RequestError(400, str(error), "messages")
        case PromptError() | SamplingError() | TemplateError():
            return RequestError(400, str(error))
        case MemoryError():
            return RequestError(503, "not enough memory for this text; try again later", retry_after=10)
        case BincompressError():
            return RequestError(500, str(error))
    return RequestError(500, f"this is a fault of bincompress: {type(error).__name__}; the server's log says more")


def _wait(scheduler: Scheduler | None) -> int:
    """Return seconds after which to try again: what waiting texts take, as far as the last ones tell."""
    if scheduler is None or not scheduler.counts.written:
        return 1
    waiting = scheduler.counts.busy_seconds / max(1, scheduler.counts.finished) * (1 + scheduler.waiting)
    return int(min(max(1.0, waiting), _LONGEST_WAIT))


async def while_connected(receive: Receive, work: Awaitable[Found]) -> Found:
    """Return what comes of some work; it is cancelled, and RequestError raised, when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "the client is gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """An answer that is sent as it is made; its texts are cancelled when the client goes away."""

    def __init__(self, texts: Texts, outlet: Outlet, media_type: str) -> None:
        self._texts, self._outlet = texts, outlet
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.body = b""
        self.ended: Callable[[], None] = lambda: None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            with self._texts:
                await while_connected(receive, self._send(scope, send))
        except RequestError:
            return  # there is no one to be told
        finally:
            self._outlet.close()
            self.ended()

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._outlet.send_to(scope, send)


def of_request(request: HttpRequest) -> Any:
    """Return the service that a request belongs to."""
    return request.app.state.service
