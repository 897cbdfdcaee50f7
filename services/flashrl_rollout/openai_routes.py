"""vLLM's OpenAI routes and its token-in, token-out route, added to an app of ours for an engine that runs already.

Knows vLLM's routers and what they expect of an app; knows nothing of admission, weights or our own routes.
"""

import asyncio
import logging
import traceback
from argparse import Namespace
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completions
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
from vllm.entrypoints.scale_out.token_in_token_out import serving as token_serving
from vllm.entrypoints.scale_out.token_in_token_out.api_router import attach_router as attach_tokens
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMClientError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

_READING = ("/protocol.py", "/vllm/renderers/")  # where vLLM's request models are, and what makes tokens of chats


async def add_standard_routes(app: Any, llm: AsyncLLM, model: str) -> None:
    """Add the routes, their state and vLLM's exception handlers to an empty FastAPI app; `model` is the name served.

    vLLM's `build_app` would bring its own health, metrics, CORS and routes that abort anybody's request.
    """
    arguments = await asyncio.to_thread(_arguments, model)
    await init_app_state(llm, app.state, arguments, await llm.get_supported_tasks())
    app.state.server = SimpleNamespace(should_exit=False)  # vLLM's handlers set it; the process is ended by ours
    for attach in (attach_models, attach_chat, attach_completions, attach_tokens):
        attach(app)
    init_exception_handler(app)
    app.exception_handler(HTTPException)(http_exception_handler)  # vLLM's own is for FastAPI's subclass only
    app.exception_handler(EngineDeadError)(_engine_is_dead)
    app.exception_handler(EngineGenerateError)(_not_generated)
    for kind in (AttributeError, TypeError, LookupError):
        app.exception_handler(kind)(_misread)
    for module in (chat_serving, completion_serving, token_serving):
        module.logger.addFilter(_without_trace)


def _arguments(model: str) -> Namespace:
    """vLLM's defaults for everything but the name."""
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    arguments.model, arguments.served_model_name = model, [model]
    return arguments


async def _misread(request: Request, error: Exception) -> JSONResponse:
    """400 where vLLM's reading of a request met a type that it had not reckoned with; 500 where that happened later."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(place in frame.filename for frame in frames for place in _READING):
        return _bad_request(f"a field has a wrong type: {error}")
    return _failure(str(error))


async def _not_generated(request: Request, error: EngineGenerateError) -> JSONResponse:
    """400 where vLLM could not hand a request to the engine, 500 where it failed there; vLLM gives no reason at all."""
    cause = error.__cause__ or error
    message = " ".join(f"generation failed: {cause}".split())
    if any(frame.name == "add_request" for frame in traceback.extract_tb(cause.__traceback__)):
        return _bad_request(message)
    return _failure(message)


def _bad_request(message: str) -> JSONResponse:
    found = create_error_response(message, "invalid_field", HTTPStatus.BAD_REQUEST)
    return JSONResponse(found.model_dump(), found.error.code)


def _failure(message: str) -> JSONResponse:
    found = create_error_response(message, "InternalServerError", HTTPStatus.INTERNAL_SERVER_ERROR)
    return JSONResponse(found.model_dump(), found.error.code)


def _without_trace(record: logging.LogRecord) -> bool:
    """A client's mistake is a line of the log and no stack trace, which vLLM makes of one that is found in a stream."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, VLLMClientError):
        record.msg, record.args, record.exc_info = f"{record.getMessage()} {error}", (), None
    return True


async def _engine_is_dead(request: Request, error: EngineDeadError) -> JSONResponse:
    """503: a supervisor starts the service again, so that trying again later is right."""
    found = create_error_response("the engine has died", "not_ready", HTTPStatus.SERVICE_UNAVAILABLE)
    return JSONResponse(found.model_dump(), found.error.code, {"retry-after": "2"})
