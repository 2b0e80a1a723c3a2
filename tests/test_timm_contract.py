"""What code written for timm's models calls: `forward_features`, `forward_head`, `reset_classifier`, ..."""

from pathlib import Path

import pytest
import torch
from torch import nn

from families import FAMILIES, images, make, randomise
from stitchable import StitchableForImageClassification, update_costs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_and_head_of_an_anchor_are_timms(name: str) -> None:
    model, x = make(name), images(name)
    for index, anchor in enumerate(model.anchors):
        features = model.forward_features(x, stitch_id=index)
        assert torch.equal(features, anchor.forward_features(x))
        assert torch.equal(model.forward_head(features, stitch_id=index), anchor(x))
        pooled = model.forward_head(features, pre_logits=True, stitch_id=index)
        assert torch.equal(pooled, anchor.forward_head(features, pre_logits=True))
        model.set_stitch(index)
        assert model.num_features == anchor.num_features


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "eva-mixed"])  # timm's own fails on mixed rotary
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_intermediates_of_an_anchor_are_timms(name: str, norm: bool) -> None:
    model, x = make(name), images(name)
    for index, anchor in enumerate(model.anchors):
        expected = anchor.forward_intermediates(x, norm=norm)
        torch.testing.assert_close(model.forward_intermediates(x, norm=norm, stitch_id=index), expected, rtol=0, atol=0)
        last = model.forward_intermediates(x, 2, norm=norm, intermediates_only=True, stitch_id=index)
        expected = anchor.forward_intermediates(x, 2, norm=norm, intermediates_only=True)
        torch.testing.assert_close(last, expected, rtol=0, atol=0)


# Along the cuts they are the same, but for the stem, which timm counts as ResNet's first (before its pooling).
@pytest.mark.parametrize(
    ("name", "timms"),
    [
        *((name, None) for name in ("vit", "vit-registers", "deit-distilled", "swin", "convnext")),
        ("resnet", [1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_intermediates_along_the_cuts_are_timms(name: str, timms: list[int] | None, norm: bool, monkeypatch) -> None:
    model, x = make(name), images(name)
    for index, anchor in enumerate(model.anchors):
        features, expected = anchor.forward_intermediates(x, indices=timms, norm=norm)
        with monkeypatch.context() as patch:
            definer = next(base for base in type(anchor).__mro__ if "forward_intermediates" in vars(base))
            patch.delattr(definer, "forward_intermediates")
            given_features, given = model.forward_intermediates(x, norm=norm, stitch_id=index)
            last_two = model.forward_intermediates(x, 2, norm=norm, intermediates_only=True, stitch_id=index)
            swapped = model.forward_intermediates(x, [-1, 0], norm=norm, intermediates_only=True, stitch_id=index)
        torch.testing.assert_close((given_features, given), (features, expected), rtol=0, atol=0)
        torch.testing.assert_close(last_two, expected[-2:], rtol=0, atol=0)
        torch.testing.assert_close(swapped, [expected[-1], expected[0]], rtol=0, atol=0)


@torch.no_grad()
def test_intermediates_in_tokens_with_their_prefix() -> None:
    model, x = make("vit-registers"), images("vit")
    anchor = model.anchors[1]
    options = {"indices": [1], "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
    (((tokens, prefix),), ((expected, expected_prefix),)) = (
        model.forward_intermediates(x, **options, stitch_id=1),
        anchor.forward_intermediates(x, **options),
    )
    assert torch.equal(tokens, expected)
    assert torch.equal(prefix, expected_prefix)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
@torch.no_grad()
def test_intermediates_of_a_stitch_are_its_hidden_states(name: str) -> None:
    model, x = make(name), images(name)
    for stitch in model.stitches[2:]:
        output = model(x, stitch_id=stitch.id, output_hidden_states=True)
        last = model.forward_intermediates(x, 1, intermediates_only=True, stitch_id=stitch.id)[0]
        hidden = output.hidden_states[-1]
        if name == "vit":
            hidden = hidden[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        assert torch.equal(last, hidden if name != "swin" else hidden.permute(0, 3, 1, 2))


@torch.no_grad()
def test_intermediates_stop_early() -> None:
    model, x = make("vit"), images("vit")
    ran = []
    model.anchors[1].blocks[2].register_forward_hook(lambda *_: ran.append(2))
    for stitch_id in (1, 4):
        _, (early,) = model.forward_intermediates(x, [0], stop_early=True, stitch_id=stitch_id)
        assert early.shape[2:] == (4, 4)
    assert not ran


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"indices": 9}, r"has (\d) intermediates, 0\.\.\d; got indices 9"),
        ({"indices": [9]}, r"got indices \[9\]"),
        ({"indices": []}, r"got indices \[\]"),
        ({"output_fmt": "NHWC"}, "must be 'NCHW' or 'NLC', got 'NHWC'"),
    ],
)
def test_intermediates_that_there_are_not(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make("vit").forward_intermediates(images("vit"), **options, stitch_id=4)


def test_a_norm_that_was_left_out_is_refused() -> None:
    small = make("vit").extract(4)
    assert len(small.forward_intermediates(images("vit"), intermediates_only=True)) == len(small.steps()) - 3
    with pytest.raises(ValueError, match="does not hold the final norm of anchor 0"):
        small.forward_intermediates(images("vit"), norm=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_new_classifiers_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = make(name), images(name)
    last = model.stitches[-1].id
    with torch.no_grad():
        features = model.forward_features(x, stitch_id=last)
        model.reset_classifier(7)
        assert torch.equal(model.forward_features(x, stitch_id=last), features)
    assert (model.config.num_labels, len(model.config.id2label)) == (7, 7)
    update_costs(model)
    randomise(model, seed=3).train().eval()  # LeViT keeps its biases in between
    logits = model(x, stitch_id=last).logits
    assert logits.shape == (2, 7)
    assert model.stitches[0].params == sum(parameter.numel() for parameter in model.extract(0).parameters())
    model.save_pretrained(tmp_path)
    loaded = StitchableForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(x, stitch_id=last).logits, logits)


def test_new_classifiers_keep_device_and_data_type() -> None:
    model = make("vit").to(torch.bfloat16)
    model.reset_classifier(3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_no_classes_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="num_classes must be"):
        make("vit").reset_classifier(wrong)


def one_anchor(model: StitchableForImageClassification) -> None:
    model.anchors[0].reset_classifier(7)


def only_the_config(model: StitchableForImageClassification) -> None:
    model.config.num_labels = 7


def by_hand(model: StitchableForImageClassification) -> None:
    model.anchors[1].head = nn.Linear(12, 7)


@pytest.mark.parametrize("change", [one_anchor, only_the_config, by_hand])
def test_classifiers_that_are_not_the_configs_are_not_saved(change, tmp_path: Path) -> None:
    model = make("vit")
    change(model)
    with pytest.raises(ValueError, match=r"the config.* model\.reset_classifier\(num"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
