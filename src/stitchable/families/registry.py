"""Which architectures can be anchors: those of the table, and what was registered in this process."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from transformers.dynamic_module_utils import get_imports
from transformers.utils import cached_file, logging

from stitchable.families import timm_functions
from stitchable.families.adapter import Adapter, Description, code_reference
from stitchable.families.adapters import ADAPTERS, REFUSED
from stitchable.families.checks import check_chain
from stitchable.importing import import_file
from stitchable.model import operations
from stitchable.model.architectures import check_name
from stitchable.model.architectures import create_model as create_known_model
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.operations import OWN_CODE, TimmModel

logger = logging.get_logger(__name__)

_SHIPPED = Path(operations.__file__).parent
_load_own_code: Any = StitchablePreTrainedModel._load_own_code.__func__  # type: ignore[attr-defined]
_REGISTERED: dict[type[nn.Module], Adapter | Callable[[TimmModel], Adapter]] = {}
_OURS = {str(code_reference(x)): x for x in vars(timm_functions).values() if inspect.isfunction(x)}
OWN_CODE |= _OURS


def describe(model: TimmModel) -> Description:
    """Where the parts of a model are.

    Raises:
        ValueError: no adapter serves its class, or it is no chain; says why.
    """
    return Description.of(model, find_adapter(model))


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

    The registration holds for this process. A checkpoint of such models brings the file of the class along, which must
    import nothing of stitchable, so this call belongs into another file.
    """
    with _all_or_nothing():
        _make_known(model_class)
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
    """Make your own modules stitchable, which need to know nothing of timm.

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

    The registration holds for this process. A checkpoint of these models brings the file of the class along for those
    who load it with `trust_remote_code=True`; that file must import nothing of stitchable, so this call belongs into
    another.
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
    with _all_or_nothing():
        _make_known(model_class)
        _OWN.update({name: _Own(model_class, dict(kwargs), cfg) for name, kwargs in architectures.items()})
        _register(model_class, adapter, list(architectures))


class _Own(NamedTuple):
    """An architecture that is not timm's; `cfg` is its configuration as timm's models have one."""

    model_class: type[nn.Module]
    kwargs: dict[str, Any]
    cfg: dict[str, Any]


_OWN: dict[str, _Own] = {}


def create_model(architecture: str, kwargs: Mapping[str, Any] | None = None, *, num_classes: int | None) -> TimmModel:
    """A model with random weights of an architecture that this process knows, with timm's `pretrained_cfg`.

    Raises:
        ValueError: as `stitchable.model.architectures.create_model`.
    """
    own = _OWN.get(architecture)
    if own is None:
        if isinstance(architecture, str) and not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, _OWN, n=3)
            if near:
                raise ValueError(f"there is no model {architecture!r}; the nearest are {', '.join(near)}")
        return create_known_model(architecture, kwargs, num_classes=num_classes)
    num_classes = own.cfg["num_classes"] if num_classes is None else num_classes
    reference = code_reference(own.model_class)
    model = create_known_model(
        architecture, full_kwargs(architecture, kwargs), num_classes=num_classes, own_class=reference
    )
    model.pretrained_cfg, model.num_classes = dict(own.cfg), num_classes
    return model


def full_kwargs(architecture: str, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of the constructor: those of a registered architecture, and what is given."""
    return {**(_OWN[architecture].kwargs if architecture in _OWN else {}), **(kwargs or {})}


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """Leave every table as it was where a registration is refused."""
    tables: tuple[dict[Any, Any], ...] = (_OWN, _REGISTERED, OWN_CODE)
    before = [dict(table) for table in tables]
    try:
        yield
    except BaseException:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        raise


def _make_known(model_class: type[nn.Module]) -> None:
    reference = code_reference(model_class)
    if reference is None:
        return
    file = f"{reference.split('.')[0]}.py"
    if (_SHIPPED / file).exists() or file == Path(timm_functions.__file__).name:
        raise ValueError(f"{model_class.__name__} is defined in {file}, a name that a file of every checkpoint has")
    path = getattr(sys.modules.get(model_class.__module__), "__file__", None)
    if path is None or model_class.__module__ == "__main__":
        logger.warning(
            f"{model_class.__name__} is not defined in a file of its own, so no checkpoint can bring it along"
        )
    elif "stitchable" in get_imports(path):
        logger.warning(
            f"{file} imports stitchable, so that checkpoints of {model_class.__name__} load only where that is "
            "installed; register the class in another file"
        )
    OWN_CODE[reference] = model_class


def _origin(model_class: type[nn.Module]) -> tuple[str, str]:
    return model_class.__module__, model_class.__qualname__


def _register(
    model_class: type[nn.Module], adapter: Adapter | Callable[[TimmModel], Adapter], examples: Sequence[str]
) -> None:
    """Check the first example on numbers, and that the others can be built and described."""
    example, *others = examples
    with torch.device("meta"):
        for name in others:
            Description.of(model := create_model(name, num_classes=None), _resolved(adapter, model))
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
        described = Description.of(model, _resolved(adapter, model))
        check_chain(model, described, pixel_values)
    _REGISTERED[model_class] = adapter


def _resolved(adapter: Adapter | Callable[[TimmModel], Adapter], model: TimmModel) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else adapter(model)


def own_architectures() -> dict[str, type[nn.Module]]:
    """The architectures that were registered by `register_family`, with their classes."""
    return {name: own.model_class for name, own in _OWN.items()}


def run_modules(paths: Sequence[str]) -> None:
    """Import Python files, which register models with timm and stitchable, and may import files beside them.

    Raises:
        ValueError: there is no such file.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"modules: there is no file {path}")
        if path.stem in sys.modules:
            if Path(getattr(sys.modules[path.stem], "__file__", None) or "").resolve() == path.resolve():
                continue
            raise ValueError(f"modules: there is a module {path.stem} already, give {path} another name")
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)
        import_file(path.stem, path)


def load_own_code(
    cls: type[StitchablePreTrainedModel], references: set[str], source: Any, trust: bool, hub: Mapping[str, Any]
) -> None:
    """As the model's own, where the classes of a checkpoint that is trusted may be registered in this process already.

    Raises:
        ValueError: what is registered is other code than the checkpoint's.
    """
    for reference in sorted((references - set(_OURS)) & set(OWN_CODE)) if trust else ():
        file = cached_file(source, f"{reference.split('.')[0]}.py", **hub)
        if not _is_code_of(OWN_CODE[reference], file):
            fix = "load it in a process of its own, or without trust_remote_code to run what is registered"
            raise ValueError(f"{source} brings other code of {reference} than what is registered here; {fix}")
    _load_own_code(cls, references, source, trust, hub)


def _is_code_of(known: type, path: str | None) -> bool:
    try:
        own = Path(inspect.getfile(known)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # of a notebook, which no file can equal
        return True
    return path is not None and Path(path).read_text(encoding="utf-8").split() == own.split()
