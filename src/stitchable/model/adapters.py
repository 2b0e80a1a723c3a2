"""Where the parts of timm's architectures are: a line per class, in a handful of patterns.

The names are timm's. What a class does between its modules (a permutation, a class token put in front) is a small
function here, the same operations in the same order, so that an anchor computes what timm computes, bit for bit.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
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

from .anchors import Adapter, Block, Grid, Layout, Operation, TimmModel

NCHW, NHWC, NLC = Layout.NCHW, Layout.NHWC, Layout.NLC

# ---------------------------------------------------------------- operations


def _to_nhwc(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def _to_nchw(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _to_contiguous_nchw(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _tokens_of_nchw(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def _tokens_of_nhwc(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2)


def _prepend(name: str, model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    """Put the tokens of a parameter in front of the others."""
    tokens = attrgetter(name)(model)
    return x if tokens is None else torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)


_prepend_class_token = partial(_prepend, "cls_token")


def _blocks_of(model: TimmModel, container: str, *before: Operation) -> tuple[Block, ...]:
    """The children of a container as blocks; what stands before them belongs to the first."""
    first, *others = [f"{container}.{name}" for name, _ in model.get_submodule(container).named_children()]
    return ((*before, first), *((name,) for name in others))


# ---------------------------------------------------------------- how blocks are called


def _on_tokens_of_nhwc(part: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    return part(x.flatten(1, 2), *args).unflatten(1, x.shape[1:3])


def _on_tokens_of_nchw(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def _call_on_tokens(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, *context: Any) -> torch.Tensor:
    return _on_tokens_of_nhwc(part, x, *context)


def _call_with_own_rope(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, rope: Any) -> torch.Tensor:
    return part(x, rope[index])


def _call_xcit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    return _on_tokens_of_nhwc(part, x, *x.shape[1:3])


def _call_pvt(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, OverlapPatchEmbed):
        return part(_to_contiguous_nchw(model, x))
    return _on_tokens_of_nhwc(part, x, *([] if isinstance(part, nn.LayerNorm) else [x.shape[1:3]]))


def _call_twins(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, TwinsPatchEmbed):
        return _twins_embed(part, _to_contiguous_nchw(model, x))
    return _on_tokens_of_nhwc(part, x, *([] if isinstance(part, nn.Dropout) else [x.shape[1:3]]))


def _call_tiny_vit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    return part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(part, TinyVitBlock) else part(x)


def _call_metaformer(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    with_attention = isinstance(part, MetaFormerBlock) and isinstance(part.token_mixer, MetaFormerAttention)
    return _on_tokens_of_nchw(part, x) if with_attention else part(x)


def _call_efficientformer(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, Flat):  # the blocks after it want tokens
        return x
    return _on_tokens_of_nchw(part, x) if isinstance(part, MetaBlock1d) else part(x)


def _call_pit(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, grid: Grid) -> Any:
    if not isinstance(part, PitPooling):
        return part(x)
    tokens = x.shape[1] - grid[0] * grid[1]
    pooled, prefix = part(x[:, tokens:].transpose(1, 2).unflatten(2, grid), x[:, :tokens])
    return torch.cat((prefix, pooled.flatten(2).transpose(1, 2)), dim=1), pooled.shape[2:]


def _pit_prefix(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x[:, : model.num_tokens]


def _call_tnt(model: TimmModel, part: nn.Module, index: int, x: torch.Tensor, pixels: torch.Tensor) -> Any:
    pixels, x = part(pixels, x)
    return x, pixels


# ---------------------------------------------------------------- stems and contexts


def _grid_as_context(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (grid,)


def _beit_bias(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (None if model.rel_pos_bias is None else model.rel_pos_bias(),)


def _relpos_bias(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias(),)


def _rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    if model.rope is None:
        return (None,)
    # As in timm: what was computed for a fixed grid is kept by the module.
    fixed = not getattr(model, "dynamic_img_size", True) and hasattr(model.rope, "feat_shape")
    return (model.rope.get_embed() if fixed else model.rope.get_embed(shape=grid),)


def _encoder_rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    return (model.encoder.rope.get_embed(shape=grid),)


def _encoder_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    embedded = model.encoder.patch_embed(x)  # NHWC
    tokens, rope = model.encoder._pos_embed(embedded)
    return tokens.unflatten(1, embedded.shape[1:3]), rope


def _gemma_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tokens, positions, _ = model.encoder.patch_embed(x, None, None)
    return tokens, *model.encoder.rotary_emb(tokens, positions)


def _gemma_rope(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any, ...]:
    assert grid is not None  # the stem returns the context of its own
    rows, columns = torch.meshgrid(*(torch.arange(size, device=x.device) for size in grid), indexing="ij")
    positions = torch.stack((columns, rows), dim=-1).flatten(0, 1)
    return tuple(model.encoder.rotary_emb(x, positions.expand(x.shape[0], -1, -1)))


def _naflex_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    embeds = model._forward_embeds(x, patch_coord=None, patch_valid=None, attn_mask=None)
    return embeds["patches"], embeds.get("rope_embeds")


def _pit_tokens(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return _prepend_class_token(model, _tokens_of_nchw(model, x)), x.shape[2:]


def _sam_positions(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return x if model.pos_embed is None else x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])


def _tnt_pixels(model: TimmModel, x: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> tuple[Any]:
    """The pixel stream as it is before the first block: its later states come of blocks that a stitch leaves out."""
    return (model.pixel_embed(pixel_values, model.pixel_pos),)


def _tnt_prefix(model: TimmModel) -> torch.Tensor:
    return model.cls_token + model.patch_pos[:, :1]


def _tnt_stem(model: TimmModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = model.pixel_embed(x, model.pixel_pos)
    patches = model.norm2_proj(model.proj(model.norm1_proj(pixels.reshape(x.shape[0], model.num_patches, -1))))
    return model.pos_drop(_prepend_class_token(model, patches) + model.patch_pos), pixels


def _twins_embed(embed: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens, grid = embed(x)
    return tokens.unflatten(1, grid)


def _twins_stem(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    return _on_tokens_of_nhwc(model.pos_drops[0], _twins_embed(model.patch_embeds[0], x))


def _xcit_stem(model: TimmModel, x: torch.Tensor) -> torch.Tensor:
    x, grid = model.patch_embed(x)
    if model.pos_embed is not None:
        x = x + model.pos_embed(x.shape[0], *grid).reshape(x.shape[0], -1, x.shape[1]).permute(0, 2, 1)
    return model.pos_drop(x).unflatten(1, grid)


# ---------------------------------------------------------------- adapters that depend on the model


def _convit(model: TimmModel) -> Adapter:
    # The class token joins the others before the last blocks, which therefore belong to the head.
    blocks = _blocks_of(model, "blocks")
    local, others = blocks[: model.local_up_to_layer], blocks[model.local_up_to_layer :]
    return Adapter(
        NLC,
        stem=("patch_embed", *(["pos_embed"] if model.use_pos_embed else []), "pos_drop"),
        stages=(local,),
        neck=(*([_prepend_class_token] if others else []), *(name for block in others for name in block), "norm"),
        uses={"head": ("cls_token",)},
    )


def _densenet(model: TimmModel) -> Adapter:
    # Within a dense block every layer takes the outputs of all before it, so the block is one; its transition ends it.
    names = [name for name, _ in model.features.named_children()]
    first = names.index("denseblock1")
    dense = [f"features.{name}" for name in names[first:-1]]
    blocks = tuple(tuple(dense[i : i + 2]) for i in range(0, len(dense), 2))
    stem = tuple(f"features.{name}" for name in names[:first])
    return Adapter(NCHW, stem=stem, stages=(blocks,), neck=(f"features.{names[-1]}",))


def _eva(model: TimmModel) -> Adapter:
    if model.patch_drop is not None:
        raise ValueError("patch_drop_rate drops tokens together with their rotary embeddings; leave it 0")
    return Adapter(
        NLC,
        stem=("patch_embed", "_pos_embed", "norm_pre"),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token", "reg_token"),
        call=_call_with_own_rope if getattr(model, "rope_mixed", False) and model.rope is not None else None,
        context=_rope,
        uses={"stem": ("pos_drop",), "context": ("rope",)},
    )


def _naflex(model: TimmModel) -> Adapter:
    if model.patch_drop is not None:
        raise ValueError("patch_drop_rate drops tokens together with their rotary embeddings; leave it 0")
    return Adapter(
        NLC,
        stem=(_naflex_stem,),
        stages=("blocks",),
        neck=("norm",),
        prefix=("embeds.cls_token", "embeds.reg_token"),
        call=_call_with_own_rope if model.rope_is_mixed and model.rope is not None else None,
        context=_rope,
        uses={"stem": ("embeds",), "context": ("rope",)},
    )


def _gemma(model: TimmModel) -> Adapter:
    if model.encoder.global_pool == "soft":
        raise ValueError("encoder_pool='soft' pools within its features; leave it ''")
    return Adapter(
        NLC,
        stem=(_gemma_stem,),
        stages=("encoder.blocks",),
        context=_gemma_rope,
        uses={"stem": ("encoder.patch_embed",), "context": ("encoder.rotary_emb",)},
    )


def _hiera(model: TimmModel) -> Adapter:
    if model.patch_drop_rate:
        raise ValueError("patch_drop_rate drops other tokens in every call; leave it 0")
    return Adapter(Layout.UNITS, stem=("patch_embed", "_pos_embed", "unroll"), stages=("blocks",))


def _inception_v3(model: TimmModel) -> Adapter:
    if model.aux_logits:
        raise ValueError("aux_logits is a second output; leave it False")
    stem = ("1a_3x3", "2a_3x3", "2b_3x3"), ("3b_1x1", "4a_3x3")
    return Adapter(
        NCHW,
        stem=(*(f"Conv2d_{n}" for n in stem[0]), "Pool1", *(f"Conv2d_{n}" for n in stem[1]), "Pool2"),
        stages=tuple(tuple((f"Mixed_{stage}{block}",) for block in blocks) for stage, blocks in _MIXED.items()),
    )


_MIXED = {5: "bcd", 6: "abcde", 7: "abc"}


def _inception_resnet_v2(model: TimmModel) -> Adapter:
    return Adapter(
        NCHW,
        stem=("conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a", "maxpool_5a"),
        stages=(
            _blocks_of(model, "repeat", "mixed_5b"),
            _blocks_of(model, "repeat_1", "mixed_6a"),
            (*_blocks_of(model, "repeat_2", "mixed_7a"), ("block8",)),
        ),
        neck=("conv2d_7b",),
    )


def _inception_v4(model: TimmModel) -> Adapter:
    stem, *blocks = (block for block in _blocks_of(model, "features"))
    return Adapter(NCHW, stem=stem, stages=(tuple(blocks),))


def _levit(model: TimmModel) -> Adapter:
    if model.use_conv:
        return Adapter(NCHW, stem=("stem",), stages=("stages.*",))
    return Adapter(NLC, stem=("stem", _tokens_of_nchw), stages=("stages.*",))


def _mobilenet_v5(model: TimmModel) -> Adapter:
    if model.msfa is not None:
        raise ValueError("its head takes the features of several stages")
    return Adapter(NCHW, stem=("conv_stem",), stages=("blocks.*",))


def _twins(model: TimmModel) -> Adapter:
    def stage(i: int) -> tuple[Block, ...]:
        before = (f"patch_embeds.{i}", f"pos_drops.{i}") if i else ()
        first, *others = _blocks_of(model, f"blocks.{i}", *before)
        return ((*first, f"pos_block.{i}"), *others)

    return Adapter(
        NHWC,
        stem=(_twins_stem,),
        stages=tuple(stage(i) for i in range(len(model.blocks))),
        neck=(_tokens_of_nhwc, "norm"),
        call=_call_twins,
        uses={"stem": ("patch_embeds.0", "pos_drops.0")},
    )


def _vgg(model: TimmModel) -> Adapter:
    # A block is a convolution with what follows it up to the next.
    blocks: list[Block] = []
    for name, module in model.features.named_children():
        blocks = [*blocks, ()] if isinstance(module, nn.Conv2d) else blocks
        blocks[-1] = (*blocks[-1], f"features.{name}")
    return Adapter(NCHW, stem=blocks[0], stages=(tuple(blocks[1:]),))


def _visformer(model: TimmModel) -> Adapter:
    def embed(i: int) -> tuple[Operation, ...]:
        positions = (f"pos_embed{i}", "pos_drop") if getattr(model, f"pos_embed{i}") is not None else ()
        return (f"patch_embed{i}", *positions)

    stages = [_blocks_of(model, "stage1"), *(_blocks_of(model, f"stage{i}", *embed(i)) for i in (2, 3))]
    return Adapter(NCHW, stem=("stem", *embed(1)), stages=tuple(stages), neck=("norm",))


def _volo(model: TimmModel) -> Adapter:
    stages = [_blocks_of(model, "network.0"), _blocks_of(model, "network.2", "network.1", "pos_embed", "pos_drop")]
    stages += [_blocks_of(model, f"network.{i}") for i in range(3, len(model.network))]
    return Adapter(
        NHWC,
        stem=("patch_embed", _to_nhwc),
        stages=tuple(stages),
        neck=(_tokens_of_nhwc, *([] if model.post_network is None else ["forward_cls"]), "norm"),
        uses={"head": ("cls_token", "post_network")},
    )


# ---------------------------------------------------------------- the classes

_STAGES = Adapter(NCHW, stem=("stem",), stages=("stages.*",))
_STAGES_AND_NORM = Adapter(NCHW, stem=("stem",), stages=("stages.*",), neck=("norm",))
_STAGES_AND_NORM_PRE = Adapter(NCHW, stem=("stem",), stages=("stages.*",), neck=("norm_pre",))
_STAGES_AND_FINAL_CONV = Adapter(NCHW, stem=("stem",), stages=("stages.*",), neck=("final_conv",))
_STAGES_AFTER_PATCHES = Adapter(NCHW, stem=("patch_embed",), stages=("stages.*",))
# What is inside of a stage is no chain (a split, a query of the whole stage, other layouts), so the stage is one block.
_STAGES_AS_BLOCKS = Adapter(NCHW, stem=("stem",), stages=("stages",))
_NHWC_STAGES = Adapter(NHWC, stem=("stem",), stages=("stages.*",))
_MOBILE = Adapter(NCHW, stem=("conv_stem", "bn1"), stages=("blocks.*",))
_GHOST = Adapter(NCHW, stem=("conv_stem", "bn1", "act1"), stages=("blocks.*",))
_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_VIT = Adapter(
    NLC,
    stem=("patch_embed", "_pos_embed", "patch_drop", "norm_pre"),
    stages=("blocks",),
    neck=("norm",),
    prefix=("cls_token", "dist_token", "reg_token"),
    uses={"stem": ("pos_drop",)},
)

ADAPTERS: dict[str, Adapter | Callable[[TimmModel], Adapter]] = {
    # Flat blocks of tokens.
    "vision_transformer.VisionTransformer": _VIT,
    "beit.Beit": Adapter(
        NLC,
        stem=("patch_embed", _prepend_class_token, "pos_embed", "pos_drop"),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token",),
        context=_beit_bias,
        uses={"context": ("rel_pos_bias",)},
    ),
    "cait.Cait": Adapter(
        NLC,
        stem=("patch_embed", "pos_embed", "pos_drop"),
        stages=("blocks",),
        neck=("forward_cls", "norm"),
        uses={"head": ("cls_token", "blocks_token_only")},
    ),
    "convit.ConVit": _convit,
    "deepseek_vit.DeepseekVitClassifier": Adapter(
        NHWC,
        stem=(_encoder_stem,),
        stages=("encoder.blocks",),
        neck=("encoder.norm", "encoder.aligner"),
        call=_call_on_tokens,
        context=_encoder_rope,
        uses={"stem": ("encoder.patch_embed",), "context": ("encoder.rope",)},
    ),
    "eva.Eva": _eva,
    "gemma4_vit.Gemma4VitClassifier": _gemma,
    "hiera.Hiera": _hiera,
    "hieradet_sam2.HieraDet": Adapter(NHWC, stem=("patch_embed", "_pos_embed"), stages=("blocks",)),
    "mlp_mixer.MlpMixer": Adapter(NLC, stem=("stem",), stages=("blocks",), neck=("norm",)),
    "naflexvit.NaFlexVit": _naflex,
    "qwen3_vit.Qwen3VitClassifier": Adapter(
        NHWC,
        stem=(_encoder_stem,),
        stages=("encoder.blocks",),
        neck=("encoder.merger",),
        call=_call_on_tokens,
        context=_encoder_rope,
        uses={"stem": ("encoder.patch_embed", "encoder.pos_embed"), "context": ("encoder.rope",)},
    ),
    "tnt.TNT": Adapter(
        NLC,
        stem=(_tnt_stem,),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token",),
        own_prefix=_tnt_prefix,
        call=_call_tnt,
        context=_tnt_pixels,
        uses={"stem": ("norm1_proj", "proj", "norm2_proj", "pos_drop"), "context": ("pixel_embed", "pixel_pos")},
    ),
    "vision_transformer_relpos.VisionTransformerRelPos": Adapter(
        NLC,
        stem=("patch_embed", _prepend_class_token),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token",),
        context=_relpos_bias,
        uses={"context": ("shared_rel_pos",)},
    ),
    "vision_transformer_sam.VisionTransformerSAM": Adapter(
        NHWC,
        stem=("patch_embed", _sam_positions, "pos_drop", "patch_drop", "norm_pre"),
        stages=("blocks",),
        neck=(_to_nchw, "neck"),
    ),
    "xcit.Xcit": Adapter(
        NHWC,
        stem=(_xcit_stem,),
        stages=("blocks",),
        neck=(_tokens_of_nhwc, "forward_cls", "norm"),
        call=_call_xcit,
        uses={"stem": ("patch_embed", "pos_embed", "pos_drop"), "head": ("cls_token", "cls_attn_blocks")},
    ),
    # Stages of blocks.
    "byobnet.ByobNet": _STAGES_AND_FINAL_CONV,
    "convnext.ConvNeXt": _STAGES_AND_NORM_PRE,
    "cpubone.CPUBone": _STAGES,
    "csatv2.CSATv2": Adapter(NCHW, stem=("stem_dct",), stages=("stages.*",)),
    "cspnet.CspNet": _STAGES_AS_BLOCKS,
    "cspnext.CspNext": _STAGES,
    "davit.DaVit": _STAGES_AND_NORM_PRE,
    "edgenext.EdgeNeXt": _STAGES_AND_NORM_PRE,
    "efficientformer.EfficientFormer": Adapter(
        NCHW, stem=("stem",), stages=("stages.*",), neck=(_tokens_of_nchw, "norm"), call=_call_efficientformer
    ),
    "efficientformer_v2.EfficientFormerV2": _STAGES_AND_NORM,
    "efficientvit_mit.EfficientVit": _STAGES,
    "efficientvit_mit.EfficientVitLarge": _STAGES,
    "efficientvit_msra.EfficientVitMsra": _STAGES_AFTER_PATCHES,
    "fasternet.FasterNet": _STAGES_AFTER_PATCHES,
    "fastvit.FastVit": _STAGES_AND_FINAL_CONV,
    "focalnet.FocalNet": Adapter(NCHW, stem=("stem",), stages=("layers.*",), neck=("norm",)),
    "gcvit.GlobalContextVit": _STAGES_AS_BLOCKS,
    "hgnet.HighPerfGpuNet": _STAGES,
    "iformer.IFormer": _STAGES,
    "inception_next.MetaNeXt": _STAGES,
    "lcnetv2.LCNetV2": _STAGES,
    "levit.Levit": _levit,
    "lowformer.LowFormer": _STAGES,
    "mambaout.MambaOut": _NHWC_STAGES,
    "maxxvit.MaxxVit": _STAGES_AND_NORM,
    "metaformer.MetaFormer": Adapter(NCHW, stem=("stem",), stages=("stages.*",), call=_call_metaformer),
    "mvitv2.MultiScaleVit": Adapter(
        NLC,
        stem=("patch_embed", _prepend_class_token, "pos_embed"),
        stages=("stages.*",),
        neck=("norm",),
        prefix=("cls_token",),
        context=_grid_as_context,
    ),
    "nest.Nest": Adapter(NCHW, stem=("patch_embed",), stages=("levels",), neck=(_to_nhwc, "norm", _to_nchw)),
    "nextvit.NextViT": _STAGES_AND_NORM,
    "nfnet.NormFreeNet": Adapter(NCHW, stem=("stem",), stages=("stages.*",), neck=("final_conv", "final_act")),
    "pit.PoolingVisionTransformer": Adapter(
        NLC,
        stem=("patch_embed", "pos_embed", "pos_drop", _pit_tokens),
        stages=("transformers.*",),
        neck=(_pit_prefix, "norm"),
        prefix=("cls_token",),
        own_prefix=attrgetter("cls_token"),  # its positions are those of the grid
        call=_call_pit,
        context=_grid_as_context,
    ),
    "pvt_v2.PyramidVisionTransformerV2": Adapter(
        NHWC, stem=("patch_embed",), stages=("stages.*",), neck=(_to_contiguous_nchw,), call=_call_pvt
    ),
    "rdnet.RDNet": Adapter(NCHW, stem=("stem",), stages=("dense_stages",), neck=("norm_pre",)),
    "repvit.RepVit": _STAGES,
    "resnetv2.ResNetV2": _STAGES_AND_NORM,
    "sequencer.Sequencer2d": Adapter(NHWC, stem=("stem",), stages=("stages.*",), neck=("norm",)),
    "shvit.SHViT": _STAGES_AFTER_PATCHES,
    "starnet.StarNet": _STAGES_AND_NORM,
    "swiftformer.SwiftFormer": _STAGES_AND_NORM,
    "swin_transformer.SwinTransformer": Adapter(NHWC, stem=("patch_embed",), stages=("layers.*",), neck=("norm",)),
    "swin_transformer_v2.SwinTransformerV2": Adapter(NHWC, stem=("patch_embed",), stages=("layers.*",), neck=("norm",)),
    "swin_transformer_v2_cr.SwinTransformerV2Cr": Adapter(
        NHWC, stem=("patch_embed", _to_nhwc), stages=("stages.*",), neck=(_to_nchw,)
    ),
    "tiny_vit.TinyVit": Adapter(NCHW, stem=("patch_embed",), stages=("stages.*",), call=_call_tiny_vit),
    "vovnet.VovNet": _STAGES,
    # Stages by other names.
    "densenet.DenseNet": _densenet,
    "dla.DLA": Adapter(
        NCHW, stem=("base_layer", "level0", "level1"), stages=(tuple((f"level{i}",) for i in (2, 3, 4, 5)),)
    ),
    "efficientnet.EfficientNet": Adapter(
        NCHW, stem=("conv_stem", "bn1"), stages=("blocks.*",), neck=("conv_head", "bn2")
    ),
    "ghostnet.GhostNet": _GHOST,
    "inception_resnet_v2.InceptionResnetV2": _inception_resnet_v2,
    "inception_v3.InceptionV3": _inception_v3,
    "inception_v4.InceptionV4": _inception_v4,
    "mobilenetv3.MobileNetV3": _MOBILE,
    "mobilenetv5.MobileNetV5": _mobilenet_v5,
    "regnet.RegNet": Adapter(NCHW, stem=("stem",), stages=("s1", "s2", "s3", "s4"), neck=("final_conv",)),
    "repghost.RepGhostNet": _GHOST,
    "resnet.ResNet": Adapter(NCHW, stem=("conv1", "bn1", "act1", "maxpool"), stages=_LAYERS),
    "rexnet.RexNet": Adapter(NCHW, stem=("stem",), stages=("features",)),
    "senet.SENet": Adapter(NCHW, stem=("layer0", "pool0"), stages=_LAYERS),
    "tresnet.TResNet": Adapter(NCHW, stem=("body.s2d", "body.conv1"), stages=tuple(f"body.{name}" for name in _LAYERS)),
    "twins.Twins": _twins,
    "vgg.VGG": _vgg,
    "visformer.Visformer": _visformer,
    "volo.VOLO": _volo,
    "xception.Xception": Adapter(
        NCHW,
        stem=("conv1", "bn1", "act1", "conv2", "bn2", "act2"),
        stages=(tuple((f"block{i}",) for i in range(1, 13)),),
        neck=("conv3", "bn3", "act3", "conv4", "bn4", "act4"),
    ),
    "xception_aligned.XceptionAligned": Adapter(NCHW, stem=("stem",), stages=("blocks",), neck=("act",)),
    # Flat blocks of a grid.
    "convmixer.ConvMixer": Adapter(NCHW, stem=("stem",), stages=("blocks",)),
}

_ENCODER = "it is an encoder without a classifier"

REFUSED: dict[str, str] = {
    "coat.CoaT": "its blocks share position encodings, and in the larger ones they work on several resolutions at once",
    "crossvit.CrossVit": "its blocks work on two resolutions at once",
    "deepseek_vit.DeepseekVitEncoder": _ENCODER,
    "dpn.DPN": "its blocks pass on a dense path beside their features, connected with every block before",
    "efficientvim.EfficientViM": "its head takes hidden states of every stage",
    "gemma4_vit.Gemma4VitEncoder": _ENCODER,
    "hrnet.HighResolutionNet": "its stages work on several resolutions at once",
    "mobilenetv5.MobileNetV5Encoder": _ENCODER,
    "nasnet.NASNetALarge": "each cell takes the outputs of the two cells before it",
    "pnasnet.PNASNet5Large": "each cell takes the outputs of the two cells before it",
    "qwen3_vit.Qwen3VitEncoder": _ENCODER,
    "selecsls.SelecSls": "its blocks pass on a skip connection beside their features",
}
