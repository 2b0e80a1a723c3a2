"""What the server's JSON looks like, and what its OpenAPI page says beyond what FastAPI sees."""

from typing import Any

from pydantic import BaseModel, Field

from stitchable.serving.wishes import Wishes


class Label(BaseModel):
    """A class and its score."""

    label: str
    score: float = Field(description="All classes sum to 1.")


class Classification(BaseModel):
    """The answer to an image."""

    labels: list[Label] = Field(description="The best first.")
    ran: str = Field(description='What ran, such as "stitch 24" or "cascade 0".')
    stitch_id: int = Field(description="The stitch whose answer this is: of a cascade the last stage that was reached.")
    accuracy: float = Field(description="As measured of what ran.")
    flops: float = Field(description="Multiply-adds plus normalisation terms spent on this image.")
    queue_ms: float = Field(description="From the body until the batch began, decoding included.")
    run_ms: float = Field(description="Of the batch.")
    batch_size: int
    in_time: bool = Field(description="Whether it was there by its deadline.")


class Choosable(BaseModel):
    """A stitch or cascade that can run."""

    name: str
    kind: str
    id: int
    accuracy: float
    flops: float
    latency_ms: float = Field(description="Of one image, as predicted and corrected by what is observed.")
    per_image_ms: float = Field(description="Of each further image of a batch, likewise.")
    worst: float = Field(description="Time where every image goes through all stages of a cascade, by the mean time.")
    on_front: bool = Field(description="Whether no other is both quicker and more accurate.")


class Target(BaseModel):
    """What the server holds."""

    slo_ms: float = Field(gt=0, le=3.6e6, allow_inf_nan=False)


class Status(BaseModel):
    """What the live page shows."""

    title: str
    slo_ms: float
    least_slo_ms: float
    queue_length: int
    slowdown: float
    last_minute: dict[str, Any]


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "No image, or options that cannot be met; `detail` says why."},
    401: {"description": "No token, or a wrong one."},
    413: {"description": "Too many bytes or pixels."},
    415: {"description": "A content type that holds no image."},
    503: {"description": "It cannot be answered in time, or the queue is full."},
}
_OPTIONS = Wishes.model_json_schema()["properties"]
_IN_BASE64 = {"type": "string", "format": "byte"}
_IN_BYTES = {"type": "string", "format": "binary"}


def _holding(image: dict[str, str]) -> dict[str, Any]:
    schema = {"type": "object", "required": ["image"], "properties": {"image": image, **_OPTIONS}}
    return {"schema": schema}


BODY = {
    "parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in _OPTIONS.items()],
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _IN_BYTES},
            "multipart/form-data": _holding(_IN_BYTES),
            "application/json": _holding(_IN_BASE64),
        },
    },
}
"""Of the OpenAPI page: FastAPI cannot see it, because the body is read by kind."""
