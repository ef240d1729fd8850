"""Connections that do nothing are ended: those that never ask, and those that never read what they asked for."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from bincompress.serving.outlet import CONNECTION


def bounded_protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol, which aborts a connection that stalls for so many seconds."""

    class Bounded(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            app = self.app

            async def connected(scope: Any, receive: Any, send: Any) -> None:
                await app({**scope, CONNECTION: self.transport}, receive, send)

            self.app = connected

        _timer: asyncio.TimerHandle | None = None
        _waits = False  # for the rest of a request's headers, or of a body that no one reads any more

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self.limit_concurrency and len(self.connections) > 2 * self.limit_concurrency:
                self.transport.abort()
            else:
                self._set(self._if_stalled)

        def _if_stalled(self) -> None:
            # uvicorn bounds the time between requests; the time to the first one, and to the end of a request's
            # headers, is bounded here.
            complete = self.cycle is not None and self.cycle.response_complete and self.timeout_keep_alive_task is None
            if self.cycle is None or (complete and self._waits):
                self.transport.abort()
                return
            self._waits = complete
            self._set(self._if_stalled)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._set(self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._set(self._if_stalled)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _set(self, action: Any) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, action)

    return Bounded
