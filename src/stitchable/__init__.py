"""One checkpoint that is many networks: Stitchable Neural Networks for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from stitchable import tables, timm_contract
from stitchable.building import from_anchors, make_config
from stitchable.cascades import find_cascades
from stitchable.compiling import compile_blocks
from stitchable.costs import update_costs
from stitchable.evaluation import evaluate, measure_agreement
from stitchable.families.adapter import Adapter, Layout
from stitchable.families.registry import load_own_code, register_anchor, register_family
from stitchable.figures import record, replace
from stitchable.front import pareto_front
from stitchable.initialization import initialize_stitches
from stitchable.latency import calibrate
from stitchable.model.configuration_stitchable import STITCHABLE_VERSION as __version__
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import (
    StitchableForImageClassification,
    StitchableModel,
    StitchablePreTrainedModel,
)
from stitchable.model.routes import Segment, Stitch
from stitchable.own import give_own, recalibrate_batch_norms
from stitchable.processing import save_pretrained
from stitchable.publishing import push_model
from stitchable.selection import prune, select
from stitchable.timing import measure_throughput

AutoConfig.register("stitchable", StitchableConfig)
AutoModel.register(StitchableConfig, StitchableModel)
AutoModelForImageClassification.register(StitchableConfig, StitchableForImageClassification)
# So that save_pretrained copies the code that loads the checkpoint where stitchable is not installed.
StitchableConfig.register_for_auto_class()
StitchableModel.register_for_auto_class("AutoModel")
StitchableForImageClassification.register_for_auto_class("AutoModelForImageClassification")
# What a model can do that needs the package, which does not travel.
StitchablePreTrainedModel.record = record
StitchablePreTrainedModel.replace = replace
StitchablePreTrainedModel.give_own = give_own
StitchablePreTrainedModel.compile_blocks = compile_blocks
StitchablePreTrainedModel._load_own_code = classmethod(load_own_code)  # type: ignore[assignment,method-assign]
StitchablePreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
StitchablePreTrainedModel.push_to_hub = push_model  # type: ignore[assignment,method-assign]
StitchablePreTrainedModel.table = tables.table  # type: ignore[attr-defined]
StitchablePreTrainedModel.plot = tables.plot  # type: ignore[attr-defined]
StitchablePreTrainedModel.__repr__ = tables.in_short  # type: ignore[assignment,method-assign]
for _name in ("num_features", "forward_features", "forward_head", "forward_intermediates", "reset_classifier"):
    setattr(StitchablePreTrainedModel, _name, getattr(timm_contract, _name))

__all__ = [
    "Adapter",
    "Layout",
    "Segment",
    "Stitch",
    "StitchableConfig",
    "StitchableForImageClassification",
    "StitchableModel",
    "__version__",
    "calibrate",
    "evaluate",
    "find_cascades",
    "from_anchors",
    "initialize_stitches",
    "make_config",
    "measure_agreement",
    "measure_throughput",
    "pareto_front",
    "prune",
    "recalibrate_batch_norms",
    "register_anchor",
    "register_family",
    "select",
    "update_costs",
]
