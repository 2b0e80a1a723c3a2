"""Exported stitches, run by onnxruntime and by torch.export, against the model; their weights are stored once."""

import json
import runpy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor

import stitchable
from families import images, make, randomise
from stitchable.export import ALIGNMENT, WEIGHTS, export_onnx, export_program, metadata_of
from stitchable.model.routes import Stage
from stitchable.model.schema import write
from stitchable.processing import image_processor
from test_running_cascades import middle, with_cascade


def run_onnx(path, pixel_values: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


@pytest.fixture(scope="module")
def model():
    return make("vit", id2label={i: f"class {i}" for i in range(5)}).train()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "new", [0, 3, 4])


@torch.no_grad()
def test_onnx_computes_what_the_model_computes_for_any_number_of_images(model, exported) -> None:
    x = torch.cat([images("vit"), images("vit").flip(-1)])[:3]
    assert model.training  # as it was
    model.eval()
    for stitch_id, path in exported.items():
        assert path.name == f"stitch-{stitch_id}.onnx"
        for pixel_values in (x[:1], x):
            expected = model(pixel_values, stitch_id=stitch_id).logits
            torch.testing.assert_close(run_onnx(path, pixel_values), expected, rtol=1e-4, atol=1e-4)
    model.train()


def test_a_weight_of_several_stitches_is_stored_once(model, exported) -> None:
    parts = [model.extract(stitch_id).state_dict() for stitch_id in exported]
    shared = {name: tensor for part in parts for name, tensor in part.items()}
    large = sum(tensor.nbytes for tensor in shared.values() if tensor.nbytes >= 1024)
    folder = exported[0].parent
    size = (folder / WEIGHTS).stat().st_size
    assert large <= size < 1.1 * large + ALIGNMENT * len(shared)
    apart = sum(tensor.nbytes for part in parts for tensor in part.values() if tensor.nbytes >= 1024)
    assert size < 0.75 * apart
    for path in exported.values():
        graph = onnx.load(path, load_external_data=False).graph
        assert all(len(tensor.raw_data) < 1024 for tensor in graph.initializer)
        text = path.read_bytes()
        assert b"site-packages" not in text
        assert str(folder.parent).encode() not in text


def test_metadata_says_how_to_feed_it_and_what_comes_out(model, exported, tmp_path) -> None:
    metadata = onnxruntime.InferenceSession(str(exported[4])).get_modelmeta().custom_metadata_map
    assert metadata["labels"] == json.dumps([f"class {i}" for i in range(5)])
    assert json.loads(metadata["stitch"]) == model.stitches[4].to_dict()
    settings = json.loads(metadata["preprocessing"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype="uint8"))
    # By hand what the processor does, from the metadata alone.
    scale = settings["size"]["shortest_edge"] / min(picture.size)
    resized = picture.resize([int(side * scale) for side in picture.size], settings["resample"])
    left, top = ((side - 32) // 2 for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32))) * settings["rescale_factor"]
    pixels = (pixels - settings["image_mean"]) / settings["image_std"]
    image_processor(model.config).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert np.abs(pixels.transpose(2, 0, 1) - expected.numpy()).max() < 0.02
    assert metadata_of(model)["preprocessing"] == metadata["preprocessing"]
    only_scaled = ViTImageProcessor(do_normalize=False, size={"height": 32, "width": 32})
    kept = json.loads(metadata_of(model, only_scaled)["preprocessing"])
    assert set(kept) == {"size", "resample", "rescale_factor"}  # no crop, no normalisation


@torch.no_grad()
def test_a_program_computes_what_the_model_computes(model, tmp_path) -> None:
    path = export_program(model, tmp_path / "below" / "stitch.pt2", 4)
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    x = torch.cat([images("vit"), images("vit").flip(-1)])[:3]
    model.eval()
    for pixel_values in (x[:1], x):
        torch.testing.assert_close(program(pixel_values), model(pixel_values, stitch_id=4).logits)
    model.train()
    assert json.loads(json.loads(extra["metadata.json"])["stitch"])["id"] == 4
    with pytest.raises(ValueError, match="exists; choose another name"):
        export_program(model, path, 4)


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "beit-shared",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("relpos-shared", "swin", "levit")),
    ],
)
def test_other_layouts_and_biased_attention(name: str, tmp_path) -> None:
    model, x = make(name), images(name)
    stitch_id = model.stitches[-1].id
    path = export_onnx(model, tmp_path, [stitch_id], opset=20)[stitch_id]
    assert [entry.version for entry in onnx.load(path).opset_import] == [20]
    with torch.no_grad():  # not around the export, or PyTorch would choose another kernel for BEiT's attention
        expected = model(x, stitch_id=stitch_id).logits
    torch.testing.assert_close(run_onnx(path, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_attention_in_windows(tmp_path) -> None:
    """Of five dimensions, as in Hiera."""
    settings = {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1}
    anchors = [{"architecture": "hiera_tiny_224", "kwargs": {**settings, "stages": (1, 1, n, 1)}} for n in (1, 2)]
    model = stitchable.from_anchors(
        anchors, pretrained=False, image_size=64, num_labels=5, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    randomise(model).eval()
    x, stitch_id = torch.randn(3, 3, 64, 64), model.stitches[-1].id
    path = export_onnx(model, tmp_path, [stitch_id])[stitch_id]
    with torch.no_grad():
        expected = model(x, stitch_id=stitch_id).logits
    torch.testing.assert_close(run_onnx(path, x), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_cascade_runs_without_stitchable(tmp_path) -> None:
    x, plain = images("vit", 12), make("vit")
    by_cost = sorted((0, 2, 4), key=lambda i: plain.stitches[i].flops)
    folder = tmp_path / "new"
    for options in ({"combine": "mean", "temperature": 1.7, "kind": "margin"}, {}):
        stage = Stage(0, 1.0, options.get("kind", "max_probability"), 0.5, options.get("temperature", 1.0))
        thresholds = [middle(plain, i, x, stage) for i in by_cost[:2]]
        model, cascade = with_cascade(stitches=(0, 2, 4), thresholds=thresholds, number=6, **options)
        if options:
            assert set(export_onnx(model, folder, cascade=6)) == {0, 2, 4}
            assert "from stitchable" not in (folder / "run_cascade.py").read_text(encoding="utf-8")
            runner = runpy.run_path(str(folder / "run_cascade.py"))
        stages = runner["load_cascade"](folder)
        if not options:  # the same graphs, run in another way
            stages = list(zip(write(cascade)["stages"], (session for _, session in stages), strict=True))
        expected = model(x, cascade=6)
        assert len(set(expected.stitch_ids.tolist())) > 1
        for size in (12, 1):
            answers = [runner["run_cascade"](stages, part.numpy()) for part in x.split(size)]
            logits, ids = (np.concatenate(of) for of in zip(*answers, strict=True))
            assert ids.tolist() == expected.stitch_ids.tolist()
            torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="there is no cascade 7"):
        export_onnx(model, tmp_path / "other", cascade=7)
    with pytest.raises(ValueError, match="give it or stitch_ids"):
        export_onnx(model, tmp_path / "other", [0], cascade=6)


def test_what_cannot_be_exported_is_said(tmp_path, capfd) -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="stitch_id 77 is out of range"):
        export_onnx(model, tmp_path, [77])
    with pytest.raises(ValueError, match="stitch 0 cannot be expressed in ONNX with opset 13; 18 can"):
        export_onnx(model, tmp_path / "new", [0], opset=13)
    assert capfd.readouterr().err == ""  # not the exporter's own traceback either
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]  # ready for the next try
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="already holds something"):
        export_onnx(model, tmp_path, [0])
    with pytest.raises(ValueError, match=r"model\.float\(\) converts it"):
        export_onnx(model.to(torch.bfloat16), tmp_path / "half", [0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["beit-shared", "pit", "tnt", "resnet-vit"])
def test_contexts_and_own_tokens_are_exported_for_any_number_of_images(name: str, tmp_path) -> None:
    model, x = make(name), images(name, 3)
    stitch = model.stitches[-1]
    program = torch.export.load(export_program(model, tmp_path / "stitch.pt2", stitch.id))
    torch.testing.assert_close(program.module()(x), model(x, stitch_id=stitch.id).logits, rtol=1e-4, atol=1e-4)
