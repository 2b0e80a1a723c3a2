"""Stitches for runtimes without Python: ONNX files that share their weights, and programs of `torch.export`."""

import contextlib
import hashlib
import importlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BaseImageProcessor
from transformers.utils import logging

from stitchable.evaluation import evaluation_mode
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel
from stitchable.model.routes import Stitch, find_cascade, find_stitch
from stitchable.model.schema import write
from stitchable.processing import image_processor
from stitchable.publishing import check_new_folder

WEIGHTS = "weights.bin"
ALIGNMENT = 64  # bytes, so that a runtime can map a tensor into memory where it is
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_SMALL = 1024  # bytes; smaller tensors, among them constants that a runtime must know, stay in the graphs


def export_onnx(
    model: StitchableForImageClassification,
    folder: str | Path,
    stitch_ids: Sequence[int] | None = None,
    *,
    cascade: int | None = None,
    processor: BaseImageProcessor | None = None,
    opset: int | None = None,
) -> dict[int, Path]:
    """Write stitches as ONNX graphs beside one file of weights that they share.

    Every graph takes "pixel_values" (N, C, H, W) in float32, for any N, and gives "logits" (N, num_labels). What a
    runtime needs to know of images and classes is in its metadata, see `metadata_of`. A weight that several stitches
    use is stored once in `weights.bin`, so to open another graph of the folder is to read no new file.

    Of a cascade there is a graph for each stage, from pixel values on: what two stages begin with alike is stored once,
    but runs in both. Scores, temperatures and thresholds are in each graph's metadata as "cascade", and
    `run_cascade.py` beside the graphs runs them with numpy and onnxruntime.

    Args:
        model: in float32.
        folder: new or empty.
        stitch_ids: which stitches; all of them if None.
        cascade: which cascade, in the place of stitches.
        processor: the image processor, timm's for the largest anchor if None.
        opset: version of ONNX's operators; the exporter's own choice if None.

    Returns:
        The path of each stitch's graph, "stitch-ID.onnx".

    Raises:
        ImportError: onnx and onnxscript are not installed.
        ValueError: an unknown stitch or cascade, a folder that holds something, weights that are not float32, or a
            model that this opset cannot express.
    """
    onnx = _import("onnx")
    _import("onnxscript")
    folder = Path(folder)
    ids = [stitch.id for stitch in model.stitches] if stitch_ids is None else list(stitch_ids)
    metadata = metadata_of(model, processor)
    if cascade is not None:
        if stitch_ids is not None:
            raise ValueError("a cascade says which stitches it runs; give it or stitch_ids")
        found = find_cascade(model.cascades, cascade, model.stitches)
        ids = [stage.stitch for stage in found.stages]
        metadata["cascade"] = json.dumps(write(found), allow_nan=False)
    for stitch_id in ids:
        find_stitch(model.stitches, stitch_id)
    if model.dtype != torch.float32:
        raise ValueError(f"ONNX is written in float32, the model is in {model.dtype}; model.float() converts it")
    check_new_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        _write(onnx, model, ids, Path(unfinished), metadata, opset)
        if cascade is not None:
            shutil.copyfile(Path(__file__).with_name("onnx_runner.py"), Path(unfinished, "run_cascade.py"))
        for path in Path(unfinished).iterdir():
            path.rename(folder / path.name)
    return {stitch_id: folder / f"stitch-{stitch_id}.onnx" for stitch_id in ids}


def _write(
    onnx: Any,
    model: StitchableForImageClassification,
    stitch_ids: Sequence[int],
    folder: Path,
    metadata: dict[str, str],
    opset: int | None,
) -> None:
    places: dict[bytes, int] = {}
    with (folder / WEIGHTS).open("wb") as weights:
        for stitch_id in logging.tqdm(stitch_ids, desc="exporting", leave=False):
            stitch = find_stitch(model.stitches, stitch_id)
            graph = _to_onnx(model, stitch, opset)
            for initializer in graph.graph.initializer:
                _share(onnx, initializer, weights, places)
            for key, value in {**metadata, "stitch": json.dumps(stitch.to_dict(), allow_nan=False)}.items():
                graph.metadata_props.add(key=key, value=value)
            path = folder / f"stitch-{stitch_id}.onnx"
            onnx.save(graph, path)
            onnx.checker.check_model(path)


def export_program(
    model: StitchableForImageClassification,
    path: str | Path,
    stitch_id: int | None = None,
    *,
    processor: BaseImageProcessor | None = None,
) -> Path:
    """Write one stitch as a program of `torch.export`, for `torch.export.load`, AOTInductor or ExecuTorch.

    It takes pixel values (N, C, H, W), for any N, and returns logits (N, num_labels). What `metadata_of` says is in its
    extra file "metadata.json".

    Args:
        model: whose stitch it is.
        path: a new file, "*.pt2".
        stitch_id: the default stitch if None.
        processor: the image processor, timm's for the largest anchor if None.

    Raises:
        ValueError: an unknown stitch, or a file that exists.
    """
    path, stitch = Path(path), find_stitch(model.stitches, model.stitch.id if stitch_id is None else stitch_id)
    if path.exists():
        raise ValueError(f"{path} exists; choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**metadata_of(model, processor), "stitch": json.dumps(stitch.to_dict(), allow_nan=False)}
    torch.export.save(
        _exported(model, stitch), path, extra_files={"metadata.json": json.dumps(metadata, allow_nan=False)}
    )
    return path


def metadata_of(model: StitchableForImageClassification, processor: BaseImageProcessor | None = None) -> dict[str, str]:
    """What whoever feeds an exported stitch needs to know, as text: "preprocessing" and "labels" are JSON.

    "preprocessing" has of the image processor "size" and "resample" (as Pillow numbers it), "crop_size",
    "rescale_factor", "image_mean" and "image_std", without those of a step that it leaves out; "labels" has the names
    of the classes in order.
    """
    settings = (processor or image_processor(model.config)).to_dict()
    steps = {
        "do_resize": ("size", "resample"),
        "do_center_crop": ("crop_size",),
        "do_rescale": ("rescale_factor",),
        "do_normalize": ("image_mean", "image_std"),
    }
    names = [name for step, members in steps.items() if settings.get(step) for name in members]
    labels = [label for _, label in sorted((model.config.id2label or {}).items(), key=lambda item: int(item[0]))]
    return {
        "preprocessing": json.dumps({name: settings[name] for name in names}, allow_nan=False),
        "labels": json.dumps(labels),
        "stitchable_version": model.config.stitchable_version,
    }


class _OneStitch(nn.Module):
    """Pixel values to the logits of one stitch."""

    def __init__(self, model: StitchablePreTrainedModel, stitch_id: int) -> None:
        super().__init__()
        self.model, self.stitch_id = model, stitch_id

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, stitch_id=self.stitch_id).logits


def _exported(model: StitchableForImageClassification, stitch: Stitch) -> torch.export.ExportedProgram:
    """A stitch, with its own weights only, for any number of images."""
    alone = model.extract(stitch.id)
    pixel_values = torch.randn(2, model.config.num_channels, *model.config.image_size).to(alone.device, alone.dtype)
    batch = torch.export.Dim("batch", min=1)
    with evaluation_mode(alone), torch.no_grad(), _quiet():
        program = torch.export.export(_OneStitch(alone, stitch.id), (pixel_values,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        # Where in which source file it comes from: of no use elsewhere, and more than half of the size.
        node.meta.pop("stack_trace", None)
    return program


def _to_onnx(model: StitchableForImageClassification, stitch: Stitch, opset: int | None) -> Any:
    program = _exported(model, stitch)
    attentions = [node for node in program.graph.nodes if node.target == _ATTENTION]
    try:
        # The kernel by which PyTorch decomposes attention of its own choice gives, where a bias is added that needs a
        # gradient, as in BEiT, a layout in memory that the view behind it does not take.
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            if any(node.args[0].meta["val"].ndim != 4 for node in attentions):
                # Windows have a dimension of their own in Hiera and Twins, which ONNX's attention lacks.
                program = program.run_decompositions({_ATTENTION: _attention_in_parts})
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["pixel_values"],
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        asked = "" if opset is None else f" with opset {opset}"
        raise ValueError(f"stitch {stitch.id} cannot be expressed in ONNX{asked}: {error}") from error
    assert exported is not None
    proto = exported.model_proto
    actual = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is not None and actual != opset:
        raise ValueError(f"stitch {stitch.id} cannot be expressed in ONNX with opset {opset}; {actual} can")
    # The exporter notes here, too, where nodes come from.
    for described in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")
    return proto


def _attention_in_parts(*arguments: Any, **options: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math.default(*arguments, **options)[0]


def _share(onnx: Any, initializer: Any, weights: Any, places: dict[bytes, int]) -> None:
    """Move a tensor out of its graph into the file of weights, where an equal one may be already."""
    content = onnx.numpy_helper.to_array(initializer).tobytes()
    if len(content) < _SMALL:
        return
    digest = hashlib.sha256(content).digest()
    if digest not in places:
        weights.write(b"\0" * (-weights.tell() % ALIGNMENT))
        places[digest] = weights.tell()
        weights.write(content)
        weights.flush()
    for name in ("float_data", "int64_data", "int32_data", "double_data"):
        initializer.ClearField(name)
    initializer.raw_data = content  # set_external_data wants it to be there
    onnx.external_data_helper.set_external_data(initializer, WEIGHTS, places[digest], len(content))
    initializer.ClearField("raw_data")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'stitchable[export]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own parts; a failed change of opset would be a traceback in their log."""
    logs = [getLogger(name) for name in ("onnxscript", "torch.onnx")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
