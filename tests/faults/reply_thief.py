"""An HTTP proxy that passes requests on, and keeps the replies that a test does not want to arrive.

Knows requests and connections; knows nothing of what they mean.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
from tests.helpers.forked import LIMIT_S

Steals = Callable[[str, str], bool]
"""Whether the reply to a method and path, which has come from the service by now, is kept."""


@contextmanager
def reply_thief(url: str, steals: Steals) -> Iterator[str]:
    """The address of a proxy before `url`, until the block ends."""
    with httpx.Client(base_url=url, timeout=LIMIT_S) as http:

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {"content-type": self.headers.get("content-type", "application/json")}
                try:
                    reply = http.request(self.command, self.path, content=body, headers=headers)
                except httpx.HTTPError:
                    return  # the connection closes without a word
                if not steals(self.command, self.path):
                    self.send_response(reply.status_code)
                    self.send_header("content-length", str(len(reply.content)))
                    self.end_headers()
                    self.wfile.write(reply.content)

            do_GET = do_POST = do_DELETE = _pass_on  # noqa: N815

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
