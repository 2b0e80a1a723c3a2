"""Which architectures can be anchors: timm's, and those of one's own; and how one is built."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .adapters import ADAPTERS, REFUSED
from .anchors import Adapter, Chain, Layout, TimmModel  # noqa: F401  # Layout for the files of families
from .checks import check_chain
from .routes import check_name

_REGISTERED: dict[type[nn.Module], Adapter | Callable[[TimmModel], Adapter]] = {}


def describe(model: TimmModel) -> Chain:
    """The chain of a model.

    Raises:
        ValueError: no adapter serves its class, or it is no chain; says why.
    """
    return Chain.of(model, find_adapter(model))


def find_adapter(model: TimmModel) -> Adapter:
    """The adapter for a model.

    Raises:
        ValueError: no adapter serves its class, or it is no chain; says why.
    """
    adapter = adapter_of_class(type(model))
    try:
        return _resolved(adapter, model)
    except ValueError as error:
        raise ValueError(f"this {type(model).__name__} cannot be stitched: {error}") from None


def adapter_of_class(model_class: type[nn.Module]) -> Adapter | Callable[[TimmModel], Adapter]:
    """The adapter for the models of a class, or a function that makes one for a model.

    Raises:
        ValueError: no adapter serves it, or its models are no chains; says why.
    """
    name = model_class.__name__
    for base in model_class.__mro__[:-1]:
        key = f"{base.__module__.removeprefix('timm.models.')}.{base.__name__}"
        if key in REFUSED:
            raise ValueError(f"models of class {name} cannot be stitched: {REFUSED[key]}")
        adapter = _REGISTERED.get(base) or ADAPTERS.get(key)
        # A subclass with a forward of its own may compose its parts in another way.
        forward = "forward_features" if hasattr(base, "forward_features") else "forward"
        if adapter and getattr(model_class, forward) is getattr(base, forward):
            return adapter
    raise ValueError(
        f"models of class {name} cannot be stitched yet; `stitchable families` lists those that can. "
        "Describe their parts in an Adapter and pass both to stitchable.register_anchor(model_class, adapter, example)"
    )


def register_anchor(
    model_class: type[nn.Module], adapter: Adapter | Callable[[TimmModel], Adapter], example: str
) -> None:
    """Make the timm models of a class stitchable.

    Args:
        model_class: the class that `timm.create_model` returns. Subclasses are served too, as long as they inherit its
            `forward_features`.
        adapter: where the parts of its models are, or a function that says so for one model.
        example: the smallest architecture of this class. It is built and run once, at its input size.

    Raises:
        ValueError: the example is no chain: its own forward is not the composition of the parts that the adapter names.
            Names the block where they part.

    The registration holds for this process: a checkpoint of such models loads where the same call was made before.
    """
    _register(model_class, adapter, [example])


def register_family(
    model_class: type[nn.Module],
    adapter: Adapter,
    architectures: Mapping[str, Mapping[str, Any]],
    *,
    input_size: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> None:
    """Make modules of one's own stitchable, which need to know nothing of timm.

    Args:
        model_class: a module whose constructor takes `num_classes` (and `img_size`, if it must know the size of its
            images, and `in_chans`, if others than those of `input_size` may be asked for) and works on the meta device,
            and whose `forward` takes pixel values (N, C, H, W) to logits (N, num_classes).
        adapter: where its parts are, the `head` with the classifier last among them.
        architectures: its sizes, smallest first: name -> further arguments of the constructor.
        input_size: (channels, height, width) of the images.
        num_classes: how many classes an architecture has unless another number is asked for.
        mean: per channel, of pixels in 0..1, that are subtracted from the images.
        std: per channel, that the images are divided by.

    Raises:
        ValueError: a name that timm or another family has, an adapter without a head, or modules that are no chain,
            which is found by running the first architecture once; names the block where its forward and its parts part.

    The registration holds for this process, and for everyone who loads a checkpoint of these models with
    `trust_remote_code=True`: the file that makes this call is saved beside the weights.
    """
    if not architectures or not adapter.head or not isinstance(adapter.head[-1], str):
        raise ValueError(
            f"the family of {model_class.__name__} needs architectures, and an adapter whose head ends with "
            "the name of the classifier"
        )
    if not isinstance(input_size, tuple | list) or len(input_size) != 3:
        raise ValueError(f"input_size is (channels, height, width), got {input_size!r}")
    for name in architectures:
        check_name(name)
        if timm.is_model(name):
            raise ValueError(f"timm has an architecture {name!r} of its own, choose another name")
        other = _OWN[name].model_class if name in _OWN else model_class
        if _origin(other) != _origin(model_class):
            raise ValueError(
                f"there is an architecture {name!r} already, of {'.'.join(_origin(other))}; choose another"
            )
    cfg = {
        "input_size": tuple(input_size),
        "num_classes": num_classes,
        "mean": tuple(mean),
        "std": tuple(std),
        "classifier": adapter.head[-1],
        "fixed_input_size": "img_size" in inspect.signature(model_class).parameters,
    }
    new = {name: _Own(model_class, dict(kwargs), cfg) for name, kwargs in architectures.items()}
    before = dict(_OWN)
    _OWN.update(new)
    try:
        _register(model_class, adapter, list(architectures))
    except BaseException:
        _OWN.clear()
        _OWN.update(before)
        raise


class _Own(NamedTuple):
    """An architecture that is not timm's; `cfg` is its configuration as timm's models have one."""

    model_class: type[nn.Module]
    kwargs: dict[str, Any]
    cfg: dict[str, Any]

    def create(self, kwargs: Mapping[str, Any], num_classes: int | None) -> nn.Module:
        num_classes = self.cfg["num_classes"] if num_classes is None else num_classes
        model: TimmModel = self.model_class(**{**self.kwargs, **kwargs, "num_classes": num_classes})
        model.pretrained_cfg, model.num_classes = dict(self.cfg), num_classes
        return model


_OWN: dict[str, _Own] = {}


def _origin(model_class: type[nn.Module]) -> tuple[str, str]:
    return model_class.__module__, model_class.__qualname__


def _register(
    model_class: type[nn.Module], adapter: Adapter | Callable[[TimmModel], Adapter], examples: Sequence[str]
) -> None:
    """Check the first example on numbers, and that the others can be built and described."""
    example, *others = examples
    with torch.device("meta"):
        for name in others:
            Chain.of(model := create_model(name, num_classes=None), _resolved(adapter, model))
        create_model(example, num_classes=None)
    # What is registered when a file is imported must leave no trace in what its importer does.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = create_model(example, num_classes=None).eval()
        pixel_values = torch.randn(2, *model.pretrained_cfg["input_size"])
        if not isinstance(model, model_class):
            raise ValueError(f"{example!r} is a {type(model).__name__}, not a {model_class.__name__}")
        with torch.no_grad():
            for parameter in model.parameters():  # a branch that begins as zero would hide what it is given
                parameter.add_(0.02 * torch.randn_like(parameter))
        check_chain(model, Chain.of(model, _resolved(adapter, model)), pixel_values)
    _REGISTERED[model_class] = adapter


def _resolved(adapter: Adapter | Callable[[TimmModel], Adapter], model: TimmModel) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else adapter(model)


def is_known(architecture: str) -> bool:
    """Whether this process has this architecture: registered with timm, or by `register_family`."""
    return architecture in _OWN or timm.is_model(architecture)


def own_architectures() -> dict[str, type[nn.Module]]:
    """The architectures that were registered by `register_family`, with their classes."""
    return {name: own.model_class for name, own in _OWN.items()}


def create_model(architecture: str, kwargs: Mapping[str, Any] | None = None, *, num_classes: int | None) -> TimmModel:
    """A model with random weights: `timm.create_model`, of registered architectures too, with an error that helps.

    What is asked for may come from a config that nobody vouches for, so nothing is read from a file or the network.

    Args:
        architecture: its name, with or without one of timm's tags of pretrained weights.
        kwargs: further arguments of the model, in JSON types.
        num_classes: None means the architecture's own.

    Raises:
        ValueError: an unknown architecture (the nearest names are suggested), or kwargs that are refused.
    """
    check_name(architecture)
    kwargs = _checked(architecture, {} if kwargs is None else kwargs)
    if not is_known(architecture):
        near = difflib.get_close_matches(architecture.split(".")[0], [*timm.list_models(), *_OWN], n=3)
        raise ValueError(
            f"timm {timm.__version__} has no model {architecture!r}"
            + (f"; the nearest are {', '.join(near)}" if near else "; timm.list_models() lists them all")
        )
    # Most of the time of building a model on the meta device would go into initialising what has no values.
    without_values = _NoValues() if torch.get_default_device().type == "meta" else nullcontext()
    own = _OWN.get(architecture)
    try:
        with without_values:
            return own.create(kwargs, num_classes) if own else _create(architecture, kwargs, num_classes)
    except Exception as error:  # constructors have many ways to say that they cannot work with their arguments
        given = {**(own.kwargs if own else {}), **kwargs}
        reason = str(error) or "an assertion of timm fails"
        raise ValueError(f"{architecture!r} cannot be made with {given}: {reason}") from error


def _create(architecture: str, kwargs: Mapping[str, Any], num_classes: int | None) -> TimmModel:
    return timm.create_model(architecture, pretrained=False, num_classes=num_classes, **kwargs)


# What timm's functions take for themselves before the constructor of a model gets the rest: files and addresses of
# weights, and what else can be made of a model.
_NOT_OF_A_MODEL = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(timm.models.build_model_with_cfg).parameters,
    *("pruned", "features_only", "out_indices", "feature_cls", "num_classes", "device", "dtype"),
}


def _checked(architecture: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the further arguments of a model.

    Raises:
        ValueError: an argument that is none of a model's constructor, or a value that JSON does not have.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ValueError(f"the kwargs of {architecture!r} must be arguments of the model by name, got {kwargs!r}")
    for name in sorted(_NOT_OF_A_MODEL & set(kwargs)):
        raise ValueError(
            f"the kwargs of {architecture!r} cannot hold {name!r}: they are arguments of the model's constructor; "
            "weights from a file are given as `weights` to from_anchors"
        )
    for name, value in kwargs.items():
        if not _is_json(value):
            raise ValueError(
                f"the kwargs of {architecture!r} are kept in config.json, but {name} is {value!r}; give a finite "
                "number, text, None, or a list or mapping of them"
            )
    return dict(kwargs)


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(member) for key, member in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


class _NoValues(TorchDispatchMode):
    """Leave out operations that only change the values of a meta tensor, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        changes_values = func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
        if changes_values and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
