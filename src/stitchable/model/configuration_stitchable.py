"""`StitchableConfig`: a family of anchors and every stitch through it, in JSON types and explicit."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .chain import Anchor
from .routes import Cascade, Stitch, check_cascades, check_stitches, find_cascade, find_stitch, restrict
from .schema import read, write

STITCHABLE_VERSION = "0.1.0"

# Fields of transformers of which it does not say what is wrong with them.
_OTHERS: dict[str, Any] = {"id2label": Mapping[str, str], "label2id": Mapping[str, int]}
_OTHERS |= {"architectures": tuple[str, ...], "model_type": str}
_AUTO_MAP = {
    "AutoConfig": "configuration_stitchable.StitchableConfig",
    "AutoModel": "modeling_stitchable.StitchableModel",
    "AutoModelForImageClassification": "modeling_stitchable.StitchableForImageClassification",
}


@dataclass(frozen=True)
class Settings:
    """What a `StitchableConfig` holds besides what every config of transformers does; see there."""

    anchors: tuple[Mapping[str, Any], ...] = ()
    stitches: tuple[Stitch, ...] = ()
    space: Mapping[str, Any] = field(default_factory=dict)
    resize: Literal["bilinear"] | None = None
    stitch_id: int | None = None
    cascades: tuple[Cascade, ...] = ()
    cascade_id: int | None = None
    image_size: tuple[int, int] = (224, 224)
    num_channels: int = 3
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    left_out: tuple[int, ...] = ()
    num_labels_of_costs: int | None = None
    trained_on: tuple[str, ...] = ()
    stitchable_version: str = STITCHABLE_VERSION

    def __post_init__(self) -> None:
        """Refuse what fits together nowhere."""
        if min(*self.image_size, self.num_channels) < 1:
            raise ValueError(f"image_size and num_channels must be at least 1: {self.image_size}, {self.num_channels}")
        if len(self.image_mean) != len(self.image_std) or min(self.image_std, default=0) <= 0:
            raise ValueError("image_mean and image_std must have a number for each channel, of image_std above 0")
        if not all(part.isalnum() for part in self.stitchable_version.split(".")):
            raise ValueError(f"stitchable_version must be like {STITCHABLE_VERSION!r}, got {self.stitchable_version!r}")
        if not self.anchors and not self.stitches:
            return  # transformers makes an empty config to find what differs from the defaults
        anchors = [Anchor.from_dict(entry, f"anchors[{index}]") for index, entry in enumerate(self.anchors)]
        check_stitches(self.stitches, [anchor.depth for anchor in anchors])
        check_cascades(self.cascades, self.stitches, self.left_out)
        if self.stitch_id is not None:
            find_stitch(self.stitches, self.stitch_id)
        if self.cascade_id is not None:
            find_cascade(self.cascades, self.cascade_id, self.stitches)
        if None not in (self.stitch_id, self.cascade_id):
            raise ValueError("stitch_id and cascade_id are the default of a call, so one of them must be null")


class StitchableConfig(PreTrainedConfig):
    """The configuration of a stitchable model.

    Everything is explicit rather than derived, so that a checkpoint never changes its meaning with the code. Parts of a
    model that no stitch uses are not built: a config with one stitch describes that stitch's network alone.

    Args:
        kwargs: those of any `PreTrainedConfig`, `num_labels`, `id2label` and `label2id` among them (an `auto_map` is
            ignored: it names the classes of this code, whatever a file says; so is `transformers_weights`), and

            - `anchors`: one entry each, smallest first: `architecture` (a timm name), `kwargs` (of its constructor),
              `class` ("file.Class" of your own), `pretrained` (which weights it started from), `depth` in blocks,
              `stages` (blocks per stage), `cuts` ([channels, height, width] at cut 0..depth), `layout`,
              `prefix_tokens`, `prefix_names`, and `chain`, the names of its parts.
            - `stitches`: one entry each, see `Stitch`; `cascades`: likewise, see `Cascade` and `Stage`.
            - `stitch_id` or `cascade_id`: what runs when a call names none; the last stitch if both are None.
            - `space`: the settings that enumerated the stitches; provenance only.
            - `resize`: "bilinear" where stitching layers may join cuts of different grids.
            - `image_size` ([height, width] in pixels that cuts and costs hold for), `num_channels`, `image_mean` and
              `image_std` (per channel, of pixels in 0..1).
            - `left_out`: ids of the stitches that the checkpoint has and this model leaves out.
            - `num_labels_of_costs`: number of labels that `flops` and `params` were counted with.
            - `trained_on`: fingerprints of images that the model was trained on.
            - `stitchable_version`: the version that wrote this config.

    Raises:
        ValueError: anything of another type or out of its range, routes that do not fit the anchors, a default stitch
            that does not exist, names that are paths or markup; names the place, such as "stitches[3].route".
    """

    model_type = "stitchable"

    def __init__(self, **kwargs: Any) -> None:
        own = {x.name: kwargs.pop(x.name) for x in fields(Settings) if x.name in kwargs}
        settings = read(Settings, {name: value for name, value in own.items() if value is not None}, "")
        if _numbers(settings.stitchable_version) > _numbers(STITCHABLE_VERSION):
            versions = f"{settings.stitchable_version}, newer than the code that reads it ({STITCHABLE_VERSION})"
            warnings.warn(f"this checkpoint was written by stitchable {versions}; upgrade stitchable", stacklevel=2)
        vars(self).update({x.name: write(getattr(settings, x.name)) for x in fields(Settings)})
        if settings.stitches and settings.stitch_id is None and settings.cascade_id is None:
            self.stitch_id = settings.stitches[-1].id
        # Always ours: what a config that was read says would be saved again, and run where that is trusted.
        kwargs["auto_map"] = dict(_AUTO_MAP)
        kwargs.pop("custom_pipelines", None)
        kwargs.pop("transformers_weights", None)  # would have transformers load another file than was checked
        for name, kind in _OTHERS.items():
            given = kwargs.get(name)
            if given is not None:
                read(kind, {str(key): x for key, x in given.items()} if isinstance(given, Mapping) else given, name)
        dtype = kwargs.get("dtype")
        if not isinstance(getattr(torch, dtype, 0) if isinstance(dtype, str) else dtype, torch.dtype | None):
            raise ValueError(f"dtype must be the name of a data type of torch, got {dtype!r:.80}")
        try:
            super().__init__(**kwargs)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"{error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in any `PreTrainedConfig`; `stitch_id`, `cascade` and `max_flops` leave out what they do not ask for.

        So does `from_pretrained` of configs and models, which calls this.

        Args:
            config_dict: as `to_dict` returns it.
            kwargs: `stitch_id`, the only stitch to keep; `cascade`, whose stages are all to keep; or `max_flops`, to
                keep every stitch up to that cost, `stitch_id` the default; a ValueError if there is no such stitch.
                Others as in any `PreTrainedConfig`.
        """
        stitch_id, cascade, max_flops = (kwargs.pop(name, None) for name in ("stitch_id", "cascade", "max_flops"))
        if cascade is not None and (stitch_id, max_flops) != (None, None):
            raise ValueError("a part is the stitches of a cascade, or what stitch_id and max_flops say; not both")
        if (stitch_id, cascade, max_flops) != (None, None, None):
            stitches = read(tuple[Stitch, ...], config_dict.get("stitches", ()), "stitches")
            if not stitches:
                raise ValueError("there is no config.json of a stitchable model, so there is nothing to choose from")
            if cascade is None:
                kept, default = restrict(stitches, config_dict.get("stitch_id"), stitch_id, max_flops)
            else:
                cascades = read(tuple[Cascade, ...], config_dict.get("cascades", ()), "cascades")
                needed = find_cascade(cascades, cascade, stitches).stitch_ids
                kept, default = [stitch for stitch in stitches if stitch.id in needed], None
            left_out = {stitch.id for stitch in stitches} - {stitch.id for stitch in kept}
            left_out |= set(read(tuple[int, ...], config_dict.get("left_out", ()), "left_out"))
            chosen = {"stitch_id": default, "cascade_id": cascade, "left_out": sorted(left_out)}
            config_dict = {**config_dict, "stitches": write(kept), **chosen}
        return super().from_dict(config_dict, **kwargs)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
