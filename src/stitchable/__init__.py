"""One checkpoint that is many networks: Stitchable Neural Networks for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from stitchable.costs import update_costs
from stitchable.evaluation import evaluate
from stitchable.initialization import initialize_stitches
from stitchable.latency import calibrate
from stitchable.model.anchors import Adapter, Layout
from stitchable.model.architectures import register_anchor, register_family
from stitchable.model.configuration_stitchable import STITCHABLE_VERSION as __version__
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchableModel
from stitchable.model.routes import Segment, Stitch, pareto_front
from stitchable.throughput import measure_throughput

AutoConfig.register("stitchable", StitchableConfig)
AutoModel.register(StitchableConfig, StitchableModel)
AutoModelForImageClassification.register(StitchableConfig, StitchableForImageClassification)
# So that save_pretrained copies the code that loads the checkpoint where stitchable is not installed.
StitchableConfig.register_for_auto_class()
StitchableModel.register_for_auto_class("AutoModel")
StitchableForImageClassification.register_for_auto_class("AutoModelForImageClassification")

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
    "initialize_stitches",
    "measure_throughput",
    "pareto_front",
    "register_anchor",
    "register_family",
    "update_costs",
]
