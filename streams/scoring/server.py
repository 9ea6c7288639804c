"""The scorer over HTTP: one application, made for one process.

``POST /v1/score`` ranks candidates; ``/health``, ``/ready`` and ``/metrics`` answer on the same port; ``/docs`` is the
OpenAPI page. Before a model is in service the answer is 503. Scoring runs in the event loop: it is shorter than
the way to another thread and back. Bodies are decoded, checked and encoded by msgspec; pydantic's validation of 500 ids
and back cost more than their scores.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.requests import ClientDisconnect

from streams import metrics
from streams.contracts import Id
from streams.scoring.scorer import NotReadyError, Scorer
from streams.settings import ServeSettings

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client: where processes behind one port leave their figures."""

_ID_BYTES = 4 * 256 + 8
"""An id of 256 characters as JSON at its longest, with quotes and comma."""
_DISCARD_BYTES, _DISCARD_SECONDS = 2**27, 2.0
"""Of a body that is too long, read before it is refused."""


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    """At most ``serve.max_candidates`` candidates."""

    user_id: Id
    candidates: Annotated[list[Id], msgspec.Meta(min_length=1)]


class ScoreResponse(msgspec.Struct):
    """``items``: best first; ``scores``: logits, parallel to ``items``, null for the ``unknown`` ones at the end.

    ``known_user``: false when the model has not met the user and scored its default user. ``anchors``: whether the
    user's interest anchors were used.
    """

    model_version: str
    items: list[str]
    scores: list[float | None]
    unknown: list[str]
    known_user: bool
    anchors: bool


class Problem(msgspec.Struct, omit_defaults=True):
    """``error``: what is wrong, with the value. ``field``: where, if it is one field of the request."""

    error: str
    field: str | None = None


class RequestError(ValueError):
    """A request that cannot be answered: ``status``, the field at fault where there is one, and why."""

    def __init__(self, status: int, field: str | None, why: str) -> None:
        super().__init__(why if field is None else f"{field}: {why}")
        self.status = status
        self.field = field


_decode = msgspec.json.Decoder(ScoreRequest).decode
_encode = msgspec.json.Encoder().encode


def create_app(scorer: Scorer, settings: ServeSettings, health: metrics.Health) -> FastAPI:
    """The application over a scorer, which it starts and closes with its own life."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scorer.start()
        try:
            yield
        finally:
            scorer.close()

    app = FastAPI(title="gpl scorer", version="1", lifespan=lifespan)
    app.openapi = lambda: _openapi(app, settings)  # type: ignore[method-assign]
    limit = settings.max_candidates * _ID_BYTES + 4096
    answered = metrics.SCORE_REQUESTS.labels("200")

    async def score(request: Request) -> Response:
        try:
            wanted = _parse(await _body(request, limit), settings.max_candidates)
            content = _encode(scorer.score(wanted.user_id, wanted.candidates))
        except RequestError as error:
            return _refused(error.status, error.field, str(error))
        except NotReadyError as error:
            return _refused(503, None, str(error))
        except ClientDisconnect:
            metrics.SCORE_REQUESTS.labels("499").inc()  # nobody is there to answer, and nothing failed here
            return Response(status_code=499)
        answered.inc()
        return Response(content, media_type="application/json")

    # Starlette's route: FastAPI's own would resolve dependencies that there are not, a fifth of a request's time.
    app.add_route("/v1/score", score, methods=["POST"])

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # Logged with its traceback by the server.
        return _refused(500, None, f"internal error: {type(error).__name__}")

    @app.get("/health")
    async def healthy() -> Response:
        """200 while the loop that follows the log makes progress."""
        return _verdict("stalled", health.stalled())

    @app.get("/ready")
    async def ready() -> Response:
        """200 once state is read, a model is in service and warm."""
        return _verdict("waiting", health.waiting())

    @app.get("/metrics")
    async def exported() -> Response:
        """Prometheus figures, of all processes behind the port."""
        return Response(_exposition(), media_type=CONTENT_TYPE_LATEST)

    return app


async def _body(request: Request, limit: int) -> bytes:
    stated = request.headers.get("content-length", "0")
    stream = request.stream()
    if stated.isdigit() and int(stated) > limit:
        await _discard(stream)
        raise RequestError(413, "content-length", f"{stated} bytes, at most {limit} are read")
    parts, size = [], 0
    async for part in stream:
        size += len(part)
        if size > limit:
            await _discard(stream)
            raise RequestError(413, "body", f"more than {limit} bytes, at most so many are read")
        parts.append(part)
    return b"".join(parts)


async def _discard(stream: AsyncIterator[bytes]) -> None:
    """Read on, within limits: on a connection that is closed with input unread the answer is lost to a reset."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for part in stream:
                size += len(part)
                if size > _DISCARD_BYTES:
                    return


_AT = re.compile(r"^(?P<why>.*) - at `\$\.?(?P<field>.*)`$")
_NAMED = re.compile(r"field `(?P<field>[^`]*)`")


def _parse(body: bytes, max_candidates: int) -> ScoreRequest:
    try:
        request = _decode(body)
    except msgspec.ValidationError as error:
        # "Expected `str`, got `int` - at `$.candidates[1]`", "Object missing required field `user_id`"
        found = _AT.match(str(error)) or _NAMED.search(str(error))
        why = found["why"] if found and "why" in found.groupdict() else str(error)
        raise RequestError(422, (found and found["field"]) or "body", why) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, "body", f"no JSON: {error}") from error
    count = len(request.candidates)
    if count > max_candidates:
        raise RequestError(422, "candidates", f"{count} entries, at most {max_candidates} are scored at once")
    return request


def _refused(status: int, field: str | None, why: str) -> Response:
    metrics.SCORE_REQUESTS.labels(str(status)).inc()
    headers = {"retry-after": "1"} if status == 503 else {"connection": "close"} if status == 413 else None
    return Response(_encode(Problem(why, field)), status, headers, "application/json")


def _verdict(name: str, problems: list[str]) -> Response:
    content = msgspec.json.encode({"ok": not problems, name: problems})
    return Response(content, 503 if problems else 200, media_type="application/json")


def _exposition() -> bytes:
    if MULTIPROCESS not in os.environ:
        return generate_latest()
    every = CollectorRegistry()
    MultiProcessCollector(every)  # type: ignore[no-untyped-call]
    return generate_latest(every)


def _openapi(app: FastAPI, settings: ServeSettings) -> dict[str, Any]:
    if app.openapi_schema is not None:
        return app.openapi_schema
    types = (ScoreRequest, ScoreResponse, Problem)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    components["ScoreRequest"]["properties"]["candidates"]["maxItems"] = settings.max_candidates
    wanted, answer, problem = ({"content": {"application/json": {"schema": schema}}} for schema in schemas)
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    document["paths"]["/v1/score"] = {
        "post": {
            "summary": "Rank candidates for a user",
            "operationId": "score",
            "requestBody": {"required": True, **wanted},
            "responses": {
                "200": {"description": "Ranked, best first", **answer},
                "400": {"description": "The body is no JSON", **problem},
                "413": {"description": "The body is too long", **problem},
                "422": {"description": "A field is missing, unknown or out of bounds", **problem},
                "503": {"description": "No model is in service yet", **problem},
            },
        }
    }
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    app.openapi_schema = document
    return document
