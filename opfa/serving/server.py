"""The routes of a service: FastAPI's, described for OpenAPI, and a page to try it.

Every refusal is {"error": one message}: 400 what is no JSON, 408 too slow, 413 too large, 415 not
JSON by its header, 421 another machine's name, 422 what can't be answered, 503 a full queue (with
Retry-After), 504 no answer in time. There is no login and no TLS: a proxy in front has them.
"""

from typing import Any, Literal

from pydantic import BaseModel

from opfa.extras import importing
from opfa.serving import asking
from opfa.serving.metrics import CONTENT_TYPE
from opfa.serving.page import render
from opfa.serving.service import JSON, Refusal, Refused, Service

with importing("opfa serve", "opfa[serve]"):
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import HTMLResponse, PlainTextResponse

STATUSES = {
    400: "The body is no JSON.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or has more inputs than the queue can hold.",
    415: f"The Content-Type is not {JSON}.",
    421: "The Host header names another machine, and the server is for this one alone.",
    422: "The inputs can't be answered; the message says which one, and why.",
    500: "A fault of the server.",
    503: "The queue is full; Retry-After says when to come back.",
    504: "The answer took too long.",
}
BODY = {
    "anyOf": [
        {"$ref": "#/components/schemas/Request"},
        {"$ref": "#/components/schemas/Inputs"},
    ]
}


class Health(BaseModel):
    """Whether a server answers, and which model it has."""

    status: Literal["ok", "stopped"]
    model: str
    kind: str
    runs_in: str
    sequence_tokens: str


def app_of(service: Service) -> FastAPI:
    """What a server runs."""
    request, answer = asking.schemas(service.predictor.task)
    refusals = {status: {"model": Refusal, "description": s} for status, s in STATUSES.items()}
    app = FastAPI(
        title=f"opfa: {service.name}",
        version="1",
        docs_url=None,  # those pages load their scripts from elsewhere
        redoc_url=None,
        lifespan=service.running,
    )
    app.add_api_route(
        "/predict",
        service.predict,
        methods=["POST"],
        summary="Answer one input, or a list of them.",
        description="A body that is a list stands for its inputs alone.",
        operation_id="predict",
        response_model=None,
        responses={200: {"model": answer | list[answer]}, **refusals},
        openapi_extra={"requestBody": {"content": {JSON: {"schema": BODY}}, "required": True}},
    )
    app.add_api_route(  # where clients of inference endpoints send
        "/", service.predict, methods=["POST"], include_in_schema=False, response_model=None
    )

    _add_looks(app, service)
    for status in (404, 405):
        app.add_exception_handler(status, _refused)
    app.add_exception_handler(500, _failed)
    schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = {**schema.pop("$defs"), "Request": schema, "Inputs": schema["properties"]["inputs"]}
    schema["properties"]["inputs"] = {"$ref": "#/components/schemas/Inputs"}
    app.openapi()["components"]["schemas"].update(parts)  # FastAPI keeps it
    return app


def _add_looks(app: FastAPI, service: Service) -> None:
    """What can be looked at: health, numbers, and the page."""
    page, headers = render(service.predictor.task, service.about())

    @app.get("/health", summary="Whether answers can be given, and by which model.")
    async def health(response: Response) -> Health:
        response.status_code = 200 if service.is_well() else 503
        return Health(status="ok" if service.is_well() else "stopped", **service.about())

    @app.get("/metrics", summary="Numbers for Prometheus.", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def try_out() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


async def _refused(_: Request, error: Any) -> Response:  # Any: Starlette's, of no route
    return Refused(error.status_code, str(error.detail), error.headers).response()


async def _failed(_: Request, __: Exception) -> Response:
    return Refused(500, "a fault of the server; its log says more").response()
