"""Closes connections that send no request, so that they do not block others."""

import asyncio
from typing import Any, cast

import uvicorn


def close_silent_connections(settings: uvicorn.Config, timeout: float) -> None:
    """Makes a server close connections that send no complete request head, see `_Watched`.

    uvicorn itself closes a connection that is silent after a response (`timeout_keep_alive`), but
    not one whose first request, or whose next request's head, remains incomplete.

    Args:
      settings: settings of the server, changed in place.
      timeout: timeout in seconds.

    """
    settings.load()
    protocol = cast("Any", settings.http_protocol_class)
    values = {"silence_timeout": timeout}
    settings.http_protocol_class = type("WatchedProtocol", (_Watched, protocol), values)


class _Watched(asyncio.Protocol):
    """Closes a connection without a request for one timeout, or at most two.

    Only requests with a complete head count. From there on, the application limits the time.
    """

    silence_timeout: float
    transport: asyncio.Transport
    cycle: Any = None  # set by uvicorn: the newest request and its response
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch(None)

    def _watch(self, before: Any) -> None:
        """Schedules a check after one timeout; `before` is the newest request at this time."""
        self.loop.call_later(self.silence_timeout, self._check, before)

    def _check(self, before: Any) -> None:
        if self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is before:
            self.transport.close()
        else:
            self._watch(self.cycle)
