"""`StitchableConfig`: a family of anchors and every stitch through it, in JSON types and explicit."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .chain import check_description
from .routes import AnchorShape, Stitch, check_name, check_stitches, find_stitch, restrict

STITCHABLE_VERSION = "0.1.0"

_CLASS = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")
_AUTO_MAP = {
    "AutoConfig": "configuration_stitchable.StitchableConfig",
    "AutoModel": "modeling_stitchable.StitchableModel",
    "AutoModelForImageClassification": "modeling_stitchable.StitchableForImageClassification",
}


class StitchableConfig(PreTrainedConfig):
    """The configuration of a stitchable model.

    Everything is explicit rather than derived, so that a checkpoint never changes its meaning with the code. Parts of a
    model that no stitch uses are not built: a config with one stitch describes that stitch's network alone.

    Args:
        anchors: one entry per anchor, smallest first: `architecture` (a timm name), `kwargs` (of its constructor),
            `pretrained` (which weights it started from, or None), `depth` in blocks, `stages` (blocks per stage),
            `cuts` ([channels, height, width] at cut 0..depth), `layout`, `prefix_tokens` and `prefix_names`.
        stitches: one entry per stitch: `id`, `route` ([anchor, start, stop] per segment), `layers` (the stitching
            layers between the segments), `flops` (multiply-adds plus normalisation terms per image), `params`, and once
            measured `latency_ms` and `metrics`.
        space: the settings that enumerated the stitches; provenance only.
        resize: "bilinear" where stitching layers may join cuts of different grids.
        stitch_id: the stitch that runs when a call names none.
        image_size: [height, width] in pixels that the cuts and costs hold for.
        num_channels: channels of the image.
        image_mean: per channel, of pixels in 0..1.
        image_std: per channel, of pixels in 0..1.
        left_out: ids of the stitches that the checkpoint has and this model leaves out, because it was loaded for one
            stitch or budget, or extracted.
        num_labels_of_costs: number of labels that `flops` and `params` were counted with.
        stitchable_version: the version that wrote this config.
        kwargs: as in any `PreTrainedConfig`, `num_labels`, `id2label` and `label2id` among them. An `auto_map` is
            ignored: it names the classes of this code, whatever a file says; so is `transformers_weights`.

    Raises:
        ValueError: routes that do not fit the anchors, a default stitch that does not exist, anchors that are none,
            names that are paths or markup.
    """

    model_type = "stitchable"

    def __init__(
        self,
        anchors: Sequence[Mapping[str, Any]] = (),
        stitches: Sequence[Mapping[str, Any]] = (),
        space: Mapping[str, Any] | None = None,
        resize: str | None = None,
        stitch_id: int | None = None,
        image_size: Sequence[int] = (224, 224),
        num_channels: int = 3,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        left_out: Sequence[int] = (),
        num_labels_of_costs: int | None = None,
        stitchable_version: str = STITCHABLE_VERSION,
        **kwargs: Any,
    ) -> None:
        self.anchors = [dict(anchor) for anchor in anchors]
        self.stitches = [dict(stitch) for stitch in stitches]
        self.space = dict(space or {})
        self.resize = resize
        self.stitch_id = stitch_id
        self.image_size = list(image_size)
        self.num_channels = num_channels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.left_out = list(left_out)
        self.num_labels_of_costs = num_labels_of_costs
        self.stitchable_version = stitchable_version
        # Always ours: what a config that was read says would be saved again, and run where that is trusted.
        kwargs["auto_map"] = dict(_AUTO_MAP)
        kwargs.pop("custom_pipelines", None)
        kwargs.pop("transformers_weights", None)  # would have transformers load another file than was checked
        super().__init__(**kwargs)
        # transformers makes an empty config to find what differs from the defaults.
        if self.anchors or self.stitches:
            self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in any `PreTrainedConfig`; `stitch_id` and `max_flops` leave out the stitches that they do not ask for.

        So does `from_pretrained` of configs and models, which calls this.

        Args:
            config_dict: as `to_dict` returns it.
            kwargs: `stitch_id`, the only stitch to keep; or `max_flops`, to keep every stitch up to that cost, or both,
                to make one of these the default; others as in any `PreTrainedConfig`.

        Raises:
            ValueError: there is no such stitch.
        """
        stitch_id, max_flops = kwargs.pop("stitch_id", None), kwargs.pop("max_flops", None)
        if stitch_id is not None or max_flops is not None:
            stitches = [Stitch.from_dict(stitch) for stitch in config_dict.get("stitches", ())]
            if not stitches:
                raise ValueError(
                    "there is no config.json of a stitchable model, so there are no stitches to choose from"
                )
            kept, default = restrict(stitches, config_dict.get("stitch_id"), stitch_id, max_flops)
            left_out = {stitch.id for stitch in stitches} - {stitch.id for stitch in kept}
            config_dict = {
                **config_dict,
                "stitches": [stitch.to_dict() for stitch in kept],
                "stitch_id": default,
                "left_out": sorted({*config_dict.get("left_out", ()), *left_out}),
            }
        return super().from_dict(config_dict, **kwargs)

    def _check(self) -> None:
        shapes = [AnchorShape.from_dict(anchor) for anchor in self.anchors]
        for anchor in self.anchors:
            check_name(anchor["architecture"])
            check_description(anchor["chain"])
            own_class = anchor.get("class")
            if own_class is not None and not (isinstance(own_class, str) and _CLASS.fullmatch(own_class)):
                raise ValueError(
                    f"the class of an anchor is 'file.Class' of a file beside the config, got {own_class!r}"
                )
        stitches = [Stitch.from_dict(stitch) for stitch in self.stitches]
        self.stitches = [stitch.to_dict() for stitch in stitches]
        if self.resize not in (None, "bilinear"):
            raise ValueError(f"resize is 'bilinear' or None, got {self.resize!r}")
        check_stitches(stitches, [shape.depth for shape in shapes])
        if self.stitch_id is None:
            self.stitch_id = stitches[-1].id
        find_stitch(stitches, self.stitch_id)
        if _numbers(self.stitchable_version) > _numbers(STITCHABLE_VERSION):
            warnings.warn(
                f"this checkpoint was written by stitchable {self.stitchable_version}, newer than the code that reads "
                f"it ({STITCHABLE_VERSION}); update with `pip install --upgrade stitchable`",
                stacklevel=2,
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
