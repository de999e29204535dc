"""`persea serve`: the application, its errors and its start."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from persea.errors import (
    MissingRequirementError,
    PerseaError,
    RefusedError,
    TeacherError,
)
from persea.models.loading import load_model, load_renderer, resolve_model_source
from persea.serve.limits import (
    AccessLimitMiddleware,
    ServerLimits,
    error_body,
    is_loopback,
    make_timed_protocol,
)
from persea.serve.routes import Routes
from persea.serve.streaming import ServedModel
from persea.teachers.engines.transformers import TransformersEngine


def load_served_model(model: str, name: str = "") -> ServedModel:
    """Load a model to serve.

    Args:
        model: Model folder, GGUF file, hub id or run folder (then its student).
        name: Name in the routes; by default the name of the folder or file, or the hub id.

    Raises:
        DataError: There is no such model.
    """
    source, template_date = resolve_model_source(model, "serve")
    renderer = load_renderer(source, "serve", template_date)
    engine = TransformersEngine(load_model(source, renderer, "serve"), len(renderer.vocabulary))
    path = Path(model).expanduser()
    default_name = path.resolve().name if path.exists() else model
    return ServedModel(name or default_name, renderer, engine, engine.max_context_tokens)


def build_app(
    served_model: ServedModel, api_key: str, limits: ServerLimits
) -> AccessLimitMiddleware:
    """Build the application.

    Args:
        served_model: The model.
        api_key: Required from every client; "" answers this machine only.
        limits: Limits of requests.
    """
    app = FastAPI(title="persea serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(PerseaError, _answer_persea_error)
    Routes(served_model, limits).register(app)
    return AccessLimitMiddleware(app, api_key, limits)


async def _answer_invalid_body(request: Request, error: Exception) -> Response:
    """Answer 400 for a body that is not JSON, 422 for wrong keys and values."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(k) for k in first["loc"][1:])
    if first["type"] == "json_invalid" or not where:
        message = f"the body is not JSON of this route: {first['msg']}"
        return JSONResponse(error_body(400, message, where or None), 400)
    message = f"{where}: {first['msg']}"
    if first["type"] == "extra_forbidden":
        message = f"unknown or unsupported key: {where}"
    return JSONResponse(error_body(422, message, where), 422)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer errors of the framework in OpenAI's form; 405 becomes 404, others 400."""
    assert isinstance(error, HTTPException)
    status = {400: 400, 404: 404, 405: 404}.get(error.status_code, 400)
    message = str(error.detail)
    if message in ("Not Found", "Method Not Allowed"):
        message = f"no such route: {request.method} {request.url.path}"
    return JSONResponse(error_body(status, message), status)


async def _answer_persea_error(request: Request, error: Exception) -> Response:
    """Answer 400, or 500 if the model itself failed, which is no fault of the client."""
    assert isinstance(error, PerseaError)
    status = 500 if isinstance(error, TeacherError) else 400
    message = f"{error.message} -> {error.remedy}"
    return JSONResponse(error_body(status, message, error.where or None), status)


def resolve_api_key(host: str, key_env: str) -> str:
    """Return the API key of an environment variable; "" if it is not set.

    Raises:
        RefusedError: There is no key, and other machines reach the address.
    """
    key = os.environ.get(key_env, "").strip()
    if not key and not is_loopback(host):
        raise RefusedError(
            f"other machines reach {host}, and {key_env} is not set",
            where="serve",
            remedy=f"export {key_env}=..., or serve on 127.0.0.1",
        )
    return key


def run_server(
    served_model: ServedModel,
    host: str,
    port: int,
    api_key: str,
    limits: ServerLimits,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until a signal arrives.

    Args:
        served_model: The model.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        api_key: See `resolve_api_key`.
        limits: Limits of requests.
        on_ready: Called with the URL once the server listens.

    Raises:
        MissingRequirementError: The address cannot be used.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise MissingRequirementError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            where="serve",
            remedy="choose another --port",
        ) from error
    config = uvicorn.Config(
        build_app(served_model, api_key, limits),
        http=make_timed_protocol(limits.io_timeout_s),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=int(limits.io_timeout_s),
        h11_max_incomplete_event_size=1 << 16,
        backlog=2048,
        server_header=False,
    )
    bracketed = f"[{host}]" if ":" in host else host
    on_ready(f"http://{bracketed}:{listener.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listener])
