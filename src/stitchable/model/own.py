"""What belongs to one stitch alone: the norms behind its first joint, and updates of its stitching layers.

Everything else is shared, so teaching a stitch changes neither the anchors nor another stitch. To run one, its blocks
are seen through views: modules that share all but the norms with those of the anchor.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .chain import NECK, Chain
from .routes import Stitch


class Update(nn.Module):
    """What a stitch adds to a shared stitching layer y = W x: b + B A x, zero at first.

    Low-rank layers of a stitch's own are those of SN-Netv2 (https://arxiv.org/abs/2307.00154).

    The bias is b (out_channels,), `down` A (rank, in_channels) and `up` B (out_channels, rank); where these would be no
    smaller than their product, `down` is that, and `up` None.
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
        if self.up is None:
            return F.linear(x, self.down, self.bias)
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def merge(self, linear: nn.Linear) -> None:
        """Add it to the weight and bias of a layer in place."""
        linear.weight.add_(self.down if self.up is None else self.up @ self.down)
        linear.bias.add_(self.bias)


class OwnParts(nn.Module):
    """What a stitch has of its own: norms, by anchor and name ("1-blocks-7-norm1"), and `Update`s by layer ("0-1-6").

    For the name that each of these norms has in the model, `places` has the name in `norms`.
    """

    def __init__(self, stitch: Stitch, rank: int, chains: Mapping[int, Chain], anchors: Any, layers: Any) -> None:
        super().__init__()
        first, *behind = stitch.route
        runs = [(segment.anchor, block) for segment in behind for block in range(segment.start, segment.stop)]
        runs += [] if stitch.skips_neck else [(behind[-1].anchor, NECK)]
        self.norms, self.layers = nn.ModuleDict(), nn.ModuleDict()
        self.places: dict[str, str] = {}
        self.views: dict[tuple[int, int], View] = {}
        for anchor, block in runs:
            names = _norms_of(chains[anchor], block, anchors[anchor])
            if names and anchor == first.anchor and first.start <= block < first.stop:
                twice = f"anchors.{anchor}.{names[0]} is run before and behind its first joint"
                raise ValueError(f"it cannot have norms of its own: {twice}")
            keys = {name: f"{anchor}-{name.replace('.', '-')}" for name in names}
            self.norms.update({key: copy.deepcopy(anchors[anchor].get_submodule(name)) for name, key in keys.items()})
            self.places |= {f"anchors.{anchor}.{name}": key for name, key in keys.items()}
            if keys:
                self.views[anchor, block] = View(anchors[anchor], keys)
        if not self.places:
            raise ValueError("there is no norm behind its first joint that could be its own; train it without `own`")
        for name in stitch.layers:
            shared = layers(name).linear
            where = {"device": shared.weight.device, "dtype": shared.weight.dtype}
            self.layers[name.replace(".", "-")] = Update(shared.in_features, shared.out_features, rank, **where)

    def seen(self, anchor: int, block: int) -> Any:
        """An anchor as one of its blocks, or its neck (-1), is run by this stitch; None if that is as it is."""
        view = self.views.get((anchor, block))
        return view and view.refreshed(self.norms)


class View:
    """A module that shares everything with `source` but some submodules; it is registered nowhere.

    What the source is later given or made (devices, weights, training mode, adapters) holds for the view too. `names`
    are those of its submodules that are replaced, with their names in `OwnParts.norms`.
    """

    def __init__(self, source: nn.Module, names: Mapping[str, str]) -> None:
        self.source, self.module = source, object.__new__(type(source))
        self.norms = {name: key for name, key in names.items() if "." not in name}
        inner: dict[str, dict[str, str]] = {}
        for name, key in names.items():
            child, _, rest = name.partition(".")
            if rest:
                inner.setdefault(child, {})[rest] = key
        self.views = {child: View(source.get_submodule(child), rest) for child, rest in inner.items()}

    def refreshed(self, norms: Any) -> Any:
        """The module as its source is now, with these norms; threads that do so at the same time write the same."""
        state = dict(vars(self.source))
        modules = state["_modules"] = dict(state["_modules"])
        replaced = [name for name, view in self.views.items() if view.source is not modules[name]]
        # What is bound to the source would run its norms; but accelerate's brings in weights, which are there.
        state.pop("_compiled_call_impl", None)
        if state.pop("forward", None) is not None and "_hf_hook" not in state:
            replaced.append("the forward")
        if replaced:
            what = f"{replaced[0]} of a {type(self.source).__name__} was replaced"
            raise ValueError(f"{what}, so a stitch with norms of its own cannot run it; extract the stitch first")
        modules |= {name: view.refreshed(norms) for name, view in self.views.items()}
        modules |= {name: norms[key] for name, key in self.norms.items()}
        vars(self.module).update(state)
        return self.module


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with parameters or statistics, of PyTorch, timm or a class of your own."""
    of_itself = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    nested = len([*module.parameters()]) > len([*module.parameters(recurse=False)])
    return "norm" in type(module).__name__.lower() and bool(of_itself) and not nested


def _norms_of(chain: Chain, block: int, anchor: nn.Module) -> list[str]:
    parts = chain.modules_of(anchor, chain.operations_of(block))
    named = (found for name, part in parts.items() for found in part.named_modules(prefix=name))
    return list(dict.fromkeys(name for name, module in named if is_norm(module)))
