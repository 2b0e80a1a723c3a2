"""`StitchableModel` and `StitchableForImageClassification`: many networks in one checkpoint, chosen at run time.

Stitchable Neural Networks, Pan, Cai, Zhuang, CVPR 2023 (https://arxiv.org/abs/2302.06586).
"""

import copy
import difflib
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import logging

from .cascades import CascadeOutput, run_cascade
from .chain import Anchor, Flow, parts_used
from .configuration_stitchable import StitchableConfig
from .operations import OWN_CODE, TimmModel
from .own import OwnParts, Update
from .placement import brought_in, check_device_map, device_of, entering
from .routes import (
    Cascade,
    Choice,
    Stitch,
    Stitches,
    best_within,
    check_cascades,
    find_cascade,
    find_stitch,
    measured_by,
    why_not_joined,
    within,
)
from .schema import read, write
from .shards import WEIGHTS, find_adapter, find_shards, read_weights, writing
from .stitching import StitchingLayer

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that say where and how to look for files.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# Those that say where, and are no secret (an address of a proxy may hold a password).
_KEPT_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder")
# Those of push_to_hub, which save_pretrained(..., push_to_hub=True) takes too.
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")


class Step(NamedTuple):
    """One step of a stitch: a "stem", a "block", a stitching "layer" into an anchor, or what follows the last block.

    That is a "neck" (final norm and the like), or "bare", which leaves the features as they are. Behind the first joint
    of a stitch that has parameters of its own, `own` is its id: no other stitch shares such a step.
    """

    kind: str
    anchor: int = -1
    block: int = -1
    layer: str = ""
    own: int = -1


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
    record: Callable[..., Stitch]  # what importing the package adds, as it does more that code of others calls
    replace: Callable[..., None]
    give_own: Callable[..., None]
    compile_blocks: Callable[..., None]

    def __init__(self, config: StitchableConfig) -> None:
        super().__init__(config)
        if not config.anchors:
            raise ValueError("this config has no anchors; make one with stitchable.make_config([...])")
        self.shapes, self._stitches = _described(config)
        self.cascades = config.cascades
        self.parts = parts_used(self.shapes, self._stitches)  # what this model holds of each anchor
        self._plans = {stitch.id: plan_of(stitch) for stitch in self._stitches}
        self.gradient_checkpointing = False
        self._warnings: set[str] = set()
        self.hub_arguments: dict[str, Any] = {}  # where from_pretrained looked for `name_or_path`
        self.chains = {index: self.shapes[index].chain for index, parts in enumerate(self.parts) if parts}
        self.anchors = nn.ModuleList(self._build_anchor(index) for index in range(len(self.shapes)))
        self.stitching_layers = self._build_stitching_layers()
        self.own = nn.ModuleDict()  # by the id of the stitch
        for stitch in self._stitches:
            self._build_own(stitch)
        # Parts that accelerate's automatic device maps place as a whole.
        whole = {type(self.anchors[index]).__name__ for index in self.chains}
        self._no_split_modules = whole | {"StitchingLayer", "OwnParts"}
        self.post_init()
        if config.num_labels_of_costs not in (None, config.num_labels):
            logger.warning_once(
                f"the FLOPs, parameters and metrics of the stitches are those of {config.num_labels_of_costs} classes, "
                f"this model has {config.num_labels}; stitchable.update_costs(model) counts again"
            )

    # ---------------------------------------------------------------- choosing

    @property
    def stitches(self) -> Stitches:
        """Every stitch of this model, in the order of the config."""
        return self._stitches

    @property
    def stitch(self) -> Stitch:
        """The stitch that runs when a call names none."""
        return self._find(None)

    @property
    def cascades(self) -> tuple[Cascade, ...]:
        """The cascades whose stitches this model has; set from what config.json has of all."""
        return tuple(self._cascades.values())

    @cascades.setter
    def cascades(self, cascades: Sequence[Mapping[str, Any]]) -> None:
        found, ids = read(tuple[Cascade, ...], cascades, "cascades"), {stitch.id for stitch in self.stitches}
        check_cascades(found, self.stitches, self.config.left_out)
        self._cascades = {cascade.id: cascade for cascade in found if cascade.stitch_ids <= ids}
        self.config.cascades = write(found)
        if self.config.cascade_id not in (None, *self._cascades):
            self.set_stitch(self.stitches[-1].id)  # what was the default is gone

    def set_stitch(self, stitch_id: int) -> Stitch:
        """Make a stitch the default of later calls and of the saved config, and return it; a ValueError if unknown."""
        stitch = find_stitch(self.stitches, stitch_id, self.config.left_out)
        self.config.stitch_id, self.config.cascade_id = stitch.id, None
        return stitch

    def set_cascade(self, cascade_id: int) -> Cascade:
        """Make a cascade the default of later calls and of the saved config, and return it; a ValueError if unknown."""
        cascade = self._find_cascade(cascade_id)
        self.config.stitch_id, self.config.cascade_id = None, cascade.id
        return cascade

    def find(self, flops: float | None = None, *, metric: str | None = None, **bounds: float | None) -> Choice:
        """The best measured stitch or cascade within every bound given; changes nothing.

        Stitches within the bounds that were not measured are passed over, with a warning that counts them.

        Args:
            flops: upper bound on multiply-adds plus normalisation terms of every image (one multiply-add = 1).
            metric: which measured figure to maximise; None for accuracy, or where nobody had labels, agreement with the
                largest anchor. Where none was measured, the largest FLOPs win.
            bounds: upper bounds on `mean_flops` (of an image on average, which a cascade may exceed for some), `params`
                (of the stitch alone), `latency_ms` (milliseconds per call, of a cascade on average, as
                `stitchable.calibrate` predicted) and `memory_mb` (the peak of memory of a call, in 10^6 bytes).

        Raises:
            ValueError: no bound, a bound that is no positive number, or nothing within them (names the cheapest).
        """
        bounds = {"flops": flops, **bounds}
        choices = (*self.stitches, *self.cascades)
        metric = metric or measured_by(choices)
        best, affordable = best_within(choices, metric=metric, **bounds), within(choices, **bounds)
        unmeasured = sum(metric not in choice.metrics for choice in affordable)
        chosen = "the best of the others" if metric in best.metrics else "the largest FLOPs"
        warning = (
            f"{unmeasured} of the {len(affordable)} stitches within this budget have no measured {metric}; "
            f"the choice is {chosen}. stitchable.evaluate(model, batches) measures them"
        )
        if unmeasured and warning not in self._warnings:  # once for this model: budgets change while it runs
            self._warnings.add(warning)
            logger.warning(warning)
        return best

    def for_budget(self, flops: float | None = None, **bounds: Any) -> Choice:
        """Make what `find` returns for these bounds the default of later calls, and return it."""
        found = self.find(flops, **bounds)
        return self.set_cascade(found.id) if isinstance(found, Cascade) else self.set_stitch(found.id)

    @contextmanager
    def using(self, stitch_id: int | None = None, *, cascade: int | None = None) -> Iterator[Choice]:
        """A choice that ends: within the block a stitch or a cascade is the default; then the old one is again.

        Threads that share the model share its default; what a call itself asks for touches no state.
        """
        before = self.config.stitch_id, self.config.cascade_id
        if (stitch_id is None) == (cascade is None):
            raise ValueError(f"using(...) takes a stitch_id or a cascade, got {stitch_id!r} and {cascade!r}")
        try:
            choose: Callable[..., Choice] = self.set_cascade if stitch_id is None else self.set_stitch
            yield choose(cascade if stitch_id is None else stitch_id)
        finally:
            self.config.stitch_id, self.config.cascade_id = before

    def _find(self, stitch_id: int | None) -> Stitch:
        wanted = self.config.stitch_id if stitch_id is None else stitch_id
        if wanted is None:
            raise ValueError(f"the default of this model is cascade {self.config.cascade_id}; name a stitch_id")
        return find_stitch(self.stitches, wanted, self.config.left_out)

    def _find_cascade(self, cascade_id: int) -> Cascade:
        if type(cascade_id) is int and cascade_id in self._cascades:
            return self._cascades[cascade_id]
        return find_cascade(read(tuple[Cascade, ...], self.config.cascades, "cascades"), cascade_id, self.stitches)

    # ---------------------------------------------------------------- running

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

        Each anchor and each stitching layer casts what enters it to its own data type, on its own device. A ValueError
        refuses whole numbers, which are no pixel values yet, and a model that is split inside an anchor.
        """
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4:
            found = f"of shape {tuple(pixel_values.shape)}" if isinstance(pixel_values, torch.Tensor) else pixel_values
            raise ValueError(f"pixel values must be a tensor (N, C, H, W), got one {found!s:.80}")
        if not pixel_values.is_floating_point():
            found = f"{pixel_values.dtype}; see the image processor"
            raise ValueError(f"pixel values are floating-point numbers, got {found}")
        if "hf_device_map" in self.__dict__:  # accelerate has placed the parts of this model
            check_device_map(self.__dict__["hf_device_map"])
        return Flow(pixel_values, pixel_values)

    def run_step(self, step: Step, flow: Flow) -> Flow:
        """Run one step on what the step before it returned; the first one on `start(pixel_values)`."""
        anchor, chain = self._anchor(step.anchor), self.chains[step.anchor]
        own: Any = self.own[str(step.own)] if step.own >= 0 else None
        with brought_in(self, anchor, chain, step.block):
            if step.kind in ("block", "neck"):
                anchor = anchor if own is None else own.seen(step.anchor, step.block) or anchor
                return chain.run_block(anchor, step.block, flow) if step.block >= 0 else chain.run_neck(anchor, flow)
            if step.kind == "bare":
                return flow
            pixel_values = entering(anchor, flow.pixel_values)
            if step.kind == "stem":
                return chain.run_stem(anchor, pixel_values)
            layer = self.get_stitching_layer(step.layer)
            own_prefix = entering(layer, chain.prefix_of(anchor)) if layer.needs_own_prefix else None
            update = own and own.layers[step.layer.replace(".", "-")]
            features = layer(entering(layer, flow.features), own_prefix, update)
            return chain.enter(anchor, entering(anchor, features), pixel_values, layer.target.grid)

    def run_head(self, anchor: int, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features after the last step to logits (N, num_labels), or to the pooled features before the classifier."""
        module, chain = self._anchor(anchor), self.chains[anchor]
        with brought_in(self, module, chain, -1):
            return chain.run_head(module, features, pre_logits)

    def run_features(
        self, pixel_values: torch.Tensor, stitch_id: int | None = None, hidden_states: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, int]:
        """Run a stitch up to its head; returns the features and the anchor whose head follows.

        What the stem and each block return is appended to `hidden_states`.
        """
        steps = self.steps(stitch_id)
        flow = self.start(pixel_values)
        for step in steps:
            if step.kind == "block" and self.gradient_checkpointing and self.training:
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

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        stitch_id: int | None = None,
        cascade: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> Any:
        """Run one stitch, or a cascade.

        Args:
            pixel_values: (N, num_channels, height, width), normalised as the image processor does.
            labels: (N,) class numbers, or (N, num_labels) targets of a multi-label or regression problem; of a
                classifier only.
            stitch_id: the stitch of this call; the default of the model if None. No state is touched, so threads can
                use one model with stitches of their own.
            cascade: the cascade of this call, in the place of a stitch; of a classifier in evaluation mode only.
            output_hidden_states: whether to return what the stem and each block of the route return.
            output_attentions: cannot be true: timm's attention does not give its weights away.
            return_dict: whether to return a `ModelOutput` (the default) or a tuple.
            unknown: refused with a TypeError and the nearest name.

        Returns:
            A classifier: `logits` (N, num_labels), and `loss` where labels are given, as transformers' image
            classifiers have them. A model without a head: `last_hidden_state` in the back anchor's layout after its
            final norm, and `pooler_output` (N, features). Both: `hidden_states` where they are asked for, each in the
            layout of its anchor. A cascade: besides, (N,) `stitch_ids` and `flops` of what answered each image.

        Raises:
            ValueError: an unknown stitch, pixel values that are whole numbers.
        """
        _refuse(unknown)
        if output_attentions:
            raise ValueError("output_attentions: timm's attention does not give its weights away; leave it out")
        if cascade is None and stitch_id is None:
            cascade = self.config.cascade_id
            if labels is not None and self.training and len(self._stitches) > 1:
                logger.warning_once(
                    "only the default stitch is trained: name one by stitch_id, or draw them, as "
                    "stitchable.training.trainer.StitchTrainer does"
                )
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: list[torch.Tensor] | None = [] if keep else None
        if cascade is None:
            output = self._output(*self.run_features(pixel_values, stitch_id, hidden_states), labels)
        elif keep:
            raise ValueError("a cascade returns no hidden states, which are of several stitches; leave them out")
        else:
            output = self._cascaded(pixel_values, labels, stitch_id, cascade)
        if hidden_states:
            output["hidden_states"] = tuple(hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _cascaded(self, pixel_values: torch.Tensor, labels: Any, stitch_id: int | None, cascade: int) -> CascadeOutput:
        kind = getattr(self.config, "problem_type", None)
        if self.training:
            raise ValueError(f"cascade {cascade} runs in evaluation mode (model.eval()); to train, name a stitch_id")
        if stitch_id is not None or not isinstance(self, StitchableForImageClassification):
            raise ValueError("a cascade is run by a classifier, and without a stitch_id")
        if (self.config.num_labels or 0) < 2 or kind not in (None, "single_label_classification"):
            raise ValueError(f"a cascade needs one of several classes per image, not {self.config.num_labels}, {kind}")
        output = run_cascade(self, pixel_values, self._find_cascade(cascade))
        if labels is not None:
            output["loss"] = self.loss_function(labels, output.logits, self.config)
        return output

    def _output(self, features: torch.Tensor, anchor: int, labels: torch.Tensor | None) -> Any:
        raise NotImplementedError("StitchableModel and StitchableForImageClassification have outputs")

    # ---------------------------------------------------------------- parts

    def get_stitching_layer(self, name: str) -> StitchingLayer:
        """The stitching layer named "FRONT-BACK.INDEX"."""
        pair, index = name.split(".")
        layers: Any = self.stitching_layers[pair]
        return layers[index]

    def _build_own(self, stitch: Stitch) -> None:
        if str(stitch.id) in self.own:
            del self.own[str(stitch.id)]
        if stitch.own:
            try:
                parts = OwnParts(stitch, stitch.own.rank, self.chains, self.anchors, self.get_stitching_layer)
            except ValueError as error:
                raise ValueError(f"stitch {stitch.id}: {error}") from None
            self.own[str(stitch.id)] = parts.train(self.training)

    @torch.no_grad()
    def extract(self, stitch_id: int | None = None, *, cascade: int | None = None) -> "StitchablePreTrainedModel":
        """A model of its own with a copy of only the weights of a stitch or cascade; it saves and loads like any other.

        The stitch keeps its id and its parameters keep their names. Norms of its own go where the anchors' were, and
        updates into its stitching layers; stitches of a cascade keep them apart. Hooks are not taken over.

        Raises:
            ValueError: not an id of this model, or parts that were replaced or changed (by adapters, pruning,
                quantisation) so that they cannot be taken over exactly.
        """
        part = {"stitch_id": self._find(stitch_id).id} if cascade is None else {"cascade": cascade}
        config = type(self.config).from_dict(self.config.to_dict(), **part)
        own: Any = None
        if cascade is None and config.stitches[0].pop("own", None):
            own = self.own[str(config.stitches[0]["id"])]
        extracted = _without_values(type(self), config)
        named: Any = self.named_modules(remove_duplicate=False)
        modules = {name.replace("._orig_mod", ""): module for name, module in named}  # a compiled block is wrapped
        modules |= {name: own.norms[key] for name, key in own.places.items()} if own else {}
        for name, module in extracted.named_modules():
            if isinstance(module, nn.Identity):  # of which the stitch needs nothing
                continue
            source = modules.get(name, nn.Identity())
            needed, found = _content(module), _content(source)
            if needed != {key: found.get(key) for key in needed}:
                difference = f"the config has {needed} there, the model {found}"
                raise ValueError(f"{name} cannot be taken over exactly: {difference}. {_REPAIR}")
            if any(tensor.is_meta for tensor in source.parameters(recurse=False)):
                hint = "load it alone: from_pretrained(..., stitch_id=)"
                raise ValueError(f"the weights of {name} are offloaded; {hint}")
            for key, _ in list(module.named_parameters(recurse=False)):
                parameter = source.get_parameter(key)
                setattr(module, key, nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad))
            for key, _ in list(module.named_buffers(recurse=False)):
                setattr(module, key, source.get_buffer(key).clone())
        for name in extracted.stitches[0].layers if own else ():
            own.layers[name.replace(".", "-")].merge(extracted.get_stitching_layer(name).linear)
        return extracted.train(self.training)

    # ---------------------------------------------------------------- saving and loading

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in any `PreTrainedModel`, but in one file per anchor, one for the stitching layers, one for own parts.

        So a model that is loaded for one stitch or a budget downloads only the files it needs. `max_shard_size` has no
        effect. The image processor goes along where stitchable is imported.
        A ValueError refuses weights that the config does not describe, which no checkpoint of it could give back.
        """
        push_to_hub, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        options = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        state_dict, rest = (args[0], args[1:]) if args else (kwargs.pop("state_dict", None), ())
        kwargs["max_shard_size"] = sys.maxsize
        if not is_main_process or getattr(self, "_hf_peft_config_loaded", False) or hasattr(self, "hf_quantizer"):
            super().save_pretrained(save_directory, is_main_process, state_dict, *rest, **kwargs)
        else:
            weights = self.state_dict() if state_dict is None else state_dict
            self._check_saveable(weights)
            with writing(save_directory, weights, kwargs.get("variant"), lambda x: load_offloaded_parameter(self, x)):
                super().save_pretrained(save_directory, is_main_process, {}, *rest, **kwargs)
        if is_main_process:
            for name in sorted(set().union(*(self.shapes[index].code for index in self.chains))):
                custom_object_save(OWN_CODE[name], save_directory)
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
            kwargs: `stitch_id` keeps this stitch alone, `cascade` its stitches, `max_flops` every stitch up to that
                cost (FLOPs per image); only their weights are downloaded and read, only their modules are built. Others
                as in any `PreTrainedModel`. A `token` serves this call and is kept nowhere: what looks for a file of
                the checkpoint later takes the stored one (`hf auth login`, HF_TOKEN), or its own argument.

        Raises:
            ValueError: no such stitch, weights that are another model's, `use_safetensors=False`, or a part of a
                checkpoint in which an adapter of PEFT lies.
            OSError: no such checkpoint, or one with a missing or damaged file, or without safetensors; names it.
        """
        source = pretrained_model_name_or_path
        if isinstance(kwargs.get("device_map"), Mapping):
            check_device_map(kwargs["device_map"])
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: the weights of a stitchable model are safetensors; convert others")
        if source is None or kwargs.get("gguf_file"):
            return super().from_pretrained(source, *args, **kwargs)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        trust_remote_code = kwargs.pop("trust_remote_code", False)
        config, kwargs = cls._read_config(kwargs.pop("config", None) or source, kwargs, hub)
        if not config.anchors:  # transformers makes an empty config where there is none
            raise ValueError(f"{source} has no config.json of a stitchable model")
        anchors, stitches = _described(config)
        code = [anchors[segment.anchor].code for stitch in stitches for segment in stitch.route]
        cls._load_own_code(set().union(*code), source, trust_remote_code, hub)
        files = find_shards(source, _needed_weights(anchors, stitches), variant=kwargs.get("variant"), **hub)
        adapter, place = find_adapter(source, **hub), source
        if config.left_out and adapter is not None:
            raise ValueError(
                f"an adapter of PEFT lies in {source}, which is for the whole model, and a part of it is loaded; "
                "merge the adapters first (merge_and_unload), save the model, and load the part of that"
            )
        if config.left_out:
            kwargs = {name: x for name, x in kwargs.items() if name not in (*hub, "variant", "use_safetensors")}
            place, kwargs["state_dict"] = None, read_weights(files)  # type: ignore[assignment]
        elif adapter is not None:
            # As a folder: of a repository, transformers would load the base model that the adapter names.
            place, kwargs = adapter, {name: x for name, x in kwargs.items() if name not in hub}
        try:
            loaded = super().from_pretrained(place, *args, config=config, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(f"the weights of {source} do not fit the anchors of its config: {error}") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = os.fspath(source)
        model.hub_arguments = {name: value for name, value in hub.items() if name in _KEPT_ARGUMENTS}
        return loaded

    @classmethod
    def _read_config(cls, given: Any, kwargs: dict[str, Any], hub: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not isinstance(given, PreTrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(given, return_unused_kwargs=True, **{**kwargs, **hub})
            return config, {**kwargs, **hub}
        part = {name: kwargs.pop(name) for name in ("stitch_id", "cascade", "max_flops") if name in kwargs}
        return type(given).from_dict(given.to_dict(), **part) if part else given, kwargs

    @classmethod
    def _load_own_code(cls, references: set[str], source: Any, trust: bool, hub: Mapping[str, Any]) -> None:
        """Make what the anchors name "file.Name" known, from the files of the checkpoint where that is trusted."""
        # Code that travelled with the checkpoint runs because somebody trusted it.
        trust = trust or cls.__module__.startswith("transformers_modules.")
        where = {name: value for name, value in hub.items() if name != "subfolder"}
        for reference in sorted(references - set(OWN_CODE)):
            if not trust:
                file = f"{reference.split('.')[0]}.py"
                fix = "read it and pass trust_remote_code=True, or import the file that registers them"
                raise ValueError(f"{source} brings models of its own in {file}; {fix}")
            try:
                OWN_CODE[reference] = get_class_from_dynamic_module(reference, source, **where)
            except AttributeError as error:
                raise ValueError(f"{source} names {reference}, which its file lacks: {error}") from error

    def _check_saveable(self, weights: Mapping[str, Any]) -> None:
        """Refuse weights of other names or shapes than the config describes: they could not be loaded again."""
        if any(getattr(x, "is_meta", False) for x in weights.values()) and not hasattr(self, "hf_device_map"):
            raise ValueError("weights that are offloaded by hooks cannot be saved; save the model before")
        described = _shapes(_without_values(type(self), copy.deepcopy(self.config)).state_dict())
        given = _shapes(weights)
        for name in sorted({*described, *given}):
            if given.get(name) != described.get(name):
                difference = f"{name} has the shape {given.get(name)}, by the config {described.get(name)}"
                problem = f"the config does not describe these weights ({difference})"
                raise ValueError(f"{problem}, so they could not be loaded again. {_REPAIR}")

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]  # a mixin's, for mypy none
        """Push the folder that this model was loaded from, with the weights and the config it has now, as one commit.

        Where stitchable is imported, the card and the figure are made anew too (its `publishing.push_model`).

        Args:
            repo_id: "user/name" on the Hub; made if it does not exist.
            options: `private`, `revision`, `token`, `commit_message`, `commit_description` and `create_pr`, as in
                `HfApi.upload_folder`, whose `CommitInfo` is returned.
        """
        private, token = options.pop("private", None), options.pop("token", None)
        options.pop("max_shard_size", None)
        for name in sorted(set(options) - {"revision", "commit_message", "commit_description", "create_pr"}):
            raise ValueError(f"push_to_hub has no option {name!r} where stitchable is not imported")
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            source = str(self.name_or_path)
            if source and not Path(source).is_dir():
                where: Any = {name: self.hub_arguments.get(name) for name in ("revision", "cache_dir")}
                source = snapshot_download(source, token=token, ignore_patterns=WEIGHTS, **where)
            if source:  # what the checkpoint has beside its weights
                ignored = shutil.ignore_patterns(*WEIGHTS, "__pycache__", ".cache")
                shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=WEIGHTS, **options)

    # ---------------------------------------------------------------- building

    def _anchor(self, index: int) -> TimmModel:
        return self._modules["anchors"]._modules[str(index)]  # type: ignore[union-attr]  # the long way takes longer

    def _build_anchor(self, index: int) -> nn.Module:
        if index not in self.chains:
            return nn.Identity()
        try:
            model = self.shapes[index].build(self.config.num_labels)
        except ValueError as error:
            raise ValueError(f"anchors[{index}]: {error}") from error
        self.chains[index].keep_only(model, self.parts[index])
        return model

    def _build_stitching_layers(self) -> nn.ModuleDict:
        layers: dict[str, StitchingLayer] = {}
        for number, stitch in enumerate(self.stitches):
            for front, stop, back, start, name in stitch.joints:
                cuts = f"cut {stop} of anchor {front} and cut {start} of anchor {back}"
                ends = self.shapes[front], stop, self.shapes[back], start
                problem = why_not_joined(*ends, self.config.resize)
                if problem:
                    raise ValueError(f"stitches[{number}]: {cuts} cannot be joined: {problem}")
                layer = StitchingLayer.between(*ends)
                if layers.setdefault(name, layer).arguments != layer.arguments:
                    raise ValueError(f"stitches[{number}]: layer {name} joins other cuts elsewhere than here {cuts}")
        pairs: dict[str, nn.ModuleDict] = {}
        for name, layer in layers.items():
            pair, index = name.split(".")
            pairs.setdefault(pair, nn.ModuleDict())[index] = layer
        return nn.ModuleDict(pairs)

    def init_weights(self) -> None:
        """Leave the weights of a new model as its layers have initialised them in their own way."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only what from_pretrained did not load comes here: new classifiers, and buffers that no checkpoint holds.
        ours = (layer.linear for layer in self.stitching_layers.modules() if isinstance(layer, StitchingLayer))
        if isinstance(module, Update) or any(module is linear for linear in ours):
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            _restore_buffers(module)


class StitchableModel(StitchablePreTrainedModel):
    """The features of a stitch: what timm's `forward_features` and `forward_head(pre_logits=True)` return."""

    def _output(self, features: torch.Tensor, anchor: int, labels: torch.Tensor | None) -> BaseModelOutputWithPooling:
        _refuse([] if labels is None else ["labels"])
        pooled = self.run_head(anchor, features, pre_logits=True)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)


class StitchableForImageClassification(StitchablePreTrainedModel):
    """A stitch as an image classifier: with one anchor's route, exactly what timm computes for it."""

    def _output(self, features: torch.Tensor, anchor: int, labels: torch.Tensor | None) -> ImageClassifierOutput:
        logits = self.run_head(anchor, features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _described(config: Any) -> tuple[list[Anchor], Stitches]:
    """What a config, which holds JSON types only, says of anchors and stitches."""
    anchors = [Anchor.from_dict(entry, f"anchors[{index}]") for index, entry in enumerate(config.anchors)]
    return anchors, Stitches(read(tuple[Stitch, ...], config.stitches, "stitches"))


def _needed_weights(anchors: Sequence[Anchor], stitches: Stitches) -> Callable[[str], bool]:
    """Whether a model of these has a weight of this name."""
    parts = parts_used(anchors, stitches)
    others = {f"stitching_layers.{layer}." for stitch in stitches for layer in stitch.layers}
    others |= {f"own.{stitch.id}." for stitch in stitches if stitch.own}

    def is_needed(name: str) -> bool:
        kind, index, *rest = name.split(".", 2)
        if kind == "anchors" and index.isdigit() and int(index) < len(anchors) and rest:
            return anchors[int(index)].chain.part_of(rest[0]) in parts[int(index)]
        return name.startswith(tuple(others))

    return is_needed


def plan_of(stitch: Stitch) -> tuple[Step, ...]:
    """The steps of a stitch."""
    steps, own = [Step("stem", stitch.route[0].anchor)], -1
    for segment, joint in zip(stitch.route, (*stitch.joints, None), strict=True):
        steps += [Step("block", segment.anchor, block, own=own) for block in range(segment.start, segment.stop)]
        own = stitch.id if stitch.own else -1
        steps += [Step("layer", joint.back, layer=joint.layer, own=own)] if joint else []
    return (*steps, Step("bare" if stitch.skips_neck else "neck", stitch.route[-1].anchor, own=own))


def _refuse(names: Iterable[str]) -> None:
    for name in names:
        known = list(inspect.signature(StitchablePreTrainedModel.forward).parameters)[1:-1]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near and near[0] != name else f"there are {', '.join(known)}"
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


_REPAIR = (
    "Merge the adapters first (merge_and_unload), make pruning permanent (torch.nn.utils.prune.remove), change "
    "classifiers by model.reset_classifier(num_classes), extract before layers are quantised or replaced"
)


def _without_values(model_class: Any, config: StitchableConfig) -> Any:
    """The model of a config, on the meta device."""
    with torch.device("meta"):
        return model_class(config)


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(x, "shape", ())) for name, x in weights.items()}


def _content(module: nn.Module) -> dict[str, Any]:
    """What a module itself is: its class, and the shapes of the weights that a checkpoint has of it."""
    kind = "BatchNorm2d" if isinstance(module, nn.SyncBatchNorm) else type(module).__name__  # of several devices
    shapes = {key: shape for key, shape in _shapes(module.state_dict()).items() if "." not in key}
    return {"class": kind, **shapes}
