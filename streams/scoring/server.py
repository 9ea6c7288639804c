"""``gpl serve``: the scorer over HTTP.

``POST /v1/score`` ranks candidates; ``/health``, ``/ready`` and ``/metrics`` answer on the same port; ``/docs`` is the
OpenAPI page. Before a model is in service the answer is 503.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from streams import metrics
from streams.scoring.scorer import NotReadyError, Scorer
from streams.settings import ServeSettings, Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_ID_BYTES = 4 * 256 + 8
"""An id of 256 characters as JSON at its longest, with quotes and comma."""

Id = Annotated[str, Field(min_length=1, max_length=256)]


class ScoreRequest(BaseModel):
    """At most ``serve.max_candidates`` candidates."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id
    candidates: Annotated[list[Id], Field(min_length=1)]


class ScoreResponse(BaseModel):
    """``items``: best first; ``scores``: logits, parallel to ``items``, null for the ``unknown`` ones at the end."""

    model_version: str
    items: list[str]
    scores: list[float | None]
    unknown: list[str]


def create_app(scorer: Scorer, settings: ServeSettings, health: metrics.Health) -> FastAPI:
    """The application over a scorer, which it starts and closes with its own life."""

    app = FastAPI(title="gpl scorer", version="1", lifespan=_lifespan(scorer))
    app.middleware("http")(_limit_body(settings.max_candidates * _ID_BYTES + 4096))
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(NotReadyError)(_not_ready)

    # Not async: scoring is arithmetic, and in a worker thread it leaves the event loop free.
    @app.post("/v1/score", response_model=ScoreResponse)
    def score(request: ScoreRequest) -> Response:
        count = len(request.candidates)
        if count > settings.max_candidates:
            return _refused(422, "candidates", f"{count} entries, at most {settings.max_candidates} are scored at once")
        scored = scorer.score(request.user_id, request.candidates)
        metrics.SCORE_REQUESTS.labels("200").inc()
        # Built from checked values: a second validation on the way out would cost as much as the scoring.
        return JSONResponse(
            {
                "model_version": scored.model_version,
                "items": scored.items,
                "scores": scored.scores,
                "unknown": scored.unknown,
            }
        )

    @app.get("/health")
    def healthy() -> Response:
        return _verdict("stalled", health.stalled())

    @app.get("/ready")
    def ready() -> Response:
        return _verdict("waiting", health.waiting())

    @app.get("/metrics")
    def exported() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered."""
    health = metrics.Health()
    app = create_app(Scorer(settings, health=health), settings.serve, health)
    uvicorn.run(app, host=settings.serve.host, port=settings.serve.port, log_level="warning", access_log=False)


def _lifespan(scorer: Scorer) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scorer.start()
        try:
            yield
        finally:
            scorer.close()

    return lifespan


def _limit_body(limit: int) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdigit():
                return _refused(411, "content-length", "the length of the body must be stated")
            if int(length) > limit:
                return _refused(413, "content-length", f"{length} bytes, at most {limit} are read")
        return await call_next(request)

    return check


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    field = ".".join(str(part) for part in found["loc"] if part != "body") or "body"
    return _refused(422, field, found["msg"])


async def _not_ready(_: Request, error: Exception) -> Response:
    return _refused(503, None, str(error))


def _refused(status: int, field: str | None, why: str) -> Response:
    metrics.SCORE_REQUESTS.labels(str(status)).inc()
    content: dict[str, Any] = {"error": why} if field is None else {"error": f"{field}: {why}", "field": field}
    return JSONResponse(content, status_code=status)


def _verdict(name: str, problems: list[str]) -> Response:
    return JSONResponse({"ok": not problems, name: problems}, status_code=503 if problems else 200)
