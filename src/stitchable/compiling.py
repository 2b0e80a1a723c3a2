"""torch.compile for a model of which each call may run another stitch."""

from typing import Any

from stitchable.model.modeling_stitchable import StitchablePreTrainedModel


def compile_blocks(model: StitchablePreTrainedModel, **options: Any) -> None:
    """Compile each block of each anchor in place, with the arguments of `torch.compile`.

    Compiled whole, the model would be compiled anew for every stitch; blocks that are alike share their code.
    """
    seen = [(chain, model.anchors[index]) for index, chain in model.chains.items()]
    blocks = [block for chain, anchor in seen for block in chain.modules_of(anchor).values()]
    # Torch counts the versions of all blocks of a class together and gives up beyond 8, but every rate of drop path
    # makes a version of its own: so 8 for each block.
    options = {"recompile_limit": 8 * len(blocks), **options}
    parts: Any = model.own.values()
    seen = [(model.chains[run[0]], own.seen(*run)) for own in parts for run in own.views]
    blocks += [block for chain, anchor in seen for block in chain.modules_of(anchor).values()]
    for block in dict.fromkeys(blocks):
        block.compile(**options)
