"""The life of a service process: answer from the first second, load the model, serve, stop in order.

Knows signals, the HTTP server and exit codes; knows nothing of routes, updates or which engine it is.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from flashrl_rollout.app import create_app
from flashrl_rollout.assembly import assemble
from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.engine import Engine, EngineError
from flashrl_rollout.http_limits import LimitedHttp
from flashrl_rollout.service import Parts, Service
from flashrl_rollout.startup import Bound
from flashrl_rollout.waiting import waiting_line

StartEngine = Callable[[], Awaitable[Engine]]

OK, FAILED = 0, 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.2
_HTTP_GRACE_S = 5
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, httpx 5 s: whoever closes first must not be who is just being asked."""

logger = logging.getLogger(__name__)


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: they would end the process before the engine's processes are gone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ServiceProcess:
    """One service from its bound addresses to its exit code."""

    def __init__(self, config: RolloutConfig, bound: Bound, start_engine: StartEngine) -> None:
        self._config, self._bound, self._start_engine = config, bound, start_engine
        self._service = Service(config.model, config.quantization)
        self._stop = asyncio.Event()
        self.is_loading_abandoned = False
        app = create_app(self._service, token=bound.token, max_body_bytes=config.max_body_mib << 20)
        self._http = _HttpServer(
            uvicorn.Config(
                app,
                http=LimitedHttp,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=_HTTP_GRACE_S,
            )
        )

    async def run(self) -> int:
        """Serve until a signal (0) or until the engine fails or dies (1)."""
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        self._bound.receiver.start()
        serving = asyncio.create_task(self._http.serve(sockets=[self._bound.http]))
        serving.add_done_callback(lambda _: self._stop.set())
        timekeeping = asyncio.create_task(self._service.keep_time())
        try:
            return await self._run()
        finally:
            timekeeping.cancel()
            self._http.should_exit = True
            await serving
            self._bound.close()

    async def _run(self) -> int:
        engine = await self._engine()
        if engine is None:
            return OK if self._stop.is_set() else FAILED
        try:
            bound = self._bound
            parts = await assemble(
                self._config, engine, bound.receiver, bound.stage_dir, self._service.metrics.count_update
            )
            self._service.parts = parts
            self._announce(parts.weights.layout.quantized_fraction)
            info = engine.info
            logger.info("room for %d tokens of keys and values (%s)", info.kv_cache_tokens, info.kv_cache_dtype)
            code = await self._watch(parts)
            await self._drain(parts)
            return code
        except EngineError as error:
            logger.error("the engine failed: %s", error)
            return FAILED
        finally:
            await engine.close()

    def _announce(self, quantized: float) -> None:
        """Say where the service listens, and what share of the weights is in 8 bits."""
        host, port, weights_port = self._config.host, self._bound.http_port, self._bound.receiver.port
        share = f"{quantized:.0%} of them in 8 bits"
        logger.info("ready on http://%s:%d, weights on port %d, %s", host, port, weights_port, share)
        if not quantized and self._config.quantization != "none":
            logger.warning(
                "quantization: no layer is in %s, all stay bf16; --quantize-layers all takes what keep_bf16 leaves",
                self._config.quantization,
            )

    async def _engine(self) -> Engine | None:
        """The started engine; None where it cannot be started or is no longer wanted."""
        starting = asyncio.ensure_future(self._start_engine())
        stopping = asyncio.create_task(self._stop.wait())
        with waiting_line(f"loading {self._config.model}"):
            await asyncio.wait(
                {starting, stopping}, timeout=self._config.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        stopping.cancel()
        if not starting.done():
            limit = "" if self._stop.is_set() else f" after {self._config.start_timeout_s:g} s (start_timeout_s)"
            logger.error("gave up loading the model%s", limit)
            self.is_loading_abandoned = True
            starting.cancel()
            return None
        try:
            return starting.result()
        except (ValueError, RuntimeError, OSError, EngineError) as error:
            logger.error("the engine did not start: %s", " ".join(str(error).split()))
            return None

    async def _watch(self, parts: Parts) -> int:
        """Return at a signal, or once something that the service cannot do without has died."""
        while parts.engine.is_alive and parts.receiver.is_alive:
            try:
                await asyncio.wait_for(self._stop.wait(), _POLL_S)
            except TimeoutError:
                continue
            return OK
        logger.error("the %s has died", "receiver of weights" if parts.engine.is_alive else "engine")
        self._service.fence("the engine has died")
        return FAILED

    async def _drain(self, parts: Parts) -> None:
        """Let running requests finish, for a while."""
        self._service.stop("the service is stopping")
        logger.info("stopping: %d requests are running", parts.gate.active_requests)
        self._stop.clear()
        ends = {asyncio.create_task(parts.gate.idle()), asyncio.create_task(self._stop.wait())}  # or a second signal
        await asyncio.wait(ends, timeout=self._config.shutdown_grace_s, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        self._service.fence("the service is stopping")
        with suppress(TimeoutError):  # before the engine ends, whose failure they would be told of instead
            await asyncio.wait_for(parts.gate.idle(), _HTTP_GRACE_S)
        await parts.store.close(self._config.shutdown_grace_s)


def serve(config: RolloutConfig, bound: Bound, start_engine: StartEngine) -> int:
    """Run a service to its end; the exit code."""

    async def run() -> int:
        process = ServiceProcess(config, bound, start_engine)
        code = await process.run()
        if process.is_loading_abandoned:
            os._exit(code)  # a thread is still loading; nothing can stop it, and the engine's processes end with this
        return code

    return asyncio.run(run())
