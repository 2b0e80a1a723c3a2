"""The bodies of requests: read within limits, and unpacked by their kind."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from stitchable.serving.engine import Unavailable
from stitchable.serving.images import MAX_BYTES, TooLarge

BODY_SECONDS = 10.0  # in which a body must have come
_MAX_BODY = MAX_BYTES * 4 // 3 + 2**16  # base64, and what stands around it
_MAX_BODIES = 256 * 2**20  # bytes of all bodies at a time


class WrongType(ValueError):
    """A body of a kind that holds no image."""


class Inbox:
    """Reads bodies, with a limit on each and on all of them together."""

    def __init__(self) -> None:
        self.held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts until the block ends.

        Raises:
            TooLarge: it has more bytes than any image in base64 may have.
            ValueError: it did not come within 10 seconds.
            Unavailable: too many others are held.
            ClientDisconnect: the client hung up.
        """
        content = bytearray()
        try:
            try:
                await asyncio.wait_for(self._fill(request, content), BODY_SECONDS)
            except asyncio.TimeoutError as error:
                raise ValueError(f"the body did not come within {BODY_SECONDS:g} seconds") from error
            yield bytes(content)
        finally:
            self.held -= len(content)

    async def _fill(self, request: Request, content: bytearray) -> None:
        length = 0
        async for chunk in request.stream():
            length += len(chunk)
            if length <= _MAX_BODY:
                if self.held + len(chunk) > _MAX_BODIES:
                    raise Unavailable("too many images are being sent")
                self.held += len(chunk)
                content += chunk
        # Said when all has come: whoever is still sending does not listen.
        if length > _MAX_BODY:
            raise TooLarge(f"an image may have {MAX_BYTES / 2**20:.0f} MiB, this body has {length / 2**20:.1f}")


async def unpack(headers: Headers, body: bytes) -> tuple[bytes, dict[str, Any]]:
    """The image, and the options that came with it.

    Raises:
        WrongType: by its content type it is neither an image, nor a form, nor JSON.
        ValueError: a form or JSON without an image.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(headers, body)
    if kind == "application/json":
        return await asyncio.to_thread(_read_json, body)  # which takes a while for some megabytes
    if kind in ("", "application/octet-stream") or kind.startswith("image/"):
        return body, {}
    raise WrongType(
        f"the content type {kind!r:.80} holds no image; send image/jpeg or the like, application/octet-stream, "
        "multipart/form-data with a file 'image', or application/json with 'image' in base64"
    )


async def _read_form(headers: Headers, body: bytes) -> tuple[bytes, dict[str, Any]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(headers, stream(), max_files=1, max_fields=10).parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary
        raise ValueError(f"the form cannot be read: {getattr(error, 'message', error)}") from error
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise ValueError("the form has no file 'image'")
        return await image.read(), {name: value for name, value in form.items() if name != "image"}
    finally:
        await form.close()


def _read_json(body: bytes) -> tuple[bytes, dict[str, Any]]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    name = "inputs" if isinstance(given, Mapping) and "inputs" in given else "image"  # "inputs" of the Hub's clients
    if not isinstance(given, Mapping) or not isinstance(given.get(name), str):
        raise ValueError("the JSON must be an object with 'image' in base64")
    options = {key: value for key, value in given.items() if key not in (name, "parameters")}
    parameters = given.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise ValueError(f"parameters must be an object, got {parameters!r:.80}")
    options |= parameters
    if options.pop("function_to_apply", "softmax") != "softmax":
        raise ValueError("function_to_apply can only be 'softmax'")
    try:
        return base64.b64decode(given[name], validate=True), options
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name!r} is no base64: {error}") from error
