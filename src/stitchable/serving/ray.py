"""The same application on many machines: Ray Serve starts replicas, each with a model and a target of its own.

    serve run stitchable.serving.ray:app model=FOLDER slo_ms=50 num_replicas=2

A door takes each HTTP request whole and hands it to a replica, which answers it as the server of one machine does. A
replica that dies while it runs costs the requests it had a second try, at another one. Replicas, autoscaling, health
and draining are Ray's.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from stitchable.serving.bodies import Inbox
from stitchable.serving.engine import Unavailable
from stitchable.serving.http import create_app, refusal

_MAX_REQUESTS = 256  # of a replica at a time, as of an engine's queue


class Arguments(BaseModel):
    """What `serve run` takes after the name of the application, as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="A checkpoint folder, or the id of a Hub repository, that every machine can read.")
    slo_ms: float = Field(50, gt=0)
    num_replicas: int | str = Field(1, description='A number, or "auto" for autoscaling by Ray.')
    num_gpus: float = Field(0, ge=0, description="Of a replica; 0 runs on the CPU.")
    threads: int | None = Field(None, ge=1, description="Of a replica on a CPU.")
    token: str | None = None
    trust_remote_code: bool = False


class Message(NamedTuple):
    """A request or an answer of HTTP: what stands in front, headers, body."""

    head: Mapping[str, Any]
    headers: list[tuple[bytes, bytes]]
    body: bytes


@serve.deployment(max_ongoing_requests=_MAX_REQUESTS)
class Replica:
    """One engine behind the application of one machine."""

    def __init__(self, arguments: Arguments) -> None:
        from stitchable import StitchableForImageClassification
        from stitchable.publishing import processor_of
        from stitchable.serving.engine import Engine

        if arguments.threads is not None:
            import torch

            torch.set_num_threads(arguments.threads)
        model: Any = StitchableForImageClassification.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
        model = model.to("cuda" if arguments.num_gpus else "cpu")
        self.engine = Engine(model, processor_of(model), arguments.slo_ms / 1e3)
        self.app = create_app(self.engine, arguments.model, arguments.token)

    async def answer(self, request: Message) -> Message:
        """Run the application on one request."""
        if not (self.engine.is_ready or self.engine.has_failed):  # which waits to be replaced
            self.engine.start()
        scope = {"type": "http", "http_version": "1.1", "scheme": "http", "headers": request.headers, **request.head}
        coming = [{"type": "http.request", "body": request.body, "more_body": False}]
        head: dict[str, Any] = {}
        body = bytearray()

        async def receive() -> Any:
            if coming:
                return coming.pop()
            return await asyncio.Event().wait()  # a client that hangs up cancels this call

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                head.update(status=message["status"], headers=message["headers"])
            else:
                body.extend(message.get("body", b""))

        await self.app(scope, receive, send)
        return Message({"status": head["status"]}, list(head["headers"]), bytes(body))

    def check_health(self) -> None:
        """Asked by Ray: a replica whose loop has ended is replaced."""
        if self.engine.has_failed:
            raise RuntimeError("the engine's loop has ended")


_door = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.deployment(max_ongoing_requests=16 * _MAX_REQUESTS, ray_actor_options={"num_cpus": 0})
@serve.ingress(_door)
class Door:
    """Hands requests to replicas; one whose replica has died goes to another, once."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas = replicas
        self.inbox = Inbox()

    @_door.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
    async def hand_on(self, request: Request) -> Response:
        """Every request there is."""
        try:
            async with self.inbox.body(request) as body:
                head = {"method": request.method, "path": request.url.path, "raw_path": request.url.path.encode()}
                head["query_string"] = request.scope["query_string"]
                message = Message(head, list(request.scope["headers"]), body)
                try:
                    found = await self.replicas.answer.remote(message)
                except RayActorError:
                    found = await self.replicas.answer.remote(message)
        except (ValueError, Unavailable, ClientDisconnect) as error:
            raise refusal(error) from error
        answer = Response(found.body, found.head["status"])
        answer.raw_headers = found.headers
        return answer


def app(arguments: Arguments) -> serve.Application:
    """The application, for `serve run`, a config file of Ray Serve, or `ray.serve.run`."""
    resources = {"num_gpus": arguments.num_gpus, "num_cpus": arguments.threads or 1}
    options: dict[str, Any] = {"num_replicas": arguments.num_replicas, "ray_actor_options": resources}
    door, replica = cast("serve.Deployment", Door), cast("serve.Deployment", Replica)  # which the decorators make them
    return door.bind(replica.options(**options).bind(arguments))


def run(arguments: Arguments, host: str, port: int) -> None:
    """Serve on a Ray that runs already (RAY_ADDRESS), or on a new one of this machine, until SIGTERM or SIGINT."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app(arguments))
        stop.wait()
        serve.shutdown()
    finally:
        ray.shutdown()
