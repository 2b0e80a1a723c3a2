"""An anchor's modules from its name and arguments: one of timm's architectures, or a class of your own."""

import difflib
import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .operations import OWN_CODE, TimmModel
from .schema import read

_NAME = re.compile(r"[\w.-]+")
# What timm's functions take for themselves before the constructor of a model gets the rest: files and addresses of
# weights, and what else can be made of a model.
_NOT_OF_A_MODEL = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(timm.models.build_model_with_cfg).parameters,
    *("pruned", "features_only", "out_indices", "feature_cls", "num_classes", "device", "dtype"),
}


def check_name(architecture: Any) -> None:
    """Refuse with a ValueError what names no architecture, such as a path, an address or markup."""
    if not isinstance(architecture, str) or not _NAME.fullmatch(architecture):
        raise ValueError(f"an architecture is named by letters, digits, '_', '-' and '.', got {architecture!r:.80}")


def create_model(
    architecture: str, kwargs: Mapping[str, Any] | None = None, *, num_classes: int | None, own_class: str | None = None
) -> TimmModel:
    """A model with random weights: `timm.create_model`, or a class of `OWN_CODE`, with an error that helps.

    What is asked for may come from a config that nobody vouches for, so nothing is read from a file or the network.

    Args:
        architecture: its name, with or without one of timm's tags of pretrained weights.
        kwargs: further arguments of the model, in JSON types; those that name files are refused with a ValueError.
        num_classes: None means the architecture's own.
        own_class: "file.Class" where the architecture is not timm's. Its constructor takes the kwargs and
            `num_classes`, unless the file registers the architecture with timm.
    """
    check_name(architecture)
    kwargs = read(Mapping[str, Any], kwargs or {}, f"the kwargs of {architecture!r}")
    for name in sorted(_NOT_OF_A_MODEL & set(kwargs)):
        raise ValueError(f"the kwargs of {architecture!r} cannot hold {name!r}: they are arguments of its constructor")
    is_timms = timm.is_model(architecture)
    if own_class is not None and own_class not in OWN_CODE:
        raise ValueError(f"{architecture!r} is made by {own_class}, which this process has not registered")
    if own_class is None and not is_timms:
        near = ", ".join(difflib.get_close_matches(architecture.split(".")[0], timm.list_models(), n=3))
        hint = f"the nearest are {near}" if near else "timm.list_models() lists them all"
        raise ValueError(f"timm {timm.__version__} has no model {architecture!r}; {hint}")
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    # Most of the time of building a model on the meta device would go into initialising what has no values.
    on_meta = torch.get_default_device().type == "meta"
    try:
        with _NoValues() if on_meta else nullcontext():
            if own_class is not None and not is_timms:
                return OWN_CODE[own_class](**kwargs, **classes)
            return timm.create_model(architecture, pretrained=False, **classes, **kwargs)
    except Exception as error:  # constructors have many ways to say that they cannot work with their arguments
        reason = str(error) or "an assertion of timm fails"
        raise ValueError(f"{architecture!r} cannot be made with {kwargs}: {reason}") from error


class _NoValues(TorchDispatchMode):
    """Leave out operations that only change the values of a meta tensor, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        changes_values = func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
        if changes_values and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
