"""The server as an ASGI application: its paths, and who stands before them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fastvlm_mlx.errors import FastVLMError, OptionError
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.serve.api import Service, error_response, json_response
from fastvlm_mlx.serve.errors import ApiError, answer_to
from fastvlm_mlx.serve.exchange import Places
from fastvlm_mlx.serve.fetch import Fetcher, Place
from fastvlm_mlx.serve.formats.completions import Completions
from fastvlm_mlx.serve.formats.requests import read_chat
from fastvlm_mlx.serve.formats.responses import Responses, read_responses
from fastvlm_mlx.serve.guard import Guard
from fastvlm_mlx.serve.limits import HELD_BODIES, Settings
from fastvlm_mlx.serve.metrics import Metrics
from fastvlm_mlx.serve.page import page

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def service(model: FastVLM, name: str, settings: Settings) -> Service:
    """What answers requests.

    Raises:
        OptionError: an allowed host that is none, or a name that can't be printed.
    """
    if not name.isprintable():
        raise OptionError(f"the model's name is {name!a}: expected printable text, give --name")
    return Service(
        model,
        name,
        settings,
        model.schedule(settings.batch_size),
        Places(settings.batch_size, settings.queue, HELD_BODIES * settings.max_body),
        Fetcher(
            frozenset(map(Place.of, settings.allow_url)),
            settings.max_image_bytes,
            settings.fetch_timeout,
        ),
    )


def application(service: Service) -> ASGIApp:
    settings, metrics = service.settings, Metrics(service.places)

    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, read_chat, Completions)

    async def responses(request: Request) -> Response:
        return await service.answer(request, read_responses, Responses)

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise ApiError(
                f"the model is not served here: expected {service.name!r}",
                404,
                param="model",
                code="model_not_found",
            )
        return json_response(_model(service))

    async def home(request: Request) -> Response:
        return page()

    async def health(request: Request) -> Response:
        return json_response({"status": "ok"})

    async def metric(request: Request) -> Response:
        return Response(metrics.text(), media_type=_PROMETHEUS)

    middleware = [Middleware(Guard, settings=settings, metrics=metrics)]
    if settings.allow_origin:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allow_origin),
                allow_methods=["GET", "POST"],
                # OpenAI's own client for browsers sends a dozen of its own.
                allow_headers=["*"],
            )
        )
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/", home),
            Route("/metrics", metric),
        ],
        middleware=middleware,
        # Inside of what lets other origins read the answer.
        exception_handlers={HTTPException: _not_found, FastVLMError: _refused},
    )


def _model(service: Service) -> dict[str, object]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "fastvlm-mlx",
    }


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(answer_to(error))


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "there is no such path" if status == 404 else "that method is not one of this path's"
    headers = dict(getattr(error, "headers", None) or {})
    told = f"{what}: expected POST /v1/chat/completions or POST /v1/responses, for example"
    return error_response(ApiError(told, status, code="not_found", headers=headers))
