"""What a request may ask for beside its image."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stitchable.model.routes import find_stitch
from stitchable.serving.engine import Engine, name_of
from stitchable.serving.policy import Choice


class Wishes(BaseModel):
    """Options of a request: in the query, the form or the JSON, whichever carries the image."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(5, ge=1, description="How many classes to name, the best first.")
    slo_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Milliseconds until the answer must be there."
    )
    min_accuracy: float | None = Field(None, ge=0, le=1, description="Of the stitch or cascade that answers.")
    stitch_id: int | None = Field(None, description="The stitch that is to answer.")
    mean_flops: float | None = Field(None, gt=0, description="Upper bound on FLOPs per image, of a cascade the mean.")

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "Wishes":
        """Options as they came.

        Raises:
            ValueError: an unknown one, or a value that is none; says which.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = ".".join(map(str, first["loc"]))
            known = ", ".join(cls.model_fields)
            raise ValueError(f"{name}: {first['msg']}, got {first['input']!r:.80}; options are {known}") from error

    @property
    def seconds(self) -> float | None:
        """Until the answer must be there."""
        return None if self.slo_ms is None else self.slo_ms / 1e3

    def permits(self, engine: Engine) -> Callable[[Choice], bool] | None:
        """Which choices may answer; None for all.

        Raises:
            ValueError: an unknown stitch, bounds that no choice keeps, or a deadline that none of them can meet; names
                the nearest.
        """
        choices = engine.policy.choices
        if self.stitch_id is not None:
            find_stitch(engine.model.stitches, self.stitch_id)
        bounds = self.model_dump(include={"stitch_id", "min_accuracy", "mean_flops"}, exclude_none=True)
        permits = self._permits if bounds else None
        if permits is not None and not any(map(permits, choices)):
            best = max(choices, key=lambda choice: choice.accuracy)
            least = min(choices, key=lambda choice: choice.flops)
            asked = ", ".join(f"{name} {value:g}" for name, value in bounds.items())
            raise ValueError(
                f"no measured stitch or cascade has {asked}; the most accurate is {name_of(best)} with "
                f"{best.accuracy:g}, the cheapest {name_of(least)} with {least.flops:,} FLOPs"
            )
        if self.seconds is not None:
            engine.check_target(self.seconds, permits)
        return permits

    def _permits(self, choice: Choice) -> bool:
        return (
            (self.stitch_id is None or (choice.kind == "stitch" and choice.id == self.stitch_id))
            and (self.min_accuracy is None or choice.accuracy >= self.min_accuracy)
            and (self.mean_flops is None or choice.flops <= self.mean_flops)
        )
