"""Layers that others replace: LoRA of PEFT, quantisation of torchao, pruning; and what `extract` can take over."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import parametrizations, prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from families import images, make
from stitchable import StitchableForImageClassification
from stitchable.model.stitching import StitchingLayer

FAMILIES = ("vit", "resnet", "resnet-vit", "deit-distilled")

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@torch.no_grad()
def logits_of(model: torch.nn.Module, name: str) -> dict[int, torch.Tensor]:
    stitches = make(name).stitches
    return {stitch.id: model(pixel_values=images(name), stitch_id=stitch.id).logits for stitch in stitches}


def assert_same(given: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], rtol: float = 1e-3) -> None:
    for stitch_id, logits in expected.items():
        scale = float(logits.abs().max())
        torch.testing.assert_close(given[stitch_id], logits, rtol=0, atol=rtol * scale, msg=f"stitch {stitch_id}")


def train(model: torch.nn.Module, name: str) -> None:
    """A step on every stitch, in evaluation mode: running statistics are no part of an adapter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for stitch in make(name).stitches:
        optimizer.zero_grad()
        model(pixel_values=images(name), labels=torch.tensor([0, 1]), stitch_id=stitch.id).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def stitching_layers(model: torch.nn.Module) -> Iterator[StitchingLayer]:
    return (module for module in model.modules() if isinstance(module, StitchingLayer))


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_on_all_linear_layers_trains_saves_loads_and_merges(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "base")
    before = logits_of(model, name)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, lora_alpha=4)).eval()
    assert all(hasattr(layer.linear, "lora_A") for layer in stitching_layers(tuned))
    train(tuned, name)
    after = logits_of(tuned, name)
    assert all(not torch.allclose(before[stitch_id], after[stitch_id]) for stitch_id in before)

    with pytest.raises(ValueError, match=r"cannot be taken over exactly.*[Mm]erge the adapters first"):
        model.extract(2)
    with pytest.raises(ValueError, match=r"could not be loaded again\. Merge the adapters first"):
        model.save_pretrained(tmp_path / "broken")

    tuned.save_pretrained(tmp_path / "adapter")
    base = StitchableForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(logits_of(loaded, name), after)

    merged = tuned.merge_and_unload()
    assert_same(logits_of(merged, name), after)
    last = merged.stitches[-1].id
    assert_same({last: merged.extract(last).eval()(images(name)).logits}, {last: logits_of(merged, name)[last]})
    merged.save_pretrained(tmp_path / "merged")
    again = StitchableForImageClassification.from_pretrained(tmp_path / "merged")
    assert_same(logits_of(again, name), logits_of(merged, name), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_weights_of_torchao(name: str) -> None:
    model = make(name)
    before = logits_of(model, name)
    quantize_(model, Int8WeightOnlyConfig())
    assert all(type(layer.linear.weight) is not torch.nn.Parameter for layer in stitching_layers(model))
    after = logits_of(model, name)
    assert any(not torch.equal(before[stitch_id], after[stitch_id]) for stitch_id in before)
    assert_same(after, before, rtol=0.1)
    last = model.stitches[-1].id
    assert_same({last: model.extract(last).eval()(images(name)).logits}, {last: after[last]}, rtol=1e-6)


def dynamically_quantised(model: torch.nn.Module) -> torch.nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)


def pruned(model: torch.nn.Module) -> torch.nn.Module:
    prune.l1_unstructured(model.anchors[1].blocks[2].mlp.fc1, "weight", amount=0.5)
    return model


def normalised(model: torch.nn.Module) -> torch.nn.Module:
    parametrizations.weight_norm(model.get_stitching_layer("0-1.0").linear)
    return model


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams")
@pytest.mark.parametrize("change", [dynamically_quantised, pruned, normalised])
def test_what_cannot_be_taken_over_is_refused(change, tmp_path: Path) -> None:
    model = change(copy.deepcopy(make("vit")))
    assert model(images("vit"), stitch_id=4).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"cannot be taken over exactly: the config has .* there, the model"):
        model.extract(4)
    with pytest.raises(ValueError, match="could not be loaded again"):
        model.save_pretrained(tmp_path)


def test_permanent_pruning_is_taken_over(tmp_path: Path) -> None:
    model = pruned(make("vit"))
    expected = logits_of(model, "vit")
    prune.remove(model.anchors[1].blocks[2].mlp.fc1, "weight")
    assert_same({4: model.extract(4).eval()(images("vit")).logits}, {4: expected[4]}, rtol=1e-6)
    model.save_pretrained(tmp_path)
    assert_same(logits_of(StitchableForImageClassification.from_pretrained(tmp_path), "vit"), expected, rtol=1e-6)


def test_classifiers_and_blocks_of_other_shapes_are_not_taken_over() -> None:
    model = make("vit")
    model.anchors[0].reset_classifier(9)
    with pytest.raises(
        ValueError,
        match=r"anchors\.0\.head cannot .* 'weight': \(5, 8\), .* 'weight': \(9, 8\), .* model\.reset_classifier",
    ):
        model.extract(0)
    model = make("vit")
    model.anchors[1].blocks[2].mlp.fc1 = torch.nn.Linear(12, 7)
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc1 .* \(48, 12\), .* \(7, 12\), "):
        model.extract(1)
    model.anchors[1].blocks[2].mlp.fc1 = torch.nn.Sequential()
    with pytest.raises(ValueError, match=r"'Linear', .* there, the model \{'class': 'Sequential'\}"):
        model.extract(1)


def test_a_block_that_was_compiled_alone_is_taken_over() -> None:
    model = make("vit")
    expected = model(images("vit"), stitch_id=4).logits
    model.anchors[1].blocks[2] = torch.compile(model.anchors[1].blocks[2], backend="eager")
    assert torch.equal(model.extract(4).eval()(images("vit")).logits, expected)


def test_synchronised_batch_norms_are_taken_over_as_plain_ones() -> None:
    model = make("resnet")
    expected = logits_of(model, "resnet")[2]
    extracted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).extract(2).eval()
    assert torch.equal(extracted(images("resnet")).logits, expected)
