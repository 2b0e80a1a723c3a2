"""`StitchableModel` and `StitchableForImageClassification`: many networks in one checkpoint, chosen at run time.

Stitchable Neural Networks, Pan, Cai, Zhuang, CVPR 2023 (https://arxiv.org/abs/2302.06586).
"""

import copy
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import logging

from .adapters import ADAPTERS  # noqa: F401  # older transformers copy only what this file imports itself
from .anchors import Chain, Flow, Part, TimmModel
from .architectures import create_model, describe, is_known
from .checks import check_chain  # noqa: F401  # likewise
from .configuration_stitchable import StitchableConfig
from .families import FAMILIES
from .routes import AnchorShape, Stitch, best_within, carried_tokens, find_stitch, why_not_joined
from .shards import find_shards, read_weights, split_weights
from .stitching import StitchingLayer

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that say where and how to look for files.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# Those of push_to_hub, which save_pretrained(..., push_to_hub=True) takes too.
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")


class Step(NamedTuple):
    """One step of a stitch: a "stem", a "block", a stitching "layer" into an anchor, or what follows the last block.

    That is a "neck" (final norm and the like), or "bare", which leaves the features as they are.
    """

    kind: str
    anchor: int = -1
    block: int = -1
    layer: str = ""


class StitchablePreTrainedModel(PreTrainedModel):
    """What every stitchable model shares: its parts, the choice of a stitch, and how to run one.

    The timm models are children of `anchors` and keep timm's parameter names; stitching layers are found by their names
    "FRONT-BACK.INDEX" below `stitching_layers`. Parts that no stitch of the config uses are not built.
    """

    config: StitchableConfig
    config_class = StitchableConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # transformers' own image models say so too
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True  # timm's attention calls scaled_dot_product_attention itself

    def __init__(self, config: StitchableConfig) -> None:
        super().__init__(config)
        if not config.anchors:
            raise ValueError("this config has no anchors; make one with StitchableConfig.from_anchors([...])")
        self._stitches: tuple[Stitch, ...] = tuple(Stitch.from_dict(stitch) for stitch in config.stitches)
        find_stitch(self._stitches, config.stitch_id)  # again, because a config can be changed after it was checked
        self._shapes = [AnchorShape.from_dict(anchor) for anchor in config.anchors]
        self.gradient_checkpointing = False
        self.hub_arguments: dict[str, Any] = {}  # how from_pretrained looked for `name_or_path`
        self._plans = {stitch.id: _plan(stitch) for stitch in self.stitches}
        self.chains: dict[int, Chain] = {}  # of the anchors that some stitch uses
        self.anchors = nn.ModuleList(self._build_anchor(index) for index in range(len(config.anchors)))
        self.stitching_layers = self._build_stitching_layers()
        if self.device.type != "meta":
            # timm has initialised its layers in its own way; transformers would do it over in post_init.
            for module in (*self.anchors.modules(), *self.stitching_layers.modules()):
                setattr(module, "_is_hf_initialized", True)  # noqa: B010  # a flag of transformers, unknown to mypy
        self.post_init()
        if config.num_labels_of_costs not in (None, config.num_labels):
            logger.warning_once(
                f"the FLOPs, parameters and metrics of the stitches are those of {config.num_labels_of_costs} classes, "
                f"this model has {config.num_labels}; stitchable.update_costs(model) counts again"
            )

    # ---------------------------------------------------------------- choosing a stitch

    @property
    def stitches(self) -> tuple[Stitch, ...]:
        """Every stitch of this model, in the order of the config."""
        return self._stitches

    @property
    def stitch(self) -> Stitch:
        """The stitch that runs when a call names none."""
        return self._find(None)

    def set_stitch(self, stitch_id: int) -> Stitch:
        """Make a stitch the default of later calls (and of the saved config), and return it.

        Raises:
            ValueError: not an integer, or not an id of this model.
        """
        stitch = self._find(stitch_id)
        self.config.stitch_id = stitch.id
        return stitch

    def for_budget(
        self,
        flops: float | None = None,
        *,
        params: float | None = None,
        latency_ms: float | None = None,
        memory_mb: float | None = None,
        metric: str = "accuracy",
    ) -> Stitch:
        """Choose the best measured stitch within every bound given, make it the default and return it.

        Args:
            flops: upper bound on multiply-adds plus normalisation terms per image (one multiply-add = 1).
            params: upper bound on parameters, of the stitch alone.
            latency_ms: upper bound on milliseconds per call, as `stitchable.calibrate` predicted them.
            memory_mb: upper bound on the peak of memory of a call, in 10^6 bytes, predicted likewise.
            metric: which measured figure to maximise. Where none was measured, the largest FLOPs win.

        Raises:
            ValueError: no bound, a bound that is no positive number, or no stitch within them (names the cheapest).
        """
        stitch = best_within(
            self.stitches, flops=flops, params=params, latency_ms=latency_ms, memory_mb=memory_mb, metric=metric
        )
        if metric not in stitch.metrics:
            logger.warning_once(
                f"no stitch within this budget has a measured {metric}; for_budget takes the largest FLOPs. "
                "stitchable.evaluate(model, batches) measures them"
            )
        return self.set_stitch(stitch.id)

    def record(self, stitch_id: int, **figures: Any) -> Stitch:
        """Write figures into the stitch table (`flops`, `params`, `latency_ms`, `memory_mb`, `metrics`); the new entry.

        Raises:
            ValueError: an unknown stitch or figure.
        """
        stitch = self._find(stitch_id)
        known = {"flops", "params", "latency_ms", "memory_mb", "metrics"}
        if set(figures) - known:
            raise ValueError(
                f"a stitch has no figure {sorted(set(figures) - known)}; it has {', '.join(sorted(known))}"
            )
        recorded = replace(stitch, **figures)
        index = self._stitches.index(stitch)
        self._stitches = (*self._stitches[:index], recorded, *self._stitches[index + 1 :])
        self.config.stitches[index] = recorded.to_dict()
        return recorded

    def _find(self, stitch_id: int | None) -> Stitch:
        wanted = self.config.stitch_id if stitch_id is None else stitch_id
        return find_stitch(self.stitches, wanted, self.config.left_out)

    # ---------------------------------------------------------------- running a stitch

    def steps(self, stitch_id: int | None = None) -> tuple[Step, ...]:
        """What a stitch does, in order, from pixel values to what timm's `forward_features` returns.

        Stitches that begin alike have steps that begin alike, so work can be shared between them.
        """
        wanted = self.config.stitch_id if stitch_id is None else stitch_id
        plan = self._plans.get(wanted) if type(wanted) is int else None
        return self._plans[self._find(wanted).id] if plan is None else plan

    def start(self, pixel_values: torch.Tensor) -> Flow:
        """What flows before the first step of any stitch: pixel values (N, C, H, W), on the device of this model."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        return Flow(pixel_values, pixel_values)

    def run_step(self, step: Step, flow: Flow) -> Flow:
        """Run one step on what the step before it returned; the first one on `start(pixel_values)`."""
        if step.kind == "bare":
            return flow
        anchor: TimmModel = self.anchors[step.anchor]
        chain = self.chains[step.anchor]
        if step.kind == "layer":
            layer = self.get_stitching_layer(step.layer)
            own_prefix = chain.own_prefix(anchor) if layer.needs_own_prefix else None
            return chain.enter(anchor, layer(flow.features, own_prefix), flow.pixel_values, layer.target.grid)
        if step.kind == "block":
            return chain.run_block(anchor, step.block, flow)
        return chain.run_stem(anchor, flow.pixel_values) if step.kind == "stem" else chain.run_neck(anchor, flow)

    def run_head(self, anchor: int, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features after the last step to logits (N, num_labels), or to the pooled features before the classifier."""
        return self.chains[anchor].run_head(self.anchors[anchor], features, pre_logits)

    def run_features(self, pixel_values: torch.Tensor, stitch_id: int | None = None) -> tuple[torch.Tensor, int]:
        """Run a stitch up to its head; returns the features and the anchor whose head follows."""
        steps = self.steps(stitch_id)
        flow = self.start(pixel_values)
        for step in steps:
            if self.gradient_checkpointing and self.training and step.kind == "block":
                # Set by transformers with the flag. One of its two kinds sees only tensors that are arguments.
                checkpoint: Any = self._gradient_checkpointing_func
                features, *context = checkpoint(self._run_flat, step, flow.features, flow.pixel_values, *flow.context)
                flow = Flow(features, flow.pixel_values, tuple(context))
            else:
                flow = self.run_step(step, flow)
        return flow.features, steps[-1].anchor

    def _run_flat(self, step: Step, features: torch.Tensor, pixel_values: torch.Tensor, *context: Any) -> tuple:
        flow = self.run_step(step, Flow(features, pixel_values, context))
        return flow.features, *flow.context

    def get_stitching_layer(self, name: str) -> StitchingLayer:
        """The stitching layer named "FRONT-BACK.INDEX"."""
        pair, index = name.split(".")
        layers: Any = self.stitching_layers[pair]
        return layers[index]

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block of each anchor in place, with the arguments of `torch.compile`.

        Compiled whole, the model would be compiled anew for every stitch; blocks of one anchor share their code.
        """
        for number, chain in self.chains.items():
            for module in chain.modules_of_blocks(self.anchors[number]).values():
                module.compile(**options)

    # ---------------------------------------------------------------- taking a stitch out

    @torch.no_grad()
    def extract(self, stitch_id: int | None = None) -> "StitchablePreTrainedModel":
        """A model of its own with a copy of only this stitch's weights; it saves and loads like any other.

        The stitch keeps its id and its parameters keep their names.

        Raises:
            ValueError: not an id of this model.
        """
        stitch = self._find(stitch_id)
        config = type(self.config).from_dict(self.config.to_dict(), stitch_id=stitch.id)
        with torch.device("meta"):
            extracted = type(self)(config)
        for name, module in extracted.named_modules():
            source = self.get_submodule(name)
            for key, _ in list(module.named_parameters(recurse=False)):
                parameter = source.get_parameter(key)
                setattr(module, key, nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad))
            for key, _ in list(module.named_buffers(recurse=False)):
                setattr(module, key, source.get_buffer(key).clone())
        return extracted.train(self.training)

    # ---------------------------------------------------------------- saving and loading

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in any `PreTrainedModel`, but the weights are one file per anchor and one for the stitching layers.

        So a model that is loaded for one stitch or a budget downloads only the files it needs. `max_shard_size` has no
        effect.
        """
        push_to_hub, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        options = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        kwargs["max_shard_size"] = sys.maxsize
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            split_weights(save_directory, kwargs.get("variant"))
            self._carry_families(save_directory)
            if push_to_hub:
                options |= {"token": kwargs["token"]} if "token" in kwargs else {}
                self.push_to_hub(repo_id or Path(save_directory).name, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "StitchablePreTrainedModel":
        """As in any `PreTrainedModel`, and in part where a part is enough.

        Args:
            pretrained_model_name_or_path: a folder or the id of a repository on the Hub.
            args: as in any `PreTrainedModel`.
            kwargs: `stitch_id` keeps this stitch alone, `max_flops` every stitch up to that cost (FLOPs per image);
                only their weights are downloaded and read, only their modules are built. Others as in any
                `PreTrainedModel`.

        Raises:
            ValueError: no such stitch, or weights that are another model's.
            OSError: no such checkpoint, or one with a missing or damaged file; names it.
        """
        source = pretrained_model_name_or_path
        if source is None or kwargs.get("gguf_file") or kwargs.get("use_safetensors") is False:
            return super().from_pretrained(source, *args, **kwargs)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        trust_remote_code = kwargs.pop("trust_remote_code", False)
        config = kwargs.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            part = {name: kwargs.pop(name) for name in ("stitch_id", "max_flops") if name in kwargs}
            config = type(config).from_dict(config.to_dict(), **part) if part else config
        else:
            config, kwargs = cls.config_class.from_pretrained(
                config or source, return_unused_kwargs=True, **{**kwargs, **hub}
            )
            kwargs |= hub
        if not config.anchors:  # transformers makes an empty config where there is none
            raise ValueError(f"{source} has no config.json of a stitchable model")
        used = {segment[0] for stitch in config.stitches for segment in stitch["route"]}
        names = [config.anchors[index]["architecture"] for index in sorted(used)]
        if config.families and all(map(is_known, names)):
            if trust_remote_code and not FAMILIES:  # else this is the code that the checkpoint brings
                importlib.import_module("stitchable.carried").check_families(source, config.families, names, **hub)
        elif config.families:
            if not trust_remote_code:
                raise ValueError(
                    f"{source} brings models of its own in {', '.join(config.families)}; read them and pass "
                    "trust_remote_code=True, or import the file that registers them"
                )
            importlib.import_module("stitchable.carried").import_families(source, config.families, **hub)
        with torch.device("meta"):
            needed = cls(copy.deepcopy(config)).state_dict().keys()
        files = find_shards(source, needed, variant=kwargs.get("variant"), **hub)
        if files is None or not config.left_out:
            loaded = super().from_pretrained(source, *args, config=config, **kwargs)
        else:
            for name in (*hub, "variant", "use_safetensors"):
                kwargs.pop(name, None)
            loaded = super().from_pretrained(None, *args, config=config, state_dict=read_weights(files), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = os.fspath(source)
        model.hub_arguments = {name: value for name, value in hub.items() if name != "force_download"}
        return loaded

    def _carry_families(self, folder: str | os.PathLike) -> None:
        own = {model_class for model_class in map(type, self.anchors) if not _is_of_a_library(model_class)}
        foreign = own - set(FAMILIES)  # those of FAMILIES were copied with this file already
        if foreign:
            importlib.import_module("stitchable.carried").carry_families(self, foreign, folder)
        elif not own:
            self.config.families = []  # of anchors that no stitch of this model uses
        if foreign or not own:
            self.config.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]  # a mixin's, for mypy none
        """Push this model with its image processor, stitch table, card and figure, as one commit. Needs the package.

        Args:
            repo_id: "user/name" on the Hub; made if it does not exist.
            options: `processor`, the image processor it was measured with; those of `stitchable.publishing.push_folder`
                (`private`, `revision`, `token`, `commit_message`, ...); `max_shard_size` has no effect.

        Returns:
            huggingface_hub's `CommitInfo`.

        Raises:
            ImportError: stitchable is not installed.
            huggingface_hub.errors.HfHubHTTPError: what the Hub refuses, a missing token among it.
        """
        options.pop("max_shard_size", None)
        # By name, because this file travels to the Hub (see configuration_stitchable.py).
        return importlib.import_module("stitchable.publishing").push_model(self, repo_id, **options)

    # ---------------------------------------------------------------- building

    @classmethod
    def from_anchors(
        cls, anchors: Sequence[str | Mapping[str, Any]], *, pretrained: bool = True, **settings: Any
    ) -> "StitchablePreTrainedModel":
        """A stitchable model of timm models, with timm's weights. Needs the installed package.

        Args:
            anchors: timm names, or mappings with `architecture`, `kwargs` for `timm.create_model` and `weights`, a
                checkpoint file (.safetensors, .pth, .th) to load instead of timm's weights; in any order.
            pretrained: whether to load weights: an anchor's `weights`, or timm's (from the Hub); random ones otherwise.
            settings: as in `StitchableConfig.from_anchors`. With a `num_labels` that is not the anchors' own, the
                classifiers are new, as with `from_pretrained` of any classifier.

        Raises:
            ValueError: as `StitchableConfig.from_anchors`, or weights that do not fit their anchor.
        """
        config = cls.config_class.from_anchors(anchors, pretrained=pretrained, **settings)
        model = cls(config)
        if pretrained:
            # By name, because this file travels to the Hub (see configuration_stitchable.py).
            building = importlib.import_module("stitchable.building")
            building.load_anchors(model, anchors, settings.get("image_size"))
        return model

    def _build_anchor(self, index: int) -> nn.Module:
        parts = self.parts_of_anchor(index)
        if not parts:
            return nn.Identity()
        entry, shape = self.config.anchors[index], self._shapes[index]
        model = create_model(
            entry["architecture"], entry.get("kwargs"), num_classes=self.config.num_labels, pretrained=False
        )
        chain = describe(model)
        actual = (chain.stages, chain.layout.value, chain.prefix_tokens)
        stated = (shape.stages, shape.layout, shape.prefix_tokens)
        if actual != stated:
            raise ValueError(
                f"anchor {index}, {entry['architecture']}: the config says (stages, layout, prefix tokens) {stated}, "
                f"the timm model has {actual}"
            )
        chain.keep_only(model, parts)
        self.chains[index] = chain
        return model

    def parts_of_anchor(self, index: int) -> set[Part]:
        """What this model holds of an anchor because some stitch uses it."""
        parts: set[Part] = set()
        for stitch in self.stitches:
            for position, segment in enumerate(stitch.route):
                if segment.anchor == index:
                    parts |= {*range(segment.start, segment.stop), "context"}
                    parts |= {"stem", "prefix"} if position == 0 else set()
                    parts |= {"head"} if position == len(stitch.route) - 1 else set()
            for _, front, back in stitch.joints:
                if back.anchor == index and None in carried_tokens(self._shapes[front.anchor], self._shapes[index]):
                    parts.add("prefix")
        return parts

    def _build_stitching_layers(self) -> nn.ModuleDict:
        shared: dict[str, StitchingLayer] = {}
        for stitch in self.stitches:
            for name, front, back in stitch.joints:
                source, target = self._shapes[front.anchor], self._shapes[back.anchor]
                problem = why_not_joined(source, front.stop, target, back.start, self.config.resize)
                if problem:
                    raise ValueError(
                        f"stitch {stitch.id}: cut {front.stop} of anchor {front.anchor} cannot be joined to cut "
                        f"{back.start} of anchor {back.anchor}: {problem}"
                    )
                layer = StitchingLayer.between(source, front.stop, target, back.start)
                if shared.setdefault(name, layer).arguments != layer.arguments:
                    raise ValueError(
                        f"stitch {stitch.id}: stitching layer {name} joins other cuts elsewhere: here it would join "
                        f"{layer.arguments}, there {shared[name].arguments}"
                    )
        pairs: dict[str, dict[str, nn.Module]] = {}
        for name, layer in shared.items():
            pair, index = name.split(".")
            pairs.setdefault(pair, {})[index] = layer
        return nn.ModuleDict({pair: nn.ModuleDict(members) for pair, members in pairs.items()})

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only what from_pretrained did not load comes here: new classifiers, and buffers that no checkpoint holds.
        if isinstance(module, StitchingLayer):
            module.reset_parameters()
        else:
            super()._init_weights(module)
        restore: Any = getattr(module, "init_non_persistent_buffers", None)
        if restore is not None:
            restore()


class StitchableModel(StitchablePreTrainedModel):
    """The features of a stitch: what timm's `forward_features` and `forward_head(pre_logits=True)` return."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        stitch_id: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Run one stitch.

        Args:
            pixel_values: (N, num_channels, height, width), normalised as the image processor does.
            stitch_id: the stitch of this call; the default of the model if None. No state is touched, so threads can
                use one model with stitches of their own.
            return_dict: whether to return a `ModelOutput` (the default) or a tuple.
            kwargs: ignored, for callers that pass what other models take.

        Returns:
            `last_hidden_state` in the back anchor's layout after its final norm, `pooler_output` (N, features).
        """
        features, anchor = self.run_features(pixel_values, stitch_id)
        pooled = self.run_head(anchor, features, pre_logits=True)
        output = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)
        return output if self._wants_dict(return_dict) else output.to_tuple()


class StitchableForImageClassification(StitchablePreTrainedModel):
    """A stitch as an image classifier: with one anchor's route, exactly what timm computes for it."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        stitch_id: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """Run one stitch.

        Args:
            pixel_values: (N, num_channels, height, width), normalised as the image processor does.
            labels: (N,) class numbers, or (N, num_labels) targets of a multi-label or regression problem.
            stitch_id: the stitch of this call; the default of the model if None. No state is touched, so threads can
                use one model with stitches of their own.
            return_dict: whether to return a `ModelOutput` (the default) or a tuple.
            kwargs: ignored, for callers that pass what other models take.

        Returns:
            `logits` (N, num_labels), and `loss` where labels are given, as transformers' image classifiers have them.
        """
        features, anchor = self.run_features(pixel_values, stitch_id)
        logits = self.run_head(anchor, features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if self._wants_dict(return_dict) else output.to_tuple()


def _is_of_a_library(model_class: type) -> bool:
    return model_class.__module__.startswith(("timm.", "torch."))


def _plan(stitch: Stitch) -> tuple[Step, ...]:
    steps = [Step("stem", stitch.route[0].anchor)]
    for segment, layer, back in zip(stitch.route, (*stitch.layers, ""), (*stitch.route[1:], None), strict=True):
        steps += [Step("block", segment.anchor, block) for block in range(segment.start, segment.stop)]
        steps += [Step("layer", back.anchor, layer=layer)] if back else []
    return (*steps, Step("bare" if stitch.skips_neck else "neck", stitch.route[-1].anchor))
