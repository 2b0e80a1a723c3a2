"""Whether a model is the chain that its adapter describes: found by running it once."""

import copy
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from stitchable.families.adapter import Description
from stitchable.model.chain import Chain, Part
from stitchable.model.operations import TimmModel


def check_chain(model: TimmModel, described: Description, pixel_values: torch.Tensor) -> None:
    """Compare a model, run once by its own `forward`, with its chain, block by block, and with the chain's parts alone.

    Args:
        model: the model, in evaluation mode.
        described: where its parts are.
        pixel_values: images (N, C, H, W) that it can take.

    Raises:
        ValueError: the composition of the parts is not what the model computes (names the block where they part), a
            part uses what another one owns, or parts share parameters.
    """
    name, chain = described.model_class, described.chain
    _check_parameters(model, name)
    try:
        expected, output = _watched(model, chain, lambda: model(pixel_values))
    except RuntimeError as error:
        raise ValueError(f"{name} cannot take images {tuple(pixel_values.shape)}: {error}") from error
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"the forward of {name} returns a {type(output).__name__}, not logits")
    given, composed = _watched(model, chain, lambda: _compose(model, described, pixel_values))
    for index, block in enumerate(chain.blocks):
        for part in block:
            if isinstance(part, str) and part in given and not _equal(expected.get(part), given[part]):
                before = f"block {index - 1}" if index else "the stem"
                found = f"gets something else than what {before} returns" if part in expected else "is not run"
                raise ValueError(f"{name} is no chain: in its own forward block {index} ({part}) {found}")
    if not _equal(output, composed):
        raise ValueError(
            f"{name} is no chain: its blocks are, but its neck or head gives other logits than its forward"
        )
    _check_ownership(model, described, pixel_values)


def _check_parameters(model: TimmModel, name: str) -> None:
    places: Counter[int] = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = [key for key, parameter in model.named_parameters() if places[id(parameter)] > 1]
    if shared:
        raise ValueError(f"{name} uses {shared[0]} at several places; a stitch can take only what no other part shares")


def _watched(model: TimmModel, chain: Chain, function: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """What the modules of the blocks were given during a call, by name, and what the call returned."""
    given: dict[str, Any] = {}

    def watch(part: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: given.update({part: args})

    hooks = [module.register_forward_pre_hook(watch(part)) for part, module in chain.modules_of(model).items()]
    try:
        with torch.no_grad():
            return given, function()
    finally:
        for hook in hooks:
            hook.remove()


def _compose(model: TimmModel, described: Description, pixel_values: torch.Tensor) -> torch.Tensor:
    chain, name, image_size, place = described.chain, described.model_class, pixel_values.shape[2:], "stem"
    try:
        flow = chain.run_stem(model, pixel_values)
        described.measure(flow.features, image_size)
        tokens = flow.features[:, : len(described.prefix_names)]
        if chain.prefix and not torch.allclose(chain.prefix_of(model).expand_as(tokens), tokens, atol=1e-5):
            raise ValueError(f"{name}: its stem puts other tokens first than those of prefix; describe own_prefix")
        for index in range(chain.depth):
            place = f"block {index}"
            flow = chain.run_block(model, index, flow)
            described.measure(flow.features, image_size)
        place = "neck or head"
        return chain.run_head(model, chain.run_neck(model, flow).features)
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise ValueError(f"{name} is no chain: its {place} cannot take what comes before it: {error}") from error


@torch.no_grad()
def _check_ownership(model: TimmModel, described: Description, pixel_values: torch.Tensor) -> None:
    """Run each part on a copy of the model that holds this part alone, as an extracted stitch does."""
    chain = described.chain
    begun = chain.run_stem(model, pixel_values)
    ended = begun
    for index in range(chain.depth):
        ended = chain.run_block(model, index, ended)

    def blocks(alone: TimmModel) -> torch.Tensor:
        flow = begun
        for index in range(chain.depth):
            flow = chain.run_block(alone, index, flow)
        return flow.features

    def stem(alone: TimmModel) -> torch.Tensor:
        return chain.run_stem(alone, pixel_values).features

    def head(alone: TimmModel) -> torch.Tensor:
        return chain.run_head(alone, chain.run_neck(alone, ended).features)

    runs: list[tuple[str, str, Collection[Part], Callable[[TimmModel], torch.Tensor]]] = [
        ("stem", "stem", {"stem", "prefix", "context"}, stem),
        ("blocks", "context", {*range(chain.depth), "context"}, blocks),
        ("neck or head", "head", {"head"}, head),
    ]
    for place, user, parts, run in runs:
        alone = copy.deepcopy(model)
        chain.keep_only(alone, parts)
        try:
            same = _equal(run(alone), run(model))
        except (RuntimeError, TypeError, AttributeError):
            same = False
        if not same:
            raise ValueError(
                f"{described.model_class}: its {place} needs parameters or modules that its adapter gives to another "
                f"part; name them in uses={{{user!r}: (...)}}"
            )


def _equal(expected: Any, given: Any) -> bool:
    if isinstance(expected, torch.Tensor) and isinstance(given, torch.Tensor):
        return expected.shape == given.shape and torch.equal(expected, given)
    if isinstance(expected, tuple) and isinstance(given, tuple):
        return all(map(_equal, expected[:1], given[:1])) and bool(expected) == bool(given)
    return False
