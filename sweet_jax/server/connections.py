"""Connections that say nothing: closed in time, so that they take nobody's place."""

import asyncio
from typing import Any, cast

import uvicorn


def close_silent_connections(settings: uvicorn.Config, timeout: float) -> None:
    """Has the server of these settings close a connection without a request, see `_Watched`.

    uvicorn itself closes one that is silent after an answer (`timeout_keep_alive`), and not one
    whose first request, or whose next one's head, does not come.
    """
    settings.load()
    protocol = cast("Any", settings.http_protocol_class)
    values = {"silence_timeout": timeout}
    settings.http_protocol_class = type("WatchedProtocol", (_Watched, protocol), values)


class _Watched(asyncio.Protocol):
    """Closes a connection on which a timeout, or two at most, passed without a request.

    A request is one whose head is complete; how long it takes from there is the application's.
    """

    silence_timeout: float
    transport: asyncio.Transport
    cycle: Any = None  # uvicorn's: the newest request and its answer
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch(None)

    def _watch(self, before: Any) -> None:
        """Waits for one timeout; `before` is the newest request when it begins."""
        self.loop.call_later(self.silence_timeout, self._check, before)

    def _check(self, before: Any) -> None:
        if self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is before:
            self.transport.close()
        else:
            self._watch(self.cycle)
