"""What some of timm's classes do between their modules, by name: config.json names these functions, and no others.

The same operations in the same order as timm's, so that an anchor computes what timm computes, bit for bit.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.efficientformer import Flat, MetaBlock1d
from timm.models.metaformer import Attention, MetaFormerBlock
from timm.models.pit import Pooling
from timm.models.pvt_v2 import OverlapPatchEmbed
from timm.models.tiny_vit import TinyVitBlock
from timm.models.twins import PatchEmbed
from torch import nn

TimmModel = Any
"""An `nn.Module` with timm's `forward_features` and `forward_head`, which timm gives no type of its own."""

Grid = tuple[int, int]
"""Height and width of the grid that features live on."""

PER_IMAGE = ("function:gemma_rope", "function:tnt_pixels")
"""Contexts that hold something of each image of a batch; the others are the same for all."""

FUNCTION = "function:"
"""What the name of a function begins with in config.json."""


def _to_contiguous_nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _on_tokens_of_nhwc(part: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    return part(x.flatten(1, 2), *args).unflatten(1, x.shape[1:3])


def _on_tokens_of_nchw(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def _with_class_token(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    tokens = model.cls_token
    return x if tokens is None else torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)


def _embed(embed: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens, grid = embed(x)
    return tokens.unflatten(1, grid)


def _call_with_grid(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, PatchEmbed):
        return _embed(part, _to_contiguous_nchw(x))
    if isinstance(part, OverlapPatchEmbed):
        return part(_to_contiguous_nchw(x))
    return _on_tokens_of_nhwc(part, x, *([] if isinstance(part, nn.LayerNorm | nn.Dropout) else [x.shape[1:3]]))


def _call_metaformer(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    attends = isinstance(part, MetaFormerBlock) and isinstance(part.token_mixer, Attention)
    return _on_tokens_of_nchw(part, x) if attends else part(x)


def _call_efficientformer(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, Flat):  # the blocks after it want tokens
        return x
    return _on_tokens_of_nchw(part, x) if isinstance(part, MetaBlock1d) else part(x)


def _call_pit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, grid: Grid) -> Any:
    if not isinstance(part, Pooling):
        return part(x)
    tokens = x.shape[1] - grid[0] * grid[1]
    pooled, prefix = part(x[:, tokens:].transpose(1, 2).unflatten(2, grid), x[:, :tokens])
    return torch.cat((prefix, pooled.flatten(2).transpose(1, 2)), dim=1), pooled.shape[2:]


def _rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    if model.rope is None:
        return (None,)
    # As in timm: what was computed for a fixed grid is kept by the module.
    fixed = not getattr(model, "dynamic_img_size", True) and hasattr(model.rope, "feat_shape")
    return (model.rope.get_embed() if fixed else model.rope.get_embed(shape=grid),)


def _encoder_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    embedded = model.encoder.patch_embed(x)  # NHWC
    tokens, rope = model.encoder._pos_embed(embedded)
    return tokens.unflatten(1, embedded.shape[1:3]), rope


def _gemma_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tokens, positions, _ = model.encoder.patch_embed(x, None, None)
    return tokens, *model.encoder.rotary_emb(tokens, positions)


def _gemma_rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid) -> tuple[Any, ...]:
    rows, columns = torch.meshgrid(*(torch.arange(size, device=x.device) for size in grid), indexing="ij")
    positions = torch.stack((columns, rows), dim=-1).flatten(0, 1)
    return tuple(model.encoder.rotary_emb(x, positions.expand(x.shape[0], -1, -1)))


def _naflex_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    embeds = model._forward_embeds(x, patch_coord=None, patch_valid=None, attn_mask=None)
    return embeds["patches"], embeds.get("rope_embeds")


def _tnt_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = model.pixel_embed(x, model.pixel_pos)
    patches = model.norm2_proj(model.proj(model.norm1_proj(pixels.reshape(x.shape[0], model.num_patches, -1))))
    return model.pos_drop(_with_class_token(model, patches) + model.patch_pos), pixels


def _xcit_stem(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    x, grid = model.patch_embed(x)
    if model.pos_embed is not None:
        x = x + model.pos_embed(x.shape[0], *grid).reshape(x.shape[0], -1, x.shape[1]).permute(0, 2, 1)
    return model.pos_drop(x).unflatten(1, grid)


def _sam_positions(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x if model.pos_embed is None else x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])


OPERATIONS: dict[str, Callable[..., Any]] = {
    # Operations: the model and the features.
    "to_nhwc": lambda model, x: x.permute(0, 2, 3, 1),
    "to_nchw": lambda model, x: x.permute(0, 3, 1, 2),
    "to_contiguous_nchw": lambda model, x: _to_contiguous_nchw(x),
    "tokens_of_nchw": lambda model, x: x.flatten(2).transpose(1, 2),
    "tokens_of_nhwc": lambda model, x: x.flatten(1, 2),
    "prepend_class_token": _with_class_token,
    "pit_prefix": lambda model, x: x[:, : model.num_tokens],
    "sam_positions": _sam_positions,
    # Those of stems that return the context of the blocks too.
    "encoder_stem": _encoder_stem,
    "gemma_stem": _gemma_stem,
    "naflex_stem": _naflex_stem,
    "pit_tokens": lambda model, x: (_with_class_token(model, x.flatten(2).transpose(1, 2)), x.shape[2:]),
    "tnt_stem": _tnt_stem,
    "twins_stem": lambda model, x: _on_tokens_of_nhwc(model.pos_drops[0], _embed(model.patch_embeds[0], x)),
    "xcit_stem": _xcit_stem,
    # How a part of a block is called: the model, the part, the number of the block, the features and the context.
    "call_on_tokens": lambda model, part, index, x, *context: _on_tokens_of_nhwc(part, x, *context),
    "call_with_own_rope": lambda model, part, index, x, rope: part(x, rope[index]),
    "call_xcit": lambda model, part, index, x: _on_tokens_of_nhwc(part, x, *x.shape[1:3]),
    "call_pvt": _call_with_grid,
    "call_twins": _call_with_grid,
    "call_tiny_vit": lambda model, part, index, x: (
        part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(part, TinyVitBlock) else part(x)
    ),
    "call_metaformer": _call_metaformer,
    "call_efficientformer": _call_efficientformer,
    "call_pit": _call_pit,
    "call_tnt": lambda model, part, index, x, pixels: tuple(reversed(part(pixels, x))),
    # Contexts: the model, the features, the pixel values and the grid.
    "grid_as_context": lambda model, x, pixel_values, grid: (grid,),
    "beit_bias": lambda model, x, pixel_values, grid: (model.rel_pos_bias and model.rel_pos_bias(),),
    "relpos_bias": lambda model, x, pixel_values, grid: (model.shared_rel_pos and model.shared_rel_pos.get_bias(),),
    "rope": _rope,
    "encoder_rope": lambda model, x, pixel_values, grid: (model.encoder.rope.get_embed(shape=grid),),
    "gemma_rope": _gemma_rope,
    # The pixel stream as it is before the first block: its later states come of blocks that a stitch leaves out.
    "tnt_pixels": lambda model, x, pixel_values, grid: (model.pixel_embed(pixel_values, model.pixel_pos),),
    # Own prefix tokens: the model.
    "class_token": lambda model: model.cls_token,
    "tnt_prefix": lambda model: model.cls_token + model.patch_pos[:, :1],
}


def find_function(name: str, model_class: type) -> Callable[..., Any]:
    """A function of this table, or of the file of a class that is none of timm's; a ValueError if neither has it."""
    file = model_class.__module__
    function: Any = OPERATIONS.get(name) or getattr(sys.modules.get(file), name, None)
    if name in OPERATIONS or (not file.startswith("timm.") and getattr(function, "__module__", None) == file):
        return function
    places = f"operations.py nor in the file of {model_class.__name__}"
    raise ValueError(f"the chain of an anchor names a function {name!r} that is not in {places}")
