"""The server's HTTP: FastAPI around an engine."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from heapq import nlargest
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

import stitchable
from stitchable.serving.bodies import Inbox, WrongType, unpack
from stitchable.serving.choices import front_of
from stitchable.serving.engine import Answer, Engine, Unavailable, name_of
from stitchable.serving.images import TooLarge
from stitchable.serving.schemas import BODY, ERRORS, Choosable, Classification, Label, Status, Target
from stitchable.serving.wishes import Wishes

T = TypeVar("T")


def create_app(engine: Engine, title: str, token: str | None = None) -> FastAPI:
    """The application.

    Args:
        engine: not started; it starts and drains with the application.
        title: what to call the model.
        token: that /v1, /hub and /metrics ask for as "Authorization: Bearer TOKEN"; None for nothing.

    Raises:
        ValueError: an empty token, which would let everybody in.
    """
    check_token(token)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.drain()

    app = FastAPI(title=f"stitchable: {title}", version=stitchable.__version__, lifespan=lifespan)
    guarded = APIRouter(dependencies=[] if token is None else [Depends(_guard(token))], responses=ERRORS)
    _add_classification(guarded, engine)
    _add_information(guarded, engine, title)
    _add_health(app, engine)
    app.include_router(guarded)

    @app.exception_handler(HTTPException)
    async def explain(_: Request, error: HTTPException) -> JSONResponse:
        said = {"detail": error.detail, "error": error.detail}  # as FastAPI calls it, and the Hub's clients
        return JSONResponse(said, error.status_code, error.headers)

    return app


def _add_classification(app: APIRouter, engine: Engine) -> None:
    inbox = Inbox()
    names = class_names(engine)

    async def answer(request: Request) -> tuple[Answer, list[Label]]:
        try:
            async with inbox.body(request) as body:
                content, options = await unpack(request.headers, body)
                wishes = Wishes.read({**request.query_params, **options})
                work = engine.classify(content, wishes.seconds, wishes.permits(engine))
                found = await _unless_gone(request, work)
        except (ValueError, RuntimeError, Unavailable, ClientDisconnect) as error:
            if isinstance(error, ValueError):
                engine.statistics.ended("invalid")
            raise refusal(error) from error
        best = nlargest(wishes.top_k, range(len(names)), found.scores.__getitem__)
        return found, [Label(label=names[i], score=found.scores[i]) for i in best]

    @app.post("/v1/classify", openapi_extra=BODY)
    async def classify(request: Request) -> Classification:
        """Classify an image: its bytes, a form with a file "image", or JSON with "image" in base64."""
        found, labels = await answer(request)
        return Classification(
            labels=labels,
            ran=name_of(found.choice),
            stitch_id=found.stitch_id,
            accuracy=found.choice.accuracy,
            flops=found.flops,
            queue_ms=1e3 * found.queue_seconds,
            run_ms=1e3 * found.run_seconds,
            batch_size=found.size,
            in_time=found.in_time,
        )

    @app.post("/hub")
    async def hub(request: Request, response: Response) -> list[Label]:
        """For `huggingface_hub.InferenceClient(model="http://.../hub").image_classification(...)`."""
        found, labels = await answer(request)
        response.headers["X-Stitchable-Ran"] = name_of(found.choice)
        response.headers["X-Stitchable-Stitch"] = str(found.stitch_id)
        response.headers["X-Stitchable-Run-Ms"] = f"{1e3 * found.run_seconds:.3f}"
        response.headers["X-Stitchable-Queue-Ms"] = f"{1e3 * found.queue_seconds:.3f}"
        return labels


def _add_information(app: APIRouter, engine: Engine, title: str) -> None:
    @app.get("/v1/stitches")
    async def stitches() -> list[Choosable]:
        """Every stitch and cascade that can run."""
        front = front_of(engine.policy.choices)
        return [
            Choosable(
                name=name_of(choice),
                kind=choice.kind,
                id=choice.id,
                accuracy=choice.accuracy,
                flops=choice.flops,
                latency_ms=1e3 * choice.seconds(1) * engine.policy.scale,
                per_image_ms=1e3 * choice.per_image * engine.policy.scale,
                worst=choice.worst,
                on_front=choice in front,
            )
            for choice in engine.policy.choices
        ]

    @app.get("/v1/status")
    async def status() -> Status:
        """Load, what answered, and attainment over the last minute."""
        return Status(
            title=title,
            slo_ms=1e3 * engine.policy.target,
            least_slo_ms=1e3 * engine.quickest()[1],
            queue_length=engine.queue_length,
            slowdown=engine.policy.scale,
            last_minute=engine.statistics.last_minute(),
        )

    @app.put("/v1/target")
    async def set_target(target: Target) -> Target:
        """Change the target of requests that bring none."""
        try:
            engine.check_target(target.slo_ms / 1e3)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        engine.policy.target = target.slo_ms / 1e3
        return target

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        engine.statistics.queue.set(engine.queue_length)
        return Response(engine.statistics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_health(app: FastAPI, engine: Engine) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether requests are taken."""
        return JSONResponse({"ready": engine.is_ready}, 200 if engine.is_ready else 503)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return files("stitchable.serving").joinpath("page.html").read_text(encoding="utf-8")


_STATUSES: dict[type[Exception], int] = {
    Unavailable: 503,
    TooLarge: 413,
    WrongType: 415,
    ClientDisconnect: 499,  # which nobody hears
    ValueError: 400,
    RuntimeError: 500,  # of the device
}


def refusal(error: Exception) -> HTTPException:
    """How HTTP says what went wrong with a request."""
    status = next(status for kind, status in _STATUSES.items() if isinstance(error, kind))
    return HTTPException(status, str(error), {"Retry-After": "1"} if status == 503 else None)


def class_names(engine: Engine) -> list[str]:
    """The classes in order."""
    labels = engine.model.config.id2label or {}
    return [labels[number] for number in sorted(labels)]


def check_token(token: str | None) -> None:
    """Refuse with a ValueError an empty token, as of a variable that is not set."""
    if token is not None and not token.strip():
        raise ValueError("the token is empty; leave it out, or give one")


def _guard(token: str) -> Any:
    """A dependency that asks for the token, compared in constant time."""

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(401, "this server asks for a bearer token", {"WWW-Authenticate": "Bearer"})

    return check


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is given up where the client hangs up."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
