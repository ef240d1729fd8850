"""The texts of one HTTP request, from the scheduler's thread to the event loop and to a client that may go away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bincompress.errors import BincompressError
from bincompress.inference.generate import TooLongError
from bincompress.inference.request_fields import FieldError
from bincompress.inference.scheduler import BusyError, ClosedError, Scheduler
from bincompress.inference.sequence import CancelledError, DeadlineError, Ended, Piece, PromptRead, Request
from bincompress.model.errors import PromptError, SamplingError, TemplateError
from bincompress.serving.reading import RequestError
from bincompress.serving.service import log

Event = PromptRead | Piece | Ended
Found = TypeVar("Found")
_LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class Texts:
    """Texts that were asked for together; leaving the block cancels what is not finished."""

    def __init__(self, scheduler: Scheduler, asked: Sequence[Request]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = len(asked)
        try:
            self._texts = scheduler.submit([(request, self._listener(n)) for n, request in enumerate(asked)])
        except Exception as error:
            raise refused(error, scheduler) from error

    def _listener(self, number: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would be told
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return tell

    def __enter__(self) -> "Texts":
        return self

    def __exit__(self, *error: object) -> None:
        for text in self._texts:
            text.cancel()
        self._texts.clear()  # each knows who listens, which is this: nothing is to wait for the collector of cycles

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield which text it is and what is told of it, until all have ended; raise RequestError where one failed."""
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, Ended):
                self._open -= 1
                if event.error is not None:
                    found = refused(event.error)
                    if found.status == 500:
                        log.error("a text failed", exc_info=event.error)
                    raise found
            yield number, event


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
    """An answer in chunks, as they are made; the maker is closed when the client goes away."""

    def __init__(self, chunks: AsyncIterator[bytes], media_type: str) -> None:
        self.chunks = chunks
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
            await while_connected(receive, self._send(send))
        except RequestError:
            return  # there is no one to be told
        finally:
            await self.chunks.aclose()  # type: ignore[attr-defined]
            self.ended()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def of_request(request: HttpRequest) -> Any:
    """Return the service that a request belongs to."""
    return request.app.state.service
