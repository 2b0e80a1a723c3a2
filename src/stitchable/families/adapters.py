"""Where the parts of timm's architectures are: a line per class, in a handful of patterns. The names are timm's."""

from collections.abc import Callable

from torch import nn

from stitchable.families import timm_functions
from stitchable.families.adapter import Adapter, Block, Layout, Operation
from stitchable.model.operations import TimmModel

NCHW, NHWC, NLC = Layout.NCHW, Layout.NHWC, Layout.NLC


def _blocks_of(model: TimmModel, container: str, *before: Operation) -> tuple[Block, ...]:
    """The children of a container as blocks; what stands before them belongs to the first."""
    first, *others = [f"{container}.{name}" for name, _ in model.get_submodule(container).named_children()]
    return ((*before, first), *((name,) for name in others))


# ---------------------------------------------------------------- adapters that depend on the model


def _convit(model: TimmModel) -> Adapter:
    # The class token joins the others before the last blocks, which therefore belong to the head.
    blocks = _blocks_of(model, "blocks")
    local, others = blocks[: model.local_up_to_layer], blocks[model.local_up_to_layer :]
    return Adapter(
        NLC,
        stem=("patch_embed", *(["pos_embed"] if model.use_pos_embed else []), "pos_drop"),
        stages=(local,),
        neck=(
            *([timm_functions.prepend_class_token] if others else []),
            *(name for block in others for name in block),
            "norm",
        ),
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
        call=timm_functions.call_with_own_rope if getattr(model, "rope_mixed", False) and model.rope else None,
        context=timm_functions.rope,
        uses={"stem": ("pos_drop",), "context": ("rope",)},
    )


def _naflex(model: TimmModel) -> Adapter:
    if model.patch_drop is not None:
        raise ValueError("patch_drop_rate drops tokens together with their rotary embeddings; leave it 0")
    return Adapter(
        NLC,
        stem=(timm_functions.naflex_stem,),
        stages=("blocks",),
        neck=("norm",),
        prefix=("embeds.cls_token", "embeds.reg_token"),
        call=timm_functions.call_with_own_rope if model.rope_is_mixed and model.rope is not None else None,
        context=timm_functions.rope,
        uses={"stem": ("embeds",), "context": ("rope",)},
    )


def _gemma(model: TimmModel) -> Adapter:
    if model.encoder.global_pool == "soft":
        raise ValueError("encoder_pool='soft' pools within its features; leave it ''")
    return Adapter(
        NLC,
        stem=(timm_functions.gemma_stem,),
        stages=("encoder.blocks",),
        context=timm_functions.gemma_rope,
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
    return Adapter(NLC, stem=("stem", "function:tokens_of_nchw"), stages=("stages.*",))


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
        stem=(timm_functions.twins_stem,),
        stages=tuple(stage(i) for i in range(len(model.blocks))),
        neck=("function:tokens_of_nhwc", "norm"),
        call=timm_functions.call_with_grid,
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
        stem=("patch_embed", "function:to_nhwc"),
        stages=tuple(stages),
        neck=("function:tokens_of_nhwc", *([] if model.post_network is None else ["forward_cls"]), "norm"),
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
        stem=("patch_embed", timm_functions.prepend_class_token, "pos_embed", "pos_drop"),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token",),
        context=timm_functions.beit_bias,
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
        stem=(timm_functions.encoder_stem,),
        stages=("encoder.blocks",),
        neck=("encoder.norm", "encoder.aligner"),
        call=timm_functions.call_on_tokens,
        context=timm_functions.encoder_rope,
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
        stem=(timm_functions.encoder_stem,),
        stages=("encoder.blocks",),
        neck=("encoder.merger",),
        call=timm_functions.call_on_tokens,
        context=timm_functions.encoder_rope,
        uses={"stem": ("encoder.patch_embed", "encoder.pos_embed"), "context": ("encoder.rope",)},
    ),
    "tnt.TNT": Adapter(
        NLC,
        stem=(timm_functions.tnt_stem,),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token",),
        own_prefix=timm_functions.tnt_prefix,
        call=timm_functions.call_tnt,
        context=timm_functions.tnt_pixels,
        uses={"stem": ("norm1_proj", "proj", "norm2_proj", "pos_drop"), "context": ("pixel_embed", "pixel_pos")},
    ),
    "vision_transformer_relpos.VisionTransformerRelPos": Adapter(
        NLC,
        stem=("patch_embed", timm_functions.prepend_class_token),
        stages=("blocks",),
        neck=("norm",),
        prefix=("cls_token",),
        context=timm_functions.relpos_bias,
        uses={"context": ("shared_rel_pos",)},
    ),
    "vision_transformer_sam.VisionTransformerSAM": Adapter(
        NHWC,
        stem=("patch_embed", timm_functions.sam_positions, "pos_drop", "patch_drop", "norm_pre"),
        stages=("blocks",),
        neck=("function:to_nchw", "neck"),
    ),
    "xcit.Xcit": Adapter(
        NHWC,
        stem=(timm_functions.xcit_stem,),
        stages=("blocks",),
        neck=("function:tokens_of_nhwc", "forward_cls", "norm"),
        call=timm_functions.call_xcit,
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
        NCHW,
        stem=("stem",),
        stages=("stages.*",),
        neck=("function:tokens_of_nchw", "norm"),
        call=timm_functions.call_efficientformer,
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
    "metaformer.MetaFormer": Adapter(NCHW, stem=("stem",), stages=("stages.*",), call=timm_functions.call_metaformer),
    "mvitv2.MultiScaleVit": Adapter(
        NLC,
        stem=("patch_embed", timm_functions.prepend_class_token, "pos_embed"),
        stages=("stages.*",),
        neck=("norm",),
        prefix=("cls_token",),
        context=timm_functions.grid_as_context,
    ),
    "nest.Nest": Adapter(
        NCHW, stem=("patch_embed",), stages=("levels",), neck=("function:to_nhwc", "norm", "function:to_nchw")
    ),
    "nextvit.NextViT": _STAGES_AND_NORM,
    "nfnet.NormFreeNet": Adapter(NCHW, stem=("stem",), stages=("stages.*",), neck=("final_conv", "final_act")),
    "pit.PoolingVisionTransformer": Adapter(
        NLC,
        stem=("patch_embed", "pos_embed", "pos_drop", timm_functions.pit_tokens),
        stages=("transformers.*",),
        neck=(timm_functions.pit_prefix, "norm"),
        prefix=("cls_token",),
        own_prefix=timm_functions.class_token,  # its positions are those of the grid
        call=timm_functions.call_pit,
        context=timm_functions.grid_as_context,
    ),
    "pvt_v2.PyramidVisionTransformerV2": Adapter(
        NHWC,
        stem=("patch_embed",),
        stages=("stages.*",),
        neck=("function:to_contiguous_nchw",),
        call=timm_functions.call_with_grid,
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
        NHWC, stem=("patch_embed", "function:to_nhwc"), stages=("stages.*",), neck=("function:to_nchw",)
    ),
    "tiny_vit.TinyVit": Adapter(NCHW, stem=("patch_embed",), stages=("stages.*",), call=timm_functions.call_tiny_vit),
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
