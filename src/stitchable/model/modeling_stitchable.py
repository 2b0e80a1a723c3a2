"""`StitchableModel` and `StitchableForImageClassification`: many networks in one checkpoint, chosen at run time.

Stitchable Neural Networks, Pan, Cai, Zhuang, CVPR 2023 (https://arxiv.org/abs/2302.06586).
"""

import copy
import difflib
import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from .architectures import OWN_CLASSES, create_anchor
from .chain import Chain, Flow, Layout, Part
from .configuration_stitchable import StitchableConfig
from .operations import TimmModel
from .placement import brought_in, check_device_map, device_of, entering, is_placed
from .preprocessing import image_processor, load_image_processor
from .routes import (
    AnchorShape,
    Stitch,
    Stitches,
    best_within,
    carried_tokens,
    check_integer,
    find_stitch,
    is_measured,
    why_not_joined,
    within,
)
from .shards import WEIGHTS, find_adapter, find_shards, read_weights, split_weights
from .stitching import Side, StitchingLayer, grid_of

logger = logging.get_logger(__name__)

# Arguments of forward, of which a model without a head lacks the labels.
_ARGUMENTS = ("pixel_values", "labels", "stitch_id", "output_hidden_states", "output_attentions", "return_dict")
# Arguments of from_pretrained that say where and how to look for files.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# Those that say where, and are no secret (an address of a proxy may hold a password).
_KEPT_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder")
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
            raise ValueError("this config has no anchors; make one with stitchable.make_config([...])")
        self._stitches = Stitches(Stitch.from_dict(stitch) for stitch in config.stitches)
        find_stitch(self._stitches, config.stitch_id)  # again, because a config can be changed after it was checked
        self._shapes = [AnchorShape.from_dict(anchor) for anchor in config.anchors]
        self.gradient_checkpointing = False
        self._warnings: set[str] = set()
        self.hub_arguments: dict[str, Any] = {}  # where from_pretrained looked for `name_or_path`
        self._plans = {stitch.id: _plan(stitch) for stitch in self.stitches}
        self.chains: dict[int, Chain] = {}  # of the anchors that some stitch uses
        self.anchors = nn.ModuleList(self._build_anchor(index) for index in range(len(config.anchors)))
        self.stitching_layers = self._build_stitching_layers()
        if self.device.type != "meta":
            # timm has initialised its layers in its own way; transformers would do it over in post_init.
            for module in (*self.anchors.modules(), *self.stitching_layers.modules()):
                setattr(module, "_is_hf_initialized", True)  # noqa: B010  # a flag of transformers, unknown to mypy
        # Parts that accelerate's automatic device maps place as a whole.
        self._no_split_modules = {type(self.anchors[index]).__name__ for index in self.chains} | {"StitchingLayer"}
        self.post_init()
        if config.num_labels_of_costs not in (None, config.num_labels):
            logger.warning_once(
                f"the FLOPs, parameters and metrics of the stitches are those of {config.num_labels_of_costs} classes, "
                f"this model has {config.num_labels}; stitchable.update_costs(model) counts again"
            )

    # ---------------------------------------------------------------- choosing a stitch

    @property
    def stitches(self) -> Stitches:
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

    def find(
        self,
        flops: float | None = None,
        *,
        params: float | None = None,
        latency_ms: float | None = None,
        memory_mb: float | None = None,
        metric: str = "accuracy",
    ) -> Stitch:
        """The best measured stitch within every bound given; changes nothing.

        Stitches within the bounds that were not measured are passed over, with a warning that counts them.

        Args:
            flops: upper bound on multiply-adds plus normalisation terms per image (one multiply-add = 1).
            params: upper bound on parameters, of the stitch alone.
            latency_ms: upper bound on milliseconds per call, as `stitchable.calibrate` predicted them.
            memory_mb: upper bound on the peak of memory of a call, in 10^6 bytes, predicted likewise.
            metric: which measured figure to maximise. Where none was measured, the largest FLOPs win.

        Raises:
            ValueError: no bound, a bound that is no positive number, or no stitch within them (names the cheapest).
        """
        bounds = {"flops": flops, "params": params, "latency_ms": latency_ms, "memory_mb": memory_mb}
        stitch = best_within(self.stitches, **bounds, metric=metric)
        affordable = within(self.stitches, **bounds)
        unmeasured = sum(not is_measured(stitch, metric) for stitch in affordable)
        if unmeasured:
            chosen = "the best of the others" if is_measured(stitch, metric) else "the largest FLOPs"
            warning = (
                f"{unmeasured} of the {len(affordable)} stitches within this budget have no measured {metric}; "
                f"the choice is {chosen}. stitchable.evaluate(model, batches) measures them"
            )
            if warning not in self._warnings:  # once for this model: budgets change while it runs
                self._warnings.add(warning)
                logger.warning(warning)
        return stitch

    def for_budget(self, flops: float | None = None, **bounds: Any) -> Stitch:
        """Make what `find` returns for these bounds the default of later calls, and return it."""
        return self.set_stitch(self.find(flops, **bounds).id)

    @contextmanager
    def using(self, stitch_id: int) -> Iterator[Stitch]:
        """A choice that ends: within the block a stitch is the default, as by `set_stitch`; then the old one is again.

        Threads that share the model share its default; a call's own `stitch_id` touches no state.

        Raises:
            ValueError: not an integer, or not an id of this model.
        """
        before = self.config.stitch_id
        try:
            yield self.set_stitch(stitch_id)
        finally:
            self.config.stitch_id = before

    def record(self, stitch_id: int, **figures: Any) -> Stitch:
        """Write figures into the stitch table (`flops`, `params`, `latency_ms`, `memory_mb`, `metrics`); the new entry.

        A figure that is infinite or NaN, such as the loss of a diverged stitch, is left out with a warning.

        Raises:
            ValueError: an unknown stitch or figure, or a figure that is no number.
        """
        stitch = self._find(stitch_id)
        known = {"flops", "params", "latency_ms", "memory_mb", "metrics"}
        if set(figures) - known:
            raise ValueError(
                f"a stitch has no figure {sorted(set(figures) - known)}; it has {', '.join(sorted(known))}"
            )
        figures = {name: _plain(value) for name, value in figures.items()}
        recorded = Stitch.from_dict({**stitch.to_dict(), **figures})
        given = {**figures, **figures.get("metrics", {})}
        kept = {**recorded.to_dict(), **recorded.metrics, "metrics": {}}
        lost = [name for name, value in given.items() if value is not None and name not in kept]
        if lost:
            logger.warning(f"stitch {stitch.id}: {', '.join(lost)} is not finite and is not recorded")
        index = self._stitches.index(stitch)
        self._stitches = Stitches((*self._stitches[:index], recorded, *self._stitches[index + 1 :]))
        self.config.stitches[index] = recorded.to_dict()
        return recorded

    def _find(self, stitch_id: int | None) -> Stitch:
        wanted = self.config.stitch_id if stitch_id is None else stitch_id
        return find_stitch(self.stitches, wanted, self.config.left_out)

    # ---------------------------------------------------------------- running a stitch

    @property
    def device(self) -> torch.device:
        """Of the weights, or where accelerate offloads them, the device that it brings them to."""
        return device_of(self)

    def steps(self, stitch_id: int | None = None) -> tuple[Step, ...]:
        """What a stitch does, in order, from pixel values to what timm's `forward_features` returns.

        Stitches that begin alike have steps that begin alike, so work can be shared between them.
        """
        wanted = self.config.stitch_id if stitch_id is None else stitch_id
        plan = self._plans.get(wanted) if type(wanted) is int else None
        return self._plans[self._find(wanted).id] if plan is None else plan

    def start(self, pixel_values: torch.Tensor) -> Flow:
        """What flows before the first step of any stitch: pixel values (N, C, H, W).

        Each anchor and each stitching layer casts what enters it to its own data type, on its own device.

        Raises:
            ValueError: whole numbers, which are no pixel values yet, or a model that is split inside an anchor.
        """
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4:
            found = f"of shape {tuple(pixel_values.shape)}" if isinstance(pixel_values, torch.Tensor) else pixel_values
            raise ValueError(f"pixel values must be a tensor (N, C, H, W), got one {found!s:.80}")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel values must be floating-point numbers, got {pixel_values.dtype}; the image processor scales "
                "and normalises images"
            )
        if "hf_device_map" in self.__dict__:  # accelerate has placed the parts of this model
            check_device_map(self.__dict__["hf_device_map"])
        return Flow(pixel_values, pixel_values)

    def run_step(self, step: Step, flow: Flow) -> Flow:
        """Run one step on what the step before it returned; the first one on `start(pixel_values)`."""
        if step.kind == "bare":
            return flow
        anchor: TimmModel = self.anchors[step.anchor]
        chain = self.chains[step.anchor]
        with self._present(step.anchor, step.block):
            if step.kind == "block":
                return chain.run_block(anchor, step.block, flow)
            if step.kind == "neck":
                return chain.run_neck(anchor, flow)
            pixel_values = entering(anchor, flow.pixel_values)
            if step.kind == "stem":
                return chain.run_stem(anchor, pixel_values)
            layer = self.get_stitching_layer(step.layer)
            own_prefix = entering(layer, chain.prefix_of(anchor)) if layer.needs_own_prefix else None
            features = layer(entering(layer, flow.features), own_prefix)
            return chain.enter(anchor, entering(anchor, features), pixel_values, layer.target.grid)

    def run_head(self, anchor: int, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features after the last step to logits (N, num_labels), or to the pooled features before the classifier."""
        with self._present(anchor):
            return self.chains[anchor].run_head(self.anchors[anchor], features, pre_logits)

    def _present(self, anchor: int, block: int = -1) -> AbstractContextManager[None]:
        """With what a block of an anchor needs, or what all but its blocks do, where accelerate offloads it."""
        module = self.anchors[anchor]
        if not is_placed(module) and not is_placed(self):
            return nullcontext()
        return brought_in(self.chains[anchor].modules_for(module, block))

    def run_features(
        self,
        pixel_values: torch.Tensor,
        stitch_id: int | None = None,
        hidden_states: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Run a stitch up to its head; returns the features and the anchor whose head follows.

        What the stem and each block return is appended to `hidden_states`.
        """
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
            if hidden_states is not None and step.kind in ("stem", "block"):
                hidden_states.append(flow.features)
        return flow.features, steps[-1].anchor

    def _run_flat(self, step: Step, features: torch.Tensor, pixel_values: torch.Tensor, *context: Any) -> tuple:
        flow = self.run_step(step, Flow(features, pixel_values, context))
        return flow.features, *flow.context

    # ---------------------------------------------------------------- timm's own contract

    @property
    def num_features(self) -> int:
        """Channels of what `forward_features` returns for the default stitch."""
        back = self.stitch.route[-1].anchor
        return getattr(self.anchors[back], "num_features", self._shapes[back].cuts[-1].channels)

    def forward_features(self, pixel_values: torch.Tensor, stitch_id: int | None = None) -> torch.Tensor:
        """Pixel values (N, C, H, W) to the features after the back anchor's final norm, in its layout."""
        return self.run_features(pixel_values, stitch_id)[0]

    def forward_head(
        self, features: torch.Tensor, pre_logits: bool = False, stitch_id: int | None = None
    ) -> torch.Tensor:
        """Those features to logits (N, num_labels), or to the pooled features before the classifier."""
        return self.run_head(self.steps(stitch_id)[-1].anchor, features, pre_logits)

    def forward_intermediates(
        self,
        pixel_values: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        stitch_id: int | None = None,
    ) -> Any:
        """Features between the blocks of a stitch, as timm's models give them.

        For an anchor they are what its own `forward_intermediates` returns. Along other routes, and where an anchor has
        no such method, there is one per block of an anchor with a single stage, and one per stage, at its end, of
        others (the stem, which some of timm's models count as one more, is none).

        Args:
            pixel_values: (N, C, H, W).
            indices: which intermediates; the last so many if a number, all if None.
            return_prefix_tokens: give pairs of an intermediate and its prefix tokens (N, tokens, C).
            norm: after the final norm: all of an anchor with a single stage, of others the last one only.
            stop_early: do not run what follows the last intermediate, and return the features there.
            output_fmt: "NCHW" for (N, C, H, W), "NLC" for (N, H W, C).
            intermediates_only: return the intermediates alone.
            stitch_id: the stitch of this call; the default of the model if None.

        Returns:
            What `forward_features` returns, and the list of intermediates.

        Raises:
            ValueError: indices or a format that there are not, a norm that this model does not hold or that leaves no
                grid, or an anchor whose tokens are no grid (Hiera).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        stitch, steps = self._find(stitch_id), self.steps(stitch_id)
        back = stitch.route[-1].anchor
        if stitch.is_anchor and hasattr(self.anchors[back], "forward_intermediates"):
            timm_model: TimmModel = self.anchors[back]
            options = {"norm": norm, "stop_early": stop_early, "output_fmt": output_fmt}
            if return_prefix_tokens and self._shapes[back].prefix_tokens:
                options["return_prefix_tokens"] = True
            with self._present(back):
                return timm_model.forward_intermediates(
                    entering(timm_model, self.start(pixel_values).pixel_values),
                    indices=indices,
                    intermediates_only=intermediates_only,
                    **options,
                )
        ends = [place for place, step in enumerate(steps) if step.kind == "block" and self._ends_something(step)]
        number = len(ends)
        wanted = range(number) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if any(not -number <= index < number for index in wanted) or not len(wanted):
            raise ValueError(f"this stitch has {number} intermediates, 0..{number - 1}; got indices {indices!r}")
        chosen = [ends[index] for index in wanted]
        found: dict[int, Any] = {}
        flow = self.start(pixel_values)
        for place, step in enumerate(steps):
            flow = self.run_step(step, flow)
            if place in chosen:
                found[place] = self._intermediate(step, flow, norm, place == ends[-1], output_fmt, return_prefix_tokens)
            if stop_early and place == max(chosen):
                break
        intermediates = [found[place] for place in chosen]
        return intermediates if intermediates_only else (flow.features, intermediates)

    def _ends_something(self, step: Step) -> bool:
        stages = self._shapes[step.anchor].stages
        return len(stages) == 1 or step.block + 1 in accumulate(stages)

    def _intermediate(
        self, step: Step, flow: Flow, norm: bool, is_last: bool, output_fmt: str, return_prefix_tokens: bool
    ) -> Any:
        shape = self._shapes[step.anchor]
        side = Side.of(shape, step.block + 1)
        if side.layout is Layout.UNITS:
            raise ValueError("tokens in the order of mask units (Hiera) are no grid, so there are no intermediates")
        if norm and (len(shape.stages) == 1 or is_last):
            if "head" not in self.parts_of_anchor(step.anchor):
                raise ValueError(f"this model does not hold the final norm of anchor {step.anchor}; give norm=False")
            if not all(isinstance(operation, str) for operation in self.chains[step.anchor].neck):
                raise ValueError(f"the final norm of anchor {step.anchor} leaves no grid; give norm=False")
            flow = self.run_step(Step("neck", step.anchor), flow)
        x_NHWC = grid_of(flow.features, side)
        x = x_NHWC.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x_NHWC.flatten(1, 2)
        prefix = flow.features[:, : side.prefix_tokens] if return_prefix_tokens and side.prefix_tokens else None
        return x if prefix is None else (x, prefix)

    def reset_classifier(self, num_classes: int) -> None:
        """Give every anchor a new classifier of so many classes, and the config as many labels, without names.

        FLOPs and parameters of the stitches are those of before until `stitchable.update_costs(model)`.

        Raises:
            ValueError: no positive number.
        """
        if check_integer(num_classes, "num_classes") < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; forward_head(pre_logits=True) leaves the "
                "classifier out"
            )
        with_heads = [index for index in self.chains if "head" in self.parts_of_anchor(index)]
        if any(next(self.anchors[index].parameters()).is_meta for index in with_heads):
            raise ValueError("a model whose weights are offloaded gets no new classifiers; load it without")
        for index in with_heads:
            anchor: TimmModel = self.anchors[index]
            known, like = set(anchor.modules()), next(anchor.parameters())
            if hasattr(anchor, "reset_classifier"):
                anchor.reset_classifier(num_classes)
            else:
                name = str(self.chains[index].head[-1])
                fresh = create_anchor(self.config.anchors[index], num_classes)
                anchor.set_submodule(name, fresh.get_submodule(name))
                anchor.num_classes = num_classes
            for module in set(anchor.modules()) - known:
                module.to(like.device, like.dtype).train(anchor.training)  # a batch norm among them, in LeViT
        self.config.num_labels = num_classes
        logger.warning("the classifiers are new; stitchable.update_costs(model) counts their FLOPs and parameters")

    # ---------------------------------------------------------------- parts

    def get_stitching_layer(self, name: str) -> StitchingLayer:
        """The stitching layer named "FRONT-BACK.INDEX"."""
        pair, index = name.split(".")
        layers: Any = self.stitching_layers[pair]
        return layers[index]

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block of each anchor in place, with the arguments of `torch.compile`.

        Compiled whole, the model would be compiled anew for every stitch; blocks that are alike share their code.
        """
        blocks = [
            module
            for number, chain in self.chains.items()
            for module in chain.modules_of_blocks(self.anchors[number]).values()
        ]
        # Torch counts the versions of all blocks of a class together and gives up beyond 8, but every rate of drop path
        # makes a version of its own: so 8 for each block.
        options = {"recompile_limit": 8 * len(blocks), **options}
        for block in blocks:
            block.compile(**options)

    # ---------------------------------------------------------------- taking a stitch out

    @torch.no_grad()
    def extract(self, stitch_id: int | None = None) -> "StitchablePreTrainedModel":
        """A model of its own with a copy of only this stitch's weights; it saves and loads like any other.

        The stitch keeps its id and its parameters keep their names. Hooks are not taken over.

        Raises:
            ValueError: not an id of this model, or parts that were replaced or changed (by adapters, pruning,
                quantisation) so that they cannot be taken over exactly.
        """
        stitch = self._find(stitch_id)
        config = type(self.config).from_dict(self.config.to_dict(), stitch_id=stitch.id)
        with torch.device("meta"):
            extracted = type(self)(config)
        for name, module in extracted.named_modules():
            source = _counterpart(self, name, module)
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
        effect. Where the folder has no image processor, that of the checkpoint the model was loaded from is written
        too, or timm's for the largest anchor, so that a pipeline can load the folder.

        Raises:
            ValueError: weights that the config does not describe, which no checkpoint of it could give back.
        """
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            self._check_saveable(kwargs.get("state_dict") or (args[0] if args else None) or self.state_dict())
        push_to_hub, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        options = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        kwargs["max_shard_size"] = sys.maxsize
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            split_weights(save_directory, kwargs.get("variant"))
            if not (Path(save_directory) / IMAGE_PROCESSOR_NAME).exists():
                self._image_processor().save_pretrained(save_directory)
            for model_class in {type(self.anchors[index]) for index in self.chains}:
                if model_class in OWN_CLASSES.values():
                    custom_object_save(model_class, save_directory)
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
                `PreTrainedModel`. A `token` serves this call and is kept nowhere: what looks for a file of the
                checkpoint later takes the stored one (`hf auth login`, HF_TOKEN), or its own argument.

        Raises:
            ValueError: no such stitch, weights that are another model's, `use_safetensors=False`, or a part of a
                checkpoint in which an adapter of PEFT lies.
            OSError: no such checkpoint, or one with a missing or damaged file, or without safetensors; names it.
        """
        source = pretrained_model_name_or_path
        if isinstance(kwargs.get("device_map"), Mapping):
            check_device_map(kwargs["device_map"])
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "use_safetensors=False: the weights of a stitchable model are safetensors; convert others, and leave "
                "it out"
            )
        if source is None or kwargs.get("gguf_file"):
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
        cls._load_own_classes(config, source, trust_remote_code, hub)
        with torch.device("meta"):
            needed = cls(copy.deepcopy(config)).state_dict().keys()
        files = find_shards(source, needed, variant=kwargs.get("variant"), **hub)
        adapter = find_adapter(source, **hub)
        if adapter is not None and config.left_out:
            raise ValueError(
                f"an adapter of PEFT lies in {source}, which is for the whole model, and a part of it is loaded; merge "
                "the adapters first (merge_and_unload), save the model, and load the part of that"
            )
        if config.left_out:
            for name in (*hub, "variant", "use_safetensors"):
                kwargs.pop(name, None)
            loaded = super().from_pretrained(None, *args, config=config, state_dict=read_weights(files), **kwargs)
        elif adapter is not None:
            # As a folder: of a repository, transformers would load the base model that the adapter names.
            kwargs = {name: value for name, value in kwargs.items() if name not in hub}
            loaded = super().from_pretrained(adapter, *args, config=config, **kwargs)
        else:
            loaded = super().from_pretrained(source, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = os.fspath(source)
        model.hub_arguments = {name: value for name, value in hub.items() if name in _KEPT_ARGUMENTS}
        return loaded

    def _check_saveable(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Refuse weights of other names or shapes than a model made anew of the config has."""
        if getattr(self, "hf_quantizer", None) is not None:
            return
        with torch.device("meta"):
            expected = type(self)(copy.deepcopy(self.config)).state_dict()
        if any(getattr(value, "is_meta", False) for value in state_dict.values()) and not hasattr(
            self, "hf_device_map"
        ):
            raise ValueError(
                "weights that are offloaded by hooks cannot be saved; save the model before it is offloaded"
            )
        given = {name: getattr(value, "shape", ()) for name, value in state_dict.items()}
        if set(given) != set(expected):
            name = min(set(given) ^ set(expected))
            raise ValueError(
                f"the config does not describe these weights ({name} is only {'here' if name in given else 'there'}), "
                "so they could not be loaded again. Merge the adapters first (merge_and_unload), or make pruning "
                "permanent (torch.nn.utils.prune.remove)"
            )
        for name, tensor in expected.items():
            if given[name] != tensor.shape:
                raise ValueError(
                    f"the config does not describe these weights, so they could not be loaded again: {name} has the "
                    f"shape {tuple(given[name])}, by the config {tuple(tensor.shape)}{_advice(self, name)}"
                )

    def _image_processor(self) -> Any:
        if self.name_or_path:
            try:
                path = cached_file(
                    self.name_or_path,
                    IMAGE_PROCESSOR_NAME,
                    _raise_exceptions_for_missing_entries=False,
                    **self.hub_arguments,
                )
                if path is not None:
                    return load_image_processor(Path(path).parent)
            except OSError:
                logger.warning(f"{self.name_or_path} is no longer there; the image processor saved is timm's own")
            except ValueError as error:
                logger.warning(
                    f"the image processor saved is timm's own, as that of {self.name_or_path} is none: {error}"
                )
        return image_processor(self.config)

    @classmethod
    def _load_own_classes(cls, config: Any, source: str | os.PathLike, trust: bool, hub: Mapping[str, Any]) -> None:
        """Make the classes that the anchors name known, from the files of the checkpoint where that is trusted."""
        used = {segment[0] for stitch in config.stitches for segment in stitch["route"]}
        references = {config.anchors[index].get("class") for index in used} - {None}
        # Code that travelled with the checkpoint runs because somebody trusted it.
        travelled = cls.__module__.startswith("transformers_modules.")
        trusted = trust or travelled
        for reference in sorted(references):
            known = OWN_CLASSES.get(reference)
            if known is None and not trusted:
                raise ValueError(
                    f"{source} brings models of its own in {reference.split('.')[0]}.py; read it and pass "
                    "trust_remote_code=True, or import the file that registers them"
                )
            if not trusted:
                continue
            where = {name: value for name, value in hub.items() if name != "subfolder"}
            if known is None:
                OWN_CLASSES[reference] = get_class_from_dynamic_module(reference, source, **where)
            elif not travelled and not _is_code_of(known, source, reference, hub):
                raise ValueError(
                    f"{source} brings other code of {reference} than what is registered here; load it in a process of "
                    "its own, or without trust_remote_code to run what is registered"
                )

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]  # a mixin's, for mypy none
        """Push the folder that this model was loaded from, with the weights and the config it has now, as one commit.

        Where stitchable is imported, the card, the stitch table and the figure are made anew too (its
        `publishing.push_model`).

        Args:
            repo_id: "user/name" on the Hub; made if it does not exist.
            options: `private`, `revision`, `token`, `commit_message`, `commit_description` and `create_pr`, as in
                `HfApi.upload_folder`.

        Returns:
            huggingface_hub's `CommitInfo`.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: what the Hub refuses, a missing token among it.
        """
        private, token = options.pop("private", None), options.pop("token", None)
        unknown = set(options) - {"revision", "commit_message", "commit_description", "create_pr", "max_shard_size"}
        if unknown:
            raise ValueError(f"push_to_hub has no option {min(unknown)!r} where stitchable is not imported")
        options.pop("max_shard_size", None)
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            if self.name_or_path:
                self._copy_source(Path(folder), token)
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=WEIGHTS, **options)

    def _copy_source(self, folder: Path, token: Any) -> None:
        """Copy the files of the checkpoint that this model was loaded from, all but its weights."""
        source = str(self.name_or_path)
        if not Path(source).is_dir():
            revision, cache = self.hub_arguments.get("revision"), self.hub_arguments.get("cache_dir")
            source = snapshot_download(source, revision=revision, cache_dir=cache, token=token, ignore_patterns=WEIGHTS)
        ignored = shutil.ignore_patterns(*WEIGHTS, "__pycache__", ".cache")
        shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)

    # ---------------------------------------------------------------- building

    def _build_anchor(self, index: int) -> nn.Module:
        parts = self.parts_of_anchor(index)
        if not parts:
            return nn.Identity()
        entry, shape = self.config.anchors[index], self._shapes[index]
        model = create_anchor(entry, self.config.num_labels)
        try:
            chain = Chain.from_dict(entry["chain"], type(model))
            chain.check_names(model)
            if chain.depth != shape.depth:
                raise ValueError(f"its chain has {chain.depth} blocks, its depth is {shape.depth}")
        except ValueError as error:
            raise ValueError(f"anchor {index}, {entry['architecture']}: {error}") from error
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

    def _hidden_states(self, wanted: bool | None, attentions: bool | None) -> list[torch.Tensor] | None:
        """Where to collect them, if they are wanted."""
        if attentions:
            raise ValueError("output_attentions: timm's attention does not give its weights away; leave it out")
        return [] if (self.config.output_hidden_states if wanted is None else wanted) else None

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only what from_pretrained did not load comes here: new classifiers, and buffers that no checkpoint holds.
        layers = (layer for layer in self.stitching_layers.modules() if isinstance(layer, StitchingLayer))
        if isinstance(module, nn.Linear) and any(module is layer.linear for layer in layers):
            module.reset_parameters()
        else:
            super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            _restore_buffers(module)


class StitchableModel(StitchablePreTrainedModel):
    """The features of a stitch: what timm's `forward_features` and `forward_head(pre_logits=True)` return."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        stitch_id: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Run one stitch.

        Args:
            pixel_values: (N, num_channels, height, width), normalised as the image processor does.
            stitch_id: the stitch of this call; the default of the model if None. No state is touched, so threads can
                use one model with stitches of their own.
            output_hidden_states: whether to return what the stem and each block of the route return.
            output_attentions: cannot be true: timm's attention does not give its weights away.
            return_dict: whether to return a `ModelOutput` (the default) or a tuple.
            unknown: refused, with the nearest name.

        Returns:
            `last_hidden_state` in the back anchor's layout after its final norm, `pooler_output` (N, features), and
            `hidden_states` where they are asked for, each in the layout of its anchor.

        Raises:
            TypeError: an argument that there is not.
            ValueError: an unknown stitch, pixel values that are whole numbers.
        """
        _refuse(unknown, _ARGUMENTS[:1] + _ARGUMENTS[2:])
        hidden_states = self._hidden_states(output_hidden_states, output_attentions)
        features, anchor = self.run_features(pixel_values, stitch_id, hidden_states)
        pooled = self.run_head(anchor, features, pre_logits=True)
        output = BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=pooled,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )
        return output if self._wants_dict(return_dict) else output.to_tuple()


class StitchableForImageClassification(StitchablePreTrainedModel):
    """A stitch as an image classifier: with one anchor's route, exactly what timm computes for it."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        stitch_id: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """Run one stitch.

        Args:
            pixel_values: (N, num_channels, height, width), normalised as the image processor does.
            labels: (N,) class numbers, or (N, num_labels) targets of a multi-label or regression problem.
            stitch_id: the stitch of this call; the default of the model if None. No state is touched, so threads can
                use one model with stitches of their own.
            output_hidden_states: whether to return what the stem and each block of the route return.
            output_attentions: cannot be true: timm's attention does not give its weights away.
            return_dict: whether to return a `ModelOutput` (the default) or a tuple.
            unknown: refused, with the nearest name.

        Returns:
            `logits` (N, num_labels), `loss` where labels are given, as transformers' image classifiers have them, and
            `hidden_states` where they are asked for, each in the layout of its anchor.

        Raises:
            TypeError: an argument that there is not.
            ValueError: an unknown stitch, pixel values that are whole numbers.
        """
        _refuse(unknown, _ARGUMENTS)
        hidden_states = self._hidden_states(output_hidden_states, output_attentions)
        features, anchor = self.run_features(pixel_values, stitch_id, hidden_states)
        logits = self.run_head(anchor, features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=None if hidden_states is None else tuple(hidden_states)
        )
        return output if self._wants_dict(return_dict) else output.to_tuple()


def _refuse(unknown: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise TypeError(f"forward() got an unexpected keyword argument {name!r}; {hint}")


def _restore_buffers(module: Any) -> None:
    if torch.get_default_device().type == "meta" or not any(tensor.is_meta for tensor in module.parameters()):
        module.init_non_persistent_buffers()
        return
    # Some of timm's modules make them where their weights are, which stay on disk here.
    twin = copy.deepcopy(module).to_empty(device="cpu")
    twin.init_non_persistent_buffers()
    for name, buffer in twin.named_buffers(recurse=False):
        if name not in module.state_dict():
            setattr(module, name, buffer)


def _plain(figure: Any) -> Any:
    """A figure, or figures by name, as Python's own numbers."""
    if isinstance(figure, Mapping):
        return {name: _plain(value) for name, value in figure.items()}
    item = getattr(figure, "item", None)  # of a tensor or NumPy's number
    try:
        return item() if callable(item) else figure
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"a figure is one number, got {figure!r}") from error


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name in module.state_dict()]
    return [*module.named_parameters(recurse=False), *buffers]  # others are made anew, of another shape at times


def _advice(model: Any, name: str) -> str:
    """What to do about a weight of another shape."""
    match = re.match(r"anchors\.(\d+)\.(.+)", name)
    if match and model.chains[int(match[1])].part_of(match[2]) == "head":
        return "; model.reset_classifier(num_classes) changes classifiers and config"
    return ""


def _counterpart(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The submodule of a model that stands where its config has `module`.

    Raises:
        ValueError: it is another kind of module, with other parameters, or its weights are not there.
    """
    try:
        found: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name} cannot be taken over exactly: the model has none") from None
    source = getattr(found, "_orig_mod", found)  # of a block that was compiled on its own
    if isinstance(module, nn.Identity):
        return source  # of which the stitch needs nothing
    needed, there = ({key: tuple(tensor.shape) for key, tensor in _tensors(each)} for each in (module, source))
    # For training on many devices.
    synchronised = isinstance(source, nn.SyncBatchNorm) and type(module) is nn.BatchNorm2d
    same_kind = type(source) is type(module) or synchronised
    if not same_kind or not needed.keys() <= there.keys():
        raise ValueError(
            f"{name} cannot be taken over exactly: the config has a {type(module).__name__} there, the model a "
            f"{type(source).__name__} with {', '.join(sorted(there)) or 'no weights'}. Merge the adapters first "
            "(merge_and_unload), make pruning permanent (torch.nn.utils.prune.remove), extract before layers are "
            "quantised or replaced"
        )
    for key, shape in needed.items():
        if there[key] != shape:
            raise ValueError(
                f"{name}.{key} cannot be taken over exactly: it has the shape {there[key]}, by the config {shape}"
                f"{_advice(model, f'{name}.{key}')}"
            )
    if any(tensor.is_meta for tensor in source.parameters(recurse=False)):
        raise ValueError(
            f"the weights of {name} are offloaded; load this stitch alone with from_pretrained(..., stitch_id=)"
        )
    return source


def _is_code_of(known: type, source: str | os.PathLike, reference: str, hub: Mapping[str, Any]) -> bool:
    try:
        own = Path(inspect.getfile(known)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # of a notebook, which no file can equal
        return True
    path = cached_file(source, f"{reference.split('.')[0]}.py", **hub)
    return path is not None and Path(path).read_text(encoding="utf-8").split() == own.split()


def _plan(stitch: Stitch) -> tuple[Step, ...]:
    steps = [Step("stem", stitch.route[0].anchor)]
    for segment, layer, back in zip(stitch.route, (*stitch.layers, ""), (*stitch.route[1:], None), strict=True):
        steps += [Step("block", segment.anchor, block) for block in range(segment.start, segment.stop)]
        steps += [Step("layer", back.anchor, layer=layer)] if back else []
    return (*steps, Step("bare" if stitch.skips_neck else "neck", stitch.route[-1].anchor))
