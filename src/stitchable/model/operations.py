"""Operations between the modules of a model that config.json names, and what else it may name: code of its own.

The same operations in the same order as timm's, so that an anchor computes what timm computes, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch

TimmModel = Any
"""An `nn.Module` with timm's `forward_features` and `forward_head`, which timm gives no type of its own."""

Grid = tuple[int, int]
"""Height and width of the grid that features live on."""

FUNCTION = "function:"
"""What the name of a function begins with in config.json."""

OWN_CODE: dict[str, Any] = {}
"""Classes of anchors that are not timm's, and functions that chains name, as "file.Name": registered in this process,
or loaded with a checkpoint."""


OPERATIONS: dict[str, Callable[[TimmModel, torch.Tensor], torch.Tensor]] = {
    "to_nhwc": lambda model, x: x.permute(0, 2, 3, 1),
    "to_nchw": lambda model, x: x.permute(0, 3, 1, 2),
    "to_contiguous_nchw": lambda model, x: x.permute(0, 3, 1, 2).contiguous(),
    "tokens_of_nchw": lambda model, x: x.flatten(2).transpose(1, 2),
    "tokens_of_nhwc": lambda model, x: x.flatten(1, 2),
}


def find_function(name: str) -> Callable[..., Any]:
    """A function of this table, or of `OWN_CODE`; a ValueError if neither has it."""
    function = OPERATIONS.get(name) or OWN_CODE.get(name)
    if function is None or isinstance(function, type):
        places = "operations.py, nor one 'file.name' that this process has registered"
        raise ValueError(f"the chain of an anchor names a function {name!r} that is not in {places}")
    return function
