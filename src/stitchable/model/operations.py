"""What some of timm's classes do between their modules, by name: config.json names these functions, and no others.

The same operations in the same order as timm's, so that an anchor computes what timm computes, bit for bit. There are
four kinds: an operation takes the model and the features; a call, the model, a part of a block, the number of the
block, the features and the context; a context, the model, the features, the pixel values and the grid; own prefix
tokens, the model.
"""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.efficientformer import Flat, MetaBlock1d
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.metaformer import MetaFormerBlock
from timm.models.pit import Pooling as PitPooling
from timm.models.pvt_v2 import OverlapPatchEmbed
from timm.models.tiny_vit import TinyVitBlock
from timm.models.twins import PatchEmbed as TwinsPatchEmbed
from torch import nn

TimmModel = Any
"""An `nn.Module` with timm's `forward_features` and `forward_head`, which timm gives no type of its own."""

Grid = tuple[int, int]
"""Height and width of the grid that features live on."""

# ---------------------------------------------------------------- operations


def to_nhwc(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def to_nchw(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def to_contiguous_nchw(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def tokens_of_nchw(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def tokens_of_nhwc(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2)


def prepend_class_token(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    tokens = model.cls_token
    return x if tokens is None else torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)


# ---------------------------------------------------------------- how blocks are called


def _on_tokens_of_nhwc(part: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    return part(x.flatten(1, 2), *args).unflatten(1, x.shape[1:3])


def _on_tokens_of_nchw(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def call_on_tokens(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, *context: Any) -> torch.Tensor:
    return _on_tokens_of_nhwc(part, x, *context)


def call_with_own_rope(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, rope: Any) -> torch.Tensor:
    return part(x, rope[index])


def call_xcit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    return _on_tokens_of_nhwc(part, x, *x.shape[1:3])


def call_pvt(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, OverlapPatchEmbed):
        return part(to_contiguous_nchw(model, x))
    return _on_tokens_of_nhwc(part, x, *([] if isinstance(part, nn.LayerNorm) else [x.shape[1:3]]))


def call_twins(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, TwinsPatchEmbed):
        return _twins_embed(part, to_contiguous_nchw(model, x))
    return _on_tokens_of_nhwc(part, x, *([] if isinstance(part, nn.Dropout) else [x.shape[1:3]]))


def call_tiny_vit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    return part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(part, TinyVitBlock) else part(x)


def call_metaformer(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    with_attention = isinstance(part, MetaFormerBlock) and isinstance(part.token_mixer, MetaFormerAttention)
    return _on_tokens_of_nchw(part, x) if with_attention else part(x)


def call_efficientformer(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, Flat):  # the blocks after it want tokens
        return x
    return _on_tokens_of_nchw(part, x) if isinstance(part, MetaBlock1d) else part(x)


def call_pit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, grid: Grid) -> Any:
    if not isinstance(part, PitPooling):
        return part(x)
    tokens = x.shape[1] - grid[0] * grid[1]
    pooled, prefix = part(x[:, tokens:].transpose(1, 2).unflatten(2, grid), x[:, :tokens])
    return torch.cat((prefix, pooled.flatten(2).transpose(1, 2)), dim=1), pooled.shape[2:]


def pit_prefix(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x[:, : model.num_tokens]


def call_tnt(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, pixels: torch.Tensor) -> Any:
    pixels, x = part(pixels, x)
    return x, pixels


# ---------------------------------------------------------------- stems and contexts


def grid_as_context(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (grid,)


def beit_bias(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (None if model.rel_pos_bias is None else model.rel_pos_bias(),)


def relpos_bias(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias(),)


def rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    if model.rope is None:
        return (None,)
    # As in timm: what was computed for a fixed grid is kept by the module.
    fixed = not getattr(model, "dynamic_img_size", True) and hasattr(model.rope, "feat_shape")
    return (model.rope.get_embed() if fixed else model.rope.get_embed(shape=grid),)


def encoder_rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (model.encoder.rope.get_embed(shape=grid),)


def encoder_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    embedded = model.encoder.patch_embed(x)  # NHWC
    tokens, rope = model.encoder._pos_embed(embedded)
    return tokens.unflatten(1, embedded.shape[1:3]), rope


def gemma_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tokens, positions, _ = model.encoder.patch_embed(x, None, None)
    return tokens, *model.encoder.rotary_emb(tokens, positions)


def gemma_rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any, ...]:
    assert grid is not None  # the stem returns the context of its own
    rows, columns = torch.meshgrid(*(torch.arange(size, device=x.device) for size in grid), indexing="ij")
    positions = torch.stack((columns, rows), dim=-1).flatten(0, 1)
    return tuple(model.encoder.rotary_emb(x, positions.expand(x.shape[0], -1, -1)))


def naflex_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    embeds = model._forward_embeds(x, patch_coord=None, patch_valid=None, attn_mask=None)
    return embeds["patches"], embeds.get("rope_embeds")


def pit_tokens(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return prepend_class_token(model, tokens_of_nchw(model, x)), x.shape[2:]


def sam_positions(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x if model.pos_embed is None else x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])


def tnt_pixels(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """The pixel stream as it is before the first block: its later states come of blocks that a stitch leaves out."""
    return (model.pixel_embed(pixel_values, model.pixel_pos),)


def class_token(model: TimmModel) -> torch.Tensor:
    return model.cls_token


def tnt_prefix(model: TimmModel) -> torch.Tensor:
    return model.cls_token + model.patch_pos[:, :1]


def tnt_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = model.pixel_embed(x, model.pixel_pos)
    patches = model.norm2_proj(model.proj(model.norm1_proj(pixels.reshape(x.shape[0], model.num_patches, -1))))
    return model.pos_drop(prepend_class_token(model, patches) + model.patch_pos), pixels


def _twins_embed(embed: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens, grid = embed(x)
    return tokens.unflatten(1, grid)


def twins_stem(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return _on_tokens_of_nhwc(model.pos_drops[0], _twins_embed(model.patch_embeds[0], x))


def xcit_stem(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    x, grid = model.patch_embed(x)
    if model.pos_embed is not None:
        x = x + model.pos_embed(x.shape[0], *grid).reshape(x.shape[0], -1, x.shape[1]).permute(0, 2, 1)
    return model.pos_drop(x).unflatten(1, grid)


OPERATIONS: dict[str, Any] = {
    name: value
    for name, value in list(globals().items())
    if getattr(value, "__module__", None) == __name__ and not name.startswith("_")
}
"""The functions of this file by name."""
