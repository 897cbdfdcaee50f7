"""A service in a thread of the test's process: real HTTP, real ZeroMQ, and an engine that the test can reach into.

Knows how to start and stop one; knows nothing of what is tested.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from flashrl_rollout import startup
from flashrl_rollout.app import create_app
from flashrl_rollout.assembly import assemble
from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.service import Service
from flashrl_rollout.startup import Bound

LIMIT_S = 20.0


class LiveService:
    """Serves from `live` on; `engine` and `service` belong to its thread's event loop."""

    def __init__(
        self, make_engine: Callable[[], ScriptedEngine], config: RolloutConfig, token: str | None = None
    ) -> None:
        self.service = Service()
        self.engine: ScriptedEngine
        self._make_engine, self._config = make_engine, config
        self._bound: Bound = startup.bind(config, {} if token is None else {"FLASHRL_TOKEN": token})
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    @property
    def ports(self) -> tuple[int, int]:
        """HTTP and weights."""
        return self._bound.http_port, self._bound.receiver.port

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._bound.http_port}"

    def start(self) -> None:
        """Return once it is ready."""
        self._thread.start()
        assert self._ready.wait(LIMIT_S)

    def stop(self) -> None:
        """Return once its ports are free; harmless when repeated."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(LIMIT_S)

    async def _serve(self) -> None:
        self._loop, bound = asyncio.get_running_loop(), self._bound
        bound.receiver.start()
        self.engine = self._make_engine()
        app = create_app(self.service, token=bound.token, max_body_bytes=self._config.max_body_mib << 20)
        parts = await assemble(
            self._config, self.engine, bound.receiver, bound.stage_dir, self.service.metrics.count_update
        )
        self.service.parts = parts
        timekeeping = asyncio.create_task(self.service.keep_time())
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="off", access_log=False, timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve(sockets=[bound.http]))
        self._ready.set()  # the socket listens already
        await self._stop.wait()
        timekeeping.cancel()
        server.should_exit = True
        await serving
        await parts.store.close(1.0)
        bound.close()


@contextmanager
def live(
    make_engine: Callable[[], ScriptedEngine],
    stage_root: Path,
    ports: tuple[int, int] = (0, 0),
    token: str | None = None,
    **settings: object,
) -> Iterator[LiveService]:
    """A service with `settings` until the block ends."""
    values = {"model": "scripted", "port": ports[0], "weights_port": ports[1], "stage_root": stage_root}
    service = LiveService(make_engine, RolloutConfig.model_validate(values | settings), token)
    service.start()
    try:
        yield service
    finally:
        service.stop()
