"""What some of timm's classes do between their modules; this file travels with checkpoints of these classes.

config.json names the functions as "timm_functions.NAME". They do the same operations in the same order as timm, so that
an anchor computes what timm computes, bit for bit. The file imports nothing of stitchable.
"""

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

Model = Any
"""An `nn.Module` of timm, whose parts have no types."""

Grid = tuple[int, int]
"""Height and width of the grid that features live on."""


# ---------------------------------------------------------------- stems, and what else gets model and features


def encoder_stem(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Qwen's and DeepSeek's: features (N, H, W, C), and their rotary embeddings as context."""
    embedded = model.encoder.patch_embed(x)  # NHWC
    tokens, rope = model.encoder._pos_embed(embedded)
    return tokens.unflatten(1, embedded.shape[1:3]), rope


def gemma_stem(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gemma's: tokens, and cosines and sines of their rotary embeddings as context."""
    tokens, positions, _ = model.encoder.patch_embed(x, None, None)
    return tokens, *model.encoder.rotary_emb(tokens, positions)


def naflex_stem(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """NaFlexViT's: tokens, and their rotary embeddings, if it has some, as context."""
    embeds = model._forward_embeds(x, patch_coord=None, patch_valid=None, attn_mask=None)
    return embeds["patches"], embeds.get("rope_embeds")


def pit_tokens(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """PiT's grid (N, C, H, W) as tokens behind the class token, with the size of the grid as context."""
    return prepend_class_token(model, x.flatten(2).transpose(1, 2)), x.shape[2:]


def tnt_stem(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TNT's: patches, and the stream of their pixels as context."""
    pixels = model.pixel_embed(x, model.pixel_pos)
    patches = model.norm2_proj(model.proj(model.norm1_proj(pixels.reshape(x.shape[0], model.num_patches, -1))))
    return model.pos_drop(prepend_class_token(model, patches) + model.patch_pos), pixels


def twins_stem(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Twins's: features (N, H, W, C)."""
    return _on_tokens_of_nhwc(model.pos_drops[0], _embed(model.patch_embeds[0], x))


def xcit_stem(model: Model, x: torch.Tensor) -> torch.Tensor:
    """XCiT's: features (N, H, W, C)."""
    x, grid = model.patch_embed(x)
    if model.pos_embed is not None:
        x = x + model.pos_embed(x.shape[0], *grid).reshape(x.shape[0], -1, x.shape[1]).permute(0, 2, 1)
    return model.pos_drop(x).unflatten(1, grid)


def sam_positions(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Features (N, H, W, C) and their positions, resampled to the grid."""
    return x if model.pos_embed is None else x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])


def prepend_class_token(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Tokens behind the class token, if the model has one."""
    tokens = model.cls_token
    return x if tokens is None else torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)


def pit_prefix(model: Model, x: torch.Tensor) -> torch.Tensor:
    """The tokens that PiT's head takes."""
    return x[:, : model.num_tokens]


# ---------------------------------------------------------------- how a part of a block is called


def call_on_tokens(model: Model, part: nn.Module, index: int, x: torch.Tensor, *context: Any) -> torch.Tensor:
    """Blocks of tokens, between which features are (N, H, W, C)."""
    return _on_tokens_of_nhwc(part, x, *context)


def call_with_own_rope(model: Model, part: nn.Module, index: int, x: torch.Tensor, rope: Any) -> torch.Tensor:
    """Blocks with rotary embeddings of their own."""
    return part(x, rope[index])


def call_xcit(model: Model, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """Blocks of tokens that are told their grid."""
    return _on_tokens_of_nhwc(part, x, *x.shape[1:3])


def call_with_grid(model: Model, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """Blocks of PVT and Twins, and what embeds patches between their stages."""
    if isinstance(part, PatchEmbed):
        return _embed(part, _to_contiguous_nchw(x))
    if isinstance(part, OverlapPatchEmbed):
        return part(_to_contiguous_nchw(x))
    return _on_tokens_of_nhwc(part, x, *([] if isinstance(part, nn.LayerNorm | nn.Dropout) else [x.shape[1:3]]))


def call_tiny_vit(model: Model, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """TinyViT's blocks, some of which take channels last."""
    return part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(part, TinyVitBlock) else part(x)


def call_metaformer(model: Model, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """MetaFormer's blocks, of which those with attention take tokens."""
    attends = isinstance(part, MetaFormerBlock) and isinstance(part.token_mixer, Attention)
    return _on_tokens_of_nchw(part, x) if attends else part(x)


def call_efficientformer(model: Model, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """EfficientFormer's blocks, of which the last take tokens."""
    if isinstance(part, Flat):  # the blocks after it want tokens
        return x
    return _on_tokens_of_nchw(part, x) if isinstance(part, MetaBlock1d) else part(x)


def call_pit(model: Model, part: nn.Module, index: int, x: torch.Tensor, grid: Grid) -> Any:
    """PiT's blocks; a pooling changes the grid, which is the context of the next."""
    if not isinstance(part, Pooling):
        return part(x)
    tokens = x.shape[1] - grid[0] * grid[1]
    pooled, prefix = part(x[:, tokens:].transpose(1, 2).unflatten(2, grid), x[:, :tokens])
    return torch.cat((prefix, pooled.flatten(2).transpose(1, 2)), dim=1), pooled.shape[2:]


def call_tnt(model: Model, part: nn.Module, index: int, x: torch.Tensor, pixels: torch.Tensor) -> tuple[Any, ...]:
    """TNT's blocks, which take and return the stream of pixels too."""
    return tuple(reversed(part(pixels, x)))


# ---------------------------------------------------------------- contexts of the blocks


def beit_bias(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """BEiT's shared bias of the attention."""
    return (model.rel_pos_bias and model.rel_pos_bias(),)


def relpos_bias(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """The shared bias of the attention of ViTs with relative positions."""
    return (model.shared_rel_pos and model.shared_rel_pos.get_bias(),)


def rope(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """Rotary embeddings of EVA and NaFlexViT."""
    if model.rope is None:
        return (None,)
    # As in timm: what was computed for a fixed grid is kept by the module.
    fixed = not getattr(model, "dynamic_img_size", True) and hasattr(model.rope, "feat_shape")
    return (model.rope.get_embed() if fixed else model.rope.get_embed(shape=grid),)


def encoder_rope(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """Rotary embeddings of Qwen's and DeepSeek's encoders."""
    return (model.encoder.rope.get_embed(shape=grid),)


def gemma_rope(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid) -> tuple[Any, ...]:
    """Rotary embeddings of Gemma's encoder, of each image."""
    rows, columns = torch.meshgrid(*(torch.arange(size, device=x.device) for size in grid), indexing="ij")
    positions = torch.stack((columns, rows), dim=-1).flatten(0, 1)
    return tuple(model.encoder.rotary_emb(x, positions.expand(x.shape[0], -1, -1)))


def tnt_pixels(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[torch.Tensor]:
    """TNT's stream of pixels before the first block: its later states come of blocks that a stitch leaves out."""
    return (model.pixel_embed(pixel_values, model.pixel_pos),)


def grid_as_context(model: Model, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """The size of the grid, for blocks of tokens that change it."""
    return (grid,)


# Whether a context holds something of each image of a batch.
for _function in (beit_bias, relpos_bias, rope, encoder_rope, gemma_rope, tnt_pixels, grid_as_context):
    _function.per_image = _function in (gemma_rope, tnt_pixels)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- own prefix tokens


def class_token(model: Model) -> torch.Tensor:
    """One without a position."""
    return model.cls_token


def tnt_prefix(model: Model) -> torch.Tensor:
    """The class token with its position."""
    return model.cls_token + model.patch_pos[:, :1]


# ---------------------------------------------------------------- helpers


def _to_contiguous_nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _on_tokens_of_nhwc(part: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    return part(x.flatten(1, 2), *args).unflatten(1, x.shape[1:3])


def _on_tokens_of_nchw(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def _embed(embed: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens, grid = embed(x)
    return tokens.unflatten(1, grid)
