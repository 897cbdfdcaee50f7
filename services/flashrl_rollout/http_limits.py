"""Limits on the head of an HTTP request, which the server itself does not set: its bytes and its time.

Knows connections; knows nothing of bodies (`middleware`) or routes.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flashrl_rollout.middleware import error_content
from flashrl_wire.errors import TooLargeError

MAX_HEAD_BYTES = 64 << 10
"""Of request line and headers; what arrives in the same piece as the end of a head is not counted."""
HEAD_TIMEOUT_S = 30.0


class LimitedHttp(HttpToolsProtocol):
    """413 for a head without end, and a silent end for a connection that never gets to the end of one."""

    _head_timeout_s = HEAD_TIMEOUT_S

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a first head."""
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)  # type: ignore[arg-type]
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse, and give up where still no head is whole."""
        was_in_head = self._head_timer is not None
        super().data_received(data)
        if was_in_head and self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse()

    def _begin_head(self) -> None:
        self._end_head()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._head_timeout_s, self.transport.close)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self) -> None:
        error = TooLargeError(f"the request's headers have more than {MAX_HEAD_BYTES} bytes")
        content = error_content(error, "")
        head = f"HTTP/1.1 {error.status} Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        self.transport.close()
