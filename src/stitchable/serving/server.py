"""A process that serves one model: its socket, its protocol's patience, uvicorn."""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 5.0
_DRAIN_SECONDS = 60  # for connections after SIGTERM; requests themselves take no longer than their deadlines


class ImpatientProtocol(H11Protocol):
    """Closes connections on which no request has begun within `IDLE_SECONDS`, or after an answer no other.

    uvicorn waits for ever for the first, and once a byte of it has come, for every later one.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_a_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._expect_a_request()

    def _expect_a_request(self) -> None:
        self.loop.call_later(IDLE_SECONDS, self._close_if_silent, self.cycle)

    def _close_if_silent(self, last: object) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket of its own for the server, asked for before a model is loaded; nobody can connect to it yet.

    Raises:
        ValueError: the port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By the name of its protocol asyncio knows that it may turn Nagle's algorithm off, which costs 40 ms per answer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
        bound.bind((host, port))
    except OSError as error:  # socket.gaierror among them
        bound.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from error
    return bound


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server of an application, of which `run(sockets=[...])` returns after SIGTERM or SIGINT.

    It then takes no more connections, and answers what was accepted.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http=ImpatientProtocol,
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=int(IDLE_SECONDS),
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )
