"""Models whose parts lie on other devices, on disk, or in other data types."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from families import images, make
from stitchable import StitchableForImageClassification, calibrate, evaluate, initialize_stitches

# What an anchor itself owns (class tokens), buffers that no checkpoint holds (Swin), weights that are used without
# their module (BEiT), methods that are no forward (rotary embeddings), and two families together.
FAMILIES = ("vit", "swin", "beit-shared", "eva-mixed", "resnet", "resnet-vit")


@pytest.fixture(params=FAMILIES)
def whole(request: pytest.FixtureRequest) -> tuple[str, StitchableForImageClassification]:
    return request.param, make(request.param)


@torch.no_grad()
def check_same(model: StitchableForImageClassification, whole: StitchableForImageClassification, name: str) -> None:
    x = images(name)
    for stitch in model.stitches:
        expected, given = (either(x, stitch_id=stitch.id).logits for either in (whole, model))
        # Not to the bit: a convolution goes other ways where its weights lie at another place in memory.
        torch.testing.assert_close(given, expected, msg=repr(stitch))


def test_weights_that_accelerate_keeps_elsewhere(whole, tmp_path: Path) -> None:
    name, model = whole
    in_memory = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    on_disk = disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu"))
    for offloaded in (in_memory, on_disk):
        assert next(offloaded.parameters()).is_meta
        assert offloaded.device.type == "cpu"
        check_same(offloaded, model, name)
        check_same(offloaded, model, name)  # nothing is left behind
        assert next(offloaded.anchors.parameters()).is_meta


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_device_maps_of_whole_anchors(whole, tmp_path: Path) -> None:
    name, model = whole
    model.save_pretrained(tmp_path / "model")
    device_map = {"anchors.0": "cpu", "anchors.1": "disk", "stitching_layers": "disk"}
    placed = StitchableForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert not next(placed.anchors[0].parameters()).is_meta
    assert next(placed.anchors[1].parameters()).is_meta
    check_same(placed, model, name)


def test_a_part_of_a_checkpoint_can_be_placed_too(tmp_path: Path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path / "model")
    device_map = {"anchors.0": "disk", "anchors.1": "cpu", "stitching_layers": "cpu"}
    part = StitchableForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", stitch_id=4
    )
    check_same(part, model, "vit")


def test_an_automatic_device_map_keeps_anchors_whole(tmp_path: Path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    placed = StitchableForImageClassification.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size - 1}, offload_folder=tmp_path / "offload"
    )
    assert placed.hf_device_map == {"anchors": "cpu", "stitching_layers": "disk", "own": "disk"}
    check_same(placed, model, "vit")


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # but parameters
def test_a_device_map_that_splits_an_anchor_is_refused(tmp_path: Path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path / "model")
    parts = ("patch_embed", "cls_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "fc_norm")
    rest = {f"anchors.0.{part}": "cpu" for part in (*parts, "head_drop", "head")}
    device_map = {**rest, "anchors.0.blocks": "disk", "anchors.1": "cpu", "stitching_layers": "cpu"}
    with pytest.raises(ValueError, match=r"places 'anchors.0.patch_embed'; it can place whole anchors"):
        StitchableForImageClassification.from_pretrained(tmp_path / "model", device_map=device_map)
    split = dispatch_model(model, device_map, offload_dir=tmp_path / "offload", main_device="cpu")
    with pytest.raises(ValueError, match=r"places 'anchors.0.patch_embed'"):
        split(images("vit"))


def test_what_an_offloaded_model_can_and_cannot(tmp_path: Path) -> None:
    model = make("vit")
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    batches = [{"pixel_values": images("vit", 4), "labels": torch.arange(4)}]
    assert evaluate(offloaded, batches) == evaluate(model, batches)
    calibrate(offloaded, num_runs=1, num_warmup_runs=0, num_verified=1)
    with pytest.raises(ValueError, match=r"weights of .* are offloaded; load it alone"):
        offloaded.extract(4)
    with pytest.raises(ValueError, match="cannot be saved; save the model before"):
        offloaded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gets no new classifiers"):
        offloaded.reset_classifier(3)
    with pytest.raises(ValueError, match="get no gradients"):
        offloaded.train()(images("vit"))
    offloaded.eval()
    with pytest.raises(ValueError, match=r"stitching layer 0-1\.0 are offloaded"):
        initialize_stitches(offloaded, [images("vit", 4)], num_samples=4)


@torch.no_grad()
def test_threads_share_an_offloaded_model() -> None:
    model, x = make("vit"), images("vit")
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    expected = {stitch.id: model(x, stitch_id=stitch.id).logits for stitch in model.stitches}

    @torch.no_grad()
    def same(stitch_id: int) -> bool:
        return all(torch.equal(offloaded(x, stitch_id=stitch_id).logits, expected[stitch_id]) for _ in range(5))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(same, expected))


@pytest.mark.parametrize("name", ["vit", "resnet-vit", "tnt"])
def test_anchors_in_data_types_of_their_own(name: str) -> None:
    model, x = make(name), images(name)
    expected = {stitch.id: model(x, stitch_id=stitch.id).logits for stitch in model.stitches}
    model.anchors[0].bfloat16()
    for stitch in model.stitches:
        logits = model(x, stitch_id=stitch.id).logits
        assert logits.dtype == (torch.bfloat16 if stitch.route[-1].anchor == 0 else torch.float32)
        scale = expected[stitch.id].abs().max()
        assert (logits - expected[stitch.id]).abs().max() < 0.1 * scale, stitch
    assert torch.equal(model(x, stitch_id=1).logits, expected[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_pixel_values(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"floating-point numbers, got {dtype}; see the image processor"):
        make("vit")(torch.ones(1, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize("wrong", [[[1.0]], torch.ones(3, 32, 32), None])
def test_what_is_no_batch_of_images_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"a tensor \(N, C, H, W\), got one"):
        make("vit")(wrong)


def test_autocast_decides_about_data_types_itself() -> None:
    model, x = make("vit"), images("vit")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, stitch_id=4).logits.dtype is torch.bfloat16
