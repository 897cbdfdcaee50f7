"""The HTTP routes; the only FastAPI user.

Knows requests and replies; knows nothing of how any of it is done (`service` and what it holds).
"""

from typing import Annotated

from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flashrl_rollout.engine import EngineError
from flashrl_rollout.generation import ClientGoneError
from flashrl_rollout.middleware import BodyLimit, TokenCheck, error_content, error_headers
from flashrl_rollout.request_errors import http_error, invalid_request
from flashrl_rollout.request_record import RequestRecord, RequestRecords, note, note_error
from flashrl_rollout.scrape import metrics_text
from flashrl_rollout.service import Service
from flashrl_rollout.standard_routes import ROUTES
from flashrl_rollout.status import Status, status
from flashrl_rollout.status_page import Page, read_page
from flashrl_rollout.weights import wire_error
from flashrl_wire.errors import UnknownRouteError, WireError
from flashrl_wire.layout import TensorSpec
from flashrl_wire.messages import (
    CommitReply,
    ErrorReply,
    GenerateRequest,
    GenerateResponse,
    LoadCheckpoint,
    LoadWeights,
    PauseMode,
    PauseReply,
    TransferAccepted,
    WeightsInfo,
)

_REFUSALS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused; `code` says why"},
    "503": {"model": ErrorReply, "description": "Not now: see Retry-After"},
}
CLIENT_GONE_STATUS = 499  # nobody reads it; it is for the request count


def create_app(service: Service, *, token: str | None, max_body_bytes: int) -> FastAPI:
    """All routes over `service`; `token` None asks for none."""
    app = FastAPI(
        title="FlashRL rollout service", responses=_REFUSALS, strict_content_type=False, redirect_slashes=False
    )
    _add_errors(app)
    _add_sampling(app, service)
    _add_weights(app, service)
    _add_updates(app, service)
    _add_state(app, service)
    _add_standard(app, service)
    page = read_page()
    _add_page(app, service, page)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if token is not None:
        app.add_middleware(TokenCheck, token=token, page=page)  # outside of the body: a stranger gets nothing buffered
    app.add_middleware(RequestRecords, on_end=lambda record: _count(service, record))
    return app


def _count(service: Service, record: RequestRecord) -> None:
    service.metrics.count_request(record.route, record.status, record.seconds, record.error, record.is_abandoned)


def _add_errors(app: FastAPI) -> None:
    def reply(request: Request, error: WireError) -> Response:
        note_error(request.scope, error.code)
        return Response(error_content(error, request.url.path), error.status, error_headers(error))

    @app.exception_handler(WireError)
    async def expected(request: Request, error: WireError) -> Response:
        return reply(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return reply(request, invalid_request(error.errors(), request.headers.get("content-type", "")))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        found = reply(request, http_error(error.status_code, request.method, request.url.path))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(EngineError)
    async def engine(request: Request, error: EngineError) -> Response:
        return reply(request, wire_error(error))

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return reply(request, WireError("internal error; the service's log has more"))  # and the server logs it


def _add_sampling(app: FastAPI, service: Service) -> None:
    @app.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        note(request.scope, prompts=len(body.prompts), n=body.n)
        response = await service.require_sampling().generator.generate(body, disconnected)
        service.metrics.count_tokens(response.usage)
        note(request.scope, **response.usage.model_dump(), versions=_versions(response))
        return response

    @app.post("/pause")
    async def pause(mode: PauseMode = "keep") -> PauseReply:
        await service.require().weights.pause(mode)
        return PauseReply(paused=True)

    @app.post("/resume")
    async def resume() -> PauseReply:
        await service.require().weights.resume()
        return PauseReply(paused=False)


def _versions(response: GenerateResponse) -> list[int]:
    completions = (completion for result in response.results for completion in result.completions)
    return sorted({version for completion in completions for version, _, _ in completion.weight_versions})


def _add_weights(app: FastAPI, service: Service) -> None:
    @app.get("/weights")
    async def weights() -> WeightsInfo:
        return service.weights_info()

    @app.get("/weights/layout")
    async def layout() -> tuple[TensorSpec, ...]:
        return service.require().weights.layout.tensors


def _add_updates(app: FastAPI, service: Service) -> None:
    @app.post(
        "/load_weights", response_model=CommitReply | TransferAccepted, responses={202: {"model": TransferAccepted}}
    )
    async def load_weights(body: Annotated[LoadWeights, Body()], response: Response) -> CommitReply | TransferAccepted:
        store = service.require().store
        if isinstance(body, LoadCheckpoint):
            return await store.load_checkpoint(body)
        response.status_code = 202
        return store.begin(body)

    @app.post("/load_weights/{transfer_id}/commit")
    async def commit(transfer_id: str) -> CommitReply:
        return await service.require().store.commit(transfer_id)

    @app.delete("/load_weights/{transfer_id}")
    async def abort(transfer_id: str) -> dict[str, str]:
        service.require().store.abort(transfer_id)
        return {"aborted": transfer_id}

    @app.delete("/runs/{run_id}")
    async def release(run_id: str) -> dict[str, str | None]:
        lease = service.require().lease
        lease.release(run_id)
        return {"run_id": lease.run_id}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"alive": True}

    @app.get("/ready")
    async def ready() -> dict[str, bool | int]:
        return {"ready": True, "version": service.require_sampling().weights.version}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await metrics_text(service), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI, service: Service, page: Page) -> None:
    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(page.content, headers=page.headers)

    @app.get("/status")
    async def status_now() -> Status:
        return await status(service)


def empty_app() -> FastAPI:
    """For the engine's own routes, which are reached through those of `standard_routes.ROUTES` alone."""
    return FastAPI(openapi_url=None)


def _add_standard(app: FastAPI, service: Service) -> None:
    for path, method in ROUTES.items():
        app.router.routes.append(Route(path, _Standard(service), methods=[method], include_in_schema=False))


class _Standard:
    """The engine's own routes, once there are any: this app answers before the engine has started."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        standard = self._service.require_sampling().standard
        if standard is None:
            raise UnknownRouteError(f"{scope['path']} is no route of this engine")
        await standard(scope, receive, send)
