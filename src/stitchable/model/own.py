"""What belongs to one stitch alone: the norms behind its first joint, and updates of its stitching layers.

Everything else is shared, so teaching a stitch changes neither the anchors nor another stitch. To run one, its blocks
are seen through views: modules that share all but the norms with those of the anchor.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .chain import Chain
from .operations import FUNCTION
from .routes import Segment, Stitch


class Update(nn.Module):
    """What a stitch adds to a shared stitching layer y = W x: b + B A x, zero at first.

    Low-rank layers of a stitch's own are those of SN-Netv2 (https://arxiv.org/abs/2307.00154).

    Attributes:
        bias: b (out_channels,).
        down: A (rank, in_channels); where B and A would be no smaller than their product, that, and no `up`.
        up: B (out_channels, rank).
    """

    def __init__(self, in_channels: int, out_channels: int, rank: int, **where: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(out_channels, **where))
        is_whole = rank * (in_channels + out_channels) >= in_channels * out_channels
        self.down = nn.Parameter(torch.empty(out_channels if is_whole else rank, in_channels, **where))
        self.up = None if is_whole else nn.Parameter(torch.empty(out_channels, rank, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it add nothing."""
        nn.init.zeros_(self.bias)
        if self.up is None:
            nn.init.zeros_(self.down)
        else:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
            nn.init.zeros_(self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (..., in_channels) to what is added to the layer's (..., out_channels)."""
        return (
            F.linear(x, self.down, self.bias)
            if self.up is None
            else F.linear(F.linear(x, self.down), self.up, self.bias)
        )

    def merge(self, linear: nn.Linear) -> None:
        """Add it to the weight and bias of a layer in place."""
        linear.weight.add_(self.down if self.up is None else self.up @ self.down)
        linear.bias.add_(self.bias)


class OwnParts(nn.Module):
    """What a stitch has of its own.

    Attributes:
        norms: by anchor and name, such as "1-blocks-7-norm1".
        layers: `Update`s by the stitching layer, such as "0-1-6".
        places: for the name of each of these norms in the model the name in `norms`.
    """

    def __init__(self, stitch: Stitch, rank: int, chains: Mapping[int, Chain], anchors: Any, layers: Any) -> None:
        super().__init__()
        behind = [name for segment in stitch.route[1:] for name in _norms(segment, chains, anchors)]
        last = stitch.route[-1].anchor
        neck = () if stitch.skips_neck else chains[last].neck
        behind += [f"anchors.{last}.{name}" for name in _norms_of(neck, anchors[last])]
        twice = sorted(set(behind) & set(_norms(stitch.route[0], chains, anchors)))
        if twice:
            raise ValueError(f"it cannot have norms of its own: {twice[0]} is run before and behind its first joint")
        if not behind:
            raise ValueError("there is no norm behind its first joint that could be its own; train it without `own`")
        self.places = {name: "-".join(name.split(".")[1:]) for name in behind}
        found: dict[str, Any] = {name: anchors.get_submodule(name.partition(".")[2]) for name in behind}
        self.norms = nn.ModuleDict({key: copy.deepcopy(found[name]) for name, key in self.places.items()})
        self.layers = nn.ModuleDict()
        for name in stitch.layers:
            shared = layers(name).linear
            where = {"device": shared.weight.device, "dtype": shared.weight.dtype}
            self.layers[name.replace(".", "-")] = Update(shared.in_features, shared.out_features, rank, **where)


class View:
    """A module that shares everything with `source` but some submodules; it is registered nowhere.

    What the source is later given or made (devices, weights, training mode, adapters) holds for the view too.

    Args:
        source: a module of an anchor.
        names: of its submodules that are replaced, with their names in `OwnParts.norms`.
    """

    def __init__(self, source: nn.Module, names: Mapping[str, str]) -> None:
        self.source, self.module = source, object.__new__(type(source))
        self.children: dict[str, View | str] = {}
        for child in dict.fromkeys(name.partition(".")[0] for name in names):
            inner = {name.removeprefix(f"{child}."): key for name, key in names.items() if name.startswith(f"{child}.")}
            self.children[child] = names[child] if child in names else View(source.get_submodule(child), inner)

    def refreshed(self, norms: Any) -> Any:
        """The module as its source is now, with these norms; threads that do so at the same time write the same."""
        now = vars(self.source)
        state, modules = dict(now), dict(now["_modules"])
        for name, child in self.children.items():
            if isinstance(child, View) and child.source is not modules[name]:
                raise ValueError(
                    f"{name} of a {type(self.source).__name__} was replaced, so a stitch with norms of its own cannot "
                    "run it; extract the stitch first"
                )
            modules[name] = child.refreshed(norms) if isinstance(child, View) else norms[child]
        state["_modules"] = modules
        # Both are bound to the source, whose norms they would run; accelerate's brings in weights that are there.
        state.pop("_compiled_call_impl", None)
        if state.pop("forward", None) is not None and "_hf_hook" not in state:
            raise ValueError(
                f"the forward of a {type(self.source).__name__} was replaced, so a stitch with norms of its own cannot "
                "run it; extract the stitch first"
            )
        vars(self.module).update(state)
        return self.module


def views_of(parts: OwnParts, stitch: Stitch, chains: Mapping[int, Chain], anchors: Any) -> dict[tuple[int, int], View]:
    """For each block behind the first joint, by anchor and number, and the neck (-1), the anchor as it is seen."""
    views = {}
    for segment in stitch.route[1:]:
        anchor, chain = anchors[segment.anchor], chains[segment.anchor]
        for block in (*range(segment.start, segment.stop), -1):
            names = _norms_of(chain.neck if block < 0 else chain.blocks[block], anchor)
            own = {name: parts.places.get(f"anchors.{segment.anchor}.{name}") for name in names}
            views[segment.anchor, block] = View(anchor, {name: key for name, key in own.items() if key})
    return views


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with parameters or statistics, of PyTorch, timm or a class of one's own."""
    has_own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    nested = any(True for child in module.children() for _ in child.parameters())
    return "norm" in type(module).__name__.lower() and has_own and not nested


def _norms(segment: Segment, chains: Mapping[int, Chain], anchors: Any) -> Iterator[str]:
    for block in range(segment.start, segment.stop):
        for name in _norms_of(chains[segment.anchor].blocks[block], anchors[segment.anchor]):
            yield f"anchors.{segment.anchor}.{name}"


def _norms_of(operations: tuple[str, ...], anchor: nn.Module) -> list[str]:
    found = {}
    for operation in (name for name in operations if not name.startswith(FUNCTION)):
        try:
            part = anchor.get_submodule(operation)
        except AttributeError:  # a method or a parameter
            continue
        for name, module in part.named_modules(prefix=operation):
            if is_norm(module):
                found[name] = module
    return list(found)
