"""Where the parts of a model are, and in which data type: features follow, and weights that accelerate offloads."""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .chain import Chain

_LOCK = threading.RLock()  # two threads would take the weights from each other
_NOTHING = nullcontext()
_PLACED = re.compile(r"|anchors(\.\d+)?|(stitching_layers|own)(\..+)?")


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of a module; `parameters()` takes ten times as long, which a small network notices."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    found = (first_parameter(child) for child in module._modules.values() if child is not None)
    return next((parameter for parameter in found if parameter is not None), None)


def device_of(module: nn.Module) -> torch.device:
    """Of the weights of a module, or where accelerate offloads them, the device that it brings them to."""
    tensor = first_parameter(module)
    if tensor is None:
        return torch.device("cpu")
    if not tensor.is_meta:
        return tensor.device
    devices = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    return next((torch.device(device) for device in devices if device is not None), tensor.device)


def entering(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Features on the device and in the data type of the part that they enter (of autocast, where that decides)."""
    first = first_parameter(module)
    if first is None:
        return features
    device = device_of(module) if first.is_meta else first.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return features.to(device)
    return features.to(device, first.dtype)


def brought_in(model: nn.Module, anchor: nn.Module, chain: Chain, block: int) -> AbstractContextManager[None]:
    """With what a block of an anchor needs, or if it is -1 what all but its blocks do, where accelerate offloads it.

    Its hooks bring in what a module itself owns when the forward of that module is called. That of an anchor never is,
    and some of timm's modules use the weights of others (BEiT those of its `qkv`) or have other methods (rotary
    embeddings).
    """
    placed = "_hf_hook" in model.__dict__ or "_hf_hook" in anchor.__dict__
    return _brought_in(anchor, chain, block) if placed else _NOTHING


@contextmanager
def _brought_in(anchor: nn.Module, chain: Chain, block: int) -> Iterator[None]:
    with _LOCK:
        parts = chain.modules_of(anchor, chain.blocks[block] if block >= 0 else None)
        inside = {module for part in parts.values() for module in part.modules()}
        modules = [anchor, *inside] if block >= 0 else [module for module in anchor.modules() if module not in inside]
        held = [(hook, module) for module in modules for hook in _hooks(module) if getattr(hook, "offload", False)]
        if held and torch.is_grad_enabled() and any(module.training for _, module in held):
            raise ValueError("offloaded weights get no gradients, so such a model cannot be trained; call model.eval()")
        for hook, module in held:
            hook.pre_forward(module)
            hook.offload = False  # or the module's own forward would bring them in again, and leave nothing to others
        try:
            yield
        finally:
            for hook, module in held:
                hook.offload = True
                hook.post_forward(module, None)


def _hooks(module: nn.Module) -> Sequence[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def check_device_map(device_map: Mapping[str, Any]) -> None:
    """Refuse with a ValueError to place parts of an anchor apart, since a stitch enters it at any block."""
    wrong = [name for name in device_map if not _PLACED.fullmatch(name)]
    if wrong:
        allowed = "it can place whole anchors ('anchors.0') and stitching_layers"
        raise ValueError(f"the device map places {wrong[0]!r}; {allowed}")
