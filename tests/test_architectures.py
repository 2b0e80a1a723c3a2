"""Every module of timm that can be stitched, by its smallest architecture and a stitched pair."""

import itertools
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import stitchable
from families import randomise
from stitchable import StitchableForImageClassification, initialize_stitches
from stitchable.costs import count_flops
from timm_modules import PAIRS, QUICK, VARIANTS

NUM_LABELS = 5


ALL = {**PAIRS, **VARIANTS}


def make(name: str) -> StitchableForImageClassification:
    pair = ALL[name]
    config = stitchable.make_config(
        [pair.small, pair.large],
        image_size=pair.image_size,
        num_labels=NUM_LABELS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return randomise(StitchableForImageClassification(config)).eval()


def images_of(model: StitchableForImageClassification, number: int) -> torch.Tensor:
    return torch.randn(number, 3, *model.config.image_size, generator=torch.Generator().manual_seed(1))


def timm_twin(model: StitchableForImageClassification, index: int) -> nn.Module:
    """Timm's own model on the anchor's weights: the same memory, for some convolutions round by its alignment."""
    entry, anchor = model.config.anchors[index], model.anchors[index]
    twin = timm.create_model(entry["architecture"], num_classes=NUM_LABELS, **entry["kwargs"])
    twin.load_state_dict(anchor.state_dict(), strict=True)
    for name, parameter in anchor.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, nn.Parameter(parameter.detach()))
    return twin.train(model.training)


def check_an_anchor_is_timm(model: StitchableForImageClassification, index: int) -> None:
    x, twin = images_of(model, 2), timm_twin(model, index)
    with torch.no_grad():
        tokens = model.config.anchors[index]["prefix_tokens"]
        if tokens:  # what features that come without get are those of the stem
            own, begun = model.chains[index].prefix_of(twin), model.chains[index].run_stem(twin, x).features
            torch.testing.assert_close(own.expand(2, -1, -1), begun[:, :tokens])
        logits = model(x, stitch_id=index).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, twin(x))
    model.train()
    twin.train()
    torch.manual_seed(3)  # some drop paths by default
    trained = model(x, stitch_id=index).logits
    trained.square().sum().backward()
    torch.manual_seed(3)
    expected = twin(x)
    expected.square().sum().backward()
    assert torch.equal(trained, expected)
    ours = dict(model.anchors[index].named_parameters())
    for name, parameter in twin.named_parameters():
        assert (parameter.grad is None) == (ours[name].grad is None), name
        assert parameter.grad is None or torch.equal(ours[name].grad, parameter.grad), name
    for name, buffer in twin.named_buffers():  # running statistics
        assert torch.equal(model.anchors[index].get_buffer(name), buffer), name
    model.zero_grad(set_to_none=True)
    model.eval()


def one_of_each_stage(model: StitchableForImageClassification) -> list:
    """The last stitch of each stage of the front anchor, by the stages that the space covers."""
    chosen: dict[int, object] = {}
    for stitch in model.stitches:
        if not stitch.is_anchor:
            (front, _, stop), _ = stitch.route
            stops = list(itertools.accumulate(model.config.anchors[front]["stages"]))
            chosen[next(stage for stage, last in enumerate(stops) if stop <= last)] = stitch
    return list(chosen.values())


def check_pair(name: str, folder: Path) -> None:
    model = make(name)
    smallest = next(i for i, a in enumerate(model.config.anchors) if a["architecture"] == ALL[name].small)
    check_an_anchor_is_timm(model, smallest)

    stitches = one_of_each_stage(model)
    assert len(stitches) >= len(model.config.space["stages"])
    layers = [model.get_stitching_layer(stitch.layers[0]) for stitch in model.stitches[2:]]
    num_samples = max(-(-(layer.source.channels + 1) // math.prod(layer.target.grid)) for layer in layers)
    residuals = initialize_stitches(model, [images_of(model, num_samples)], num_samples=num_samples)
    assert all(math.isfinite(residual) for residual in residuals.values())

    model.save_pretrained(folder)
    reloaded = StitchableForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for either in (model, reloaded):
            for index in range(2):  # some buffers are made in the first call (ConViT)
                assert torch.isfinite(either(images_of(model, 2), stitch_id=index).logits).all()
    for kind in ("named_parameters", "named_buffers"):
        for (name, saved), (_, loaded) in zip(getattr(model, kind)(), getattr(reloaded, kind)(), strict=True):
            assert torch.equal(saved, loaded), name
    x = images_of(model, 1)
    for stitch in stitches:
        extracted = model.extract(stitch.id)
        with torch.no_grad():
            logits = model(x, stitch_id=stitch.id).logits
            assert torch.isfinite(logits).all()
            assert torch.equal(extracted(x).logits, logits)
        assert sum(parameter.numel() for parameter in extracted.parameters()) == stitch.params
        assert count_flops(extracted, x) == stitch.flops
    del model, extracted
    check_an_anchor_is_timm(reloaded, smallest)


@pytest.mark.parametrize("module", QUICK)
def test_a_typical_module(module: str, tmp_path: Path) -> None:
    check_pair(module, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in QUICK])
def test_every_other_module(name: str, tmp_path: Path) -> None:
    check_pair(name, tmp_path)
