"""`stitchable.make_config`: any order, agreement, defaults, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import stitchable
from families import FAMILIES, make, randomise
from stitchable import StitchableConfig, StitchableForImageClassification
from stitchable.anchors import _architecture_of

DEIT = ["deit_base_patch16_224", "deit_tiny_patch16_224", "deit_small_patch16_224"]


def vit(**kwargs: object) -> dict:
    return {"architecture": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "embed_dim": 12, "num_heads": 2, **kwargs}}


def test_anchors_in_any_order_are_sorted_by_flops() -> None:
    config = stitchable.make_config(DEIT)
    assert [anchor["architecture"] for anchor in config.anchors] == [DEIT[1], DEIT[2], DEIT[0]]
    assert [anchor["depth"] for anchor in config.anchors] == [12, 12, 12]
    assert (config.num_labels, config.image_size, config.stitch_id) == (1000, [224, 224], 2)
    assert config.id2label[207].startswith("golden retriever")
    assert config.space == {
        "kernel_size": 2,
        "stride": 1,
        "stages": [0],
        "direction": "fast_to_slow",
        "nearest": True,
        "pairs": "all",
    }


def test_kwargs_reach_timm_and_travel_in_the_config(tmp_path) -> None:
    config = make("swin").config
    config.save_pretrained(tmp_path)
    again = StitchableConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.anchors[1]["kwargs"] == FAMILIES["swin"].large[1]


def test_an_image_size_reaches_architectures_that_fix_it() -> None:
    config = stitchable.make_config([vit(), vit(embed_dim=16)], image_size=64, num_labels=3)
    assert config.anchors[0]["kwargs"]["img_size"] == 64
    assert config.anchors[0]["cuts"][0] == [12, 4, 4]


@pytest.mark.parametrize(
    ("anchors", "settings", "message"),
    [
        (["deit_tini_patch16_224", DEIT[0]], {}, "deit_tiny_patch16_224"),
        (["selecsls42", "vgg13"], {}, "class SelecSls cannot be stitched: its blocks pass on a skip connection"),
        (
            ["mobilenetv5_base", "vgg13"],
            {},
            "this MobileNetV5 cannot be stitched: its head takes the features of several",
        ),
        (DEIT[:1], {}, "at least two anchors, got 1"),
        (DEIT[0], {}, "at least two anchors, got 1"),
        ([DEIT[0], "deit_base_patch16_384"], {}, r"differ in image_size.*\(384, 384\)"),
        ([DEIT[0], "vit_small_patch16_224"], {}, "differ in image_mean"),
        ([vit(), vit(in_chans=1)], {}, "differ in in_chans"),
        ([vit(num_classes=7), vit()], {}, "cannot hold .*num_classes.*num_labels"),
        ([{"name": "resnet18"}, "resnet50"], {}, "a timm name, a module, or"),
        ([{"architecture": "resnet18", "weight": "a.pth"}, "resnet50"], {}, "a timm name, a module, or .*'weights'"),
        (["resnet18", "resnet50"], {"stages": [9]}, "distinct numbers"),
        ([vit(), vit(embed_dim=16)], {"pairs": "forward", "kernel_size": 1}, "no stitch"),
        ([vit(img_size=32), vit(img_size=32)], {"image_size": 64}, "cannot take images of 3x64x64"),
        ([3, "resnet18"], {}, "'-' and '.', got 3"),
        (vit(), {}, "at least two anchors, got 1"),
        ([vit(), vit(width=3)], {}, "'vit_tiny_patch16_224' cannot be made with .*width"),
        ([vit(), vit(num_heads=5)], {}, "cannot be made"),
        (["resnet18.no_such_tag", "resnet50"], {}, "cannot be made|has no model"),
        (["resnet18", "resnet50"], {"kernel_sise": 3}, "no setting 'kernel_sise', did you mean 'kernel_size'"),
        (["resnet18", "resnet50"], {"stages": 1}, "stages must be a list"),
        (["resnet18", "resnet50"], {"image_size": "224"}, "image_size must be pixels"),
        (["resnet18", "resnet50"], {"image_size": -32}, "image_size must be pixels"),
        (["resnet18", "resnet50"], {"num_labels": 0}, "positive number of classes, got 0"),
        (["resnet18", "resnet50"], {"num_labels": "10"}, "positive number of classes, got '10'"),
        (["resnet18", "resnet50"], {"num_labels": 10, "id2label": {0: "a"}}, "id2label names 1 classes"),
    ],
)
def test_what_cannot_be_stitched_is_refused(anchors: list, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stitchable.make_config(anchors, **settings)


def test_anchors_with_other_classes_need_num_labels() -> None:
    anchors = ["swin_tiny_patch4_window7_224.ms_in22k", "swin_tiny_patch4_window7_224.ms_in1k"]
    with pytest.raises(ValueError, match="differ in num_labels"):
        stitchable.make_config(anchors)
    assert stitchable.make_config(anchors, num_labels=7).num_labels == 7


@pytest.mark.parametrize("num_labels", [4, 9])
def test_pretrained_weights_are_timms(num_labels: int, tmp_path) -> None:
    """Timm's own loading code, on a folder instead of the Hub; the config has what timm finds there, and not where."""
    family, sources = [], []
    for width in (8, 12):
        kwargs = {"channels": [width] * 4}
        source = randomise(timm.create_model("resnet18", num_classes=4, **kwargs), seed=width)
        timm.models.save_for_hf(source, tmp_path / f"of-{width}", model_args=kwargs)
        family.append(f"local-dir:{tmp_path / f'of-{width}'}")
        sources.append(source.eval())
    model = stitchable.from_anchors(family, pretrained=True, num_labels=num_labels, image_size=32, stages=[0, 1]).eval()
    x = torch.randn(2, 3, 32, 32)
    for index, source in enumerate(sources):
        assert torch.equal(model.anchors[index].forward_features(x), source.forward_features(x))
        assert torch.equal(model(x, stitch_id=index).logits, source(x)) == (num_labels == 4)
    assert [anchor["architecture"] for anchor in model.config.anchors] == ["resnet18", "resnet18"]
    assert [anchor["kwargs"]["channels"] for anchor in model.config.anchors] == [[8] * 4, [12] * 4]
    assert [anchor["pretrained"] for anchor in model.config.anchors] == ["of-8", "of-12"]
    assert str(tmp_path) not in model.config.to_json_string()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "of-8")
    loaded = StitchableForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(x, stitch_id=0).logits, model(x, stitch_id=0).logits)


WIDTHS = {"channels": [8] * 4}


def save_resnet(path: Path, num_classes: int = 4, seed: int = 0, name: str = "resnet18", **kwargs: object) -> nn.Module:
    """A tiny ResNet with random weights, which are also in the file: bare, or below "state_dict" as after training."""
    model = randomise(timm.create_model(name, num_classes=num_classes, **{**WIDTHS, **kwargs}), seed).eval()
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": wrapped}, path)
    return model


def resnet(weights: object, **kwargs: object) -> dict:
    return {"architecture": "resnet18", "kwargs": {**WIDTHS, **kwargs}, "weights": weights}


def from_files(*anchors: dict, **settings: object) -> StitchableForImageClassification:
    return stitchable.from_anchors(anchors, image_size=32, **settings).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".th"])
@torch.no_grad()
def test_weights_from_a_file_are_what_timm_loads_from_it(suffix: str, tmp_path) -> None:
    small, large = (tmp_path / f"{name}{suffix}" for name in ("small", "large"))
    sources = [save_resnet(small, seed=1), save_resnet(large, seed=2, channels=[12] * 4)]
    model = from_files(resnet(str(large), channels=[12] * 4), resnet(small))
    assert model.config.num_labels == 4  # of the files, though timm's resnet18 has 1000
    # Where it came from is noted, without folders of this machine, and nothing else of it is in the config.
    assert [anchor["pretrained"] for anchor in model.config.anchors] == [small.name, large.name]
    assert str(tmp_path) not in model.config.to_json_string()
    x = torch.randn(2, 3, 32, 32)
    for index, (source, path) in enumerate(zip(sources, (small, large), strict=True)):
        twin = timm.create_model(
            "resnet18",
            pretrained=True,
            num_classes=4,
            pretrained_cfg_overlay={"file": str(path), "num_classes": 4},
            **model.config.anchors[index]["kwargs"],
        ).eval()
        for key, value in twin.state_dict().items():
            assert torch.equal(model.anchors[index].state_dict()[key], value), key
        assert torch.equal(model(x, stitch_id=index).logits, source(x))


@torch.no_grad()
def test_weights_with_other_classes_get_new_classifiers(tmp_path) -> None:
    sources = [save_resnet(tmp_path / "a.pth", seed=1), save_resnet(tmp_path / "b.pth", seed=2, channels=[12] * 4)]
    model = from_files(resnet(tmp_path / "a.pth"), resnet(tmp_path / "b.pth", channels=[12] * 4), num_labels=7)
    x = torch.randn(2, 3, 32, 32)
    for index, source in enumerate(sources):
        assert torch.equal(model.anchors[index].forward_features(x), source.forward_features(x))
        assert model(x, stitch_id=index).logits.shape == (2, 7)


@torch.no_grad()
def test_anchors_alike_but_for_their_weights_keep_their_order(tmp_path) -> None:
    """Equal architecture, kwargs, FLOPs and file name: two runs of one training, say."""
    paths = [tmp_path / run / "model.pth" for run in ("b", "a")]
    for path in paths:
        path.parent.mkdir()
    sources = [save_resnet(path, seed=seed) for seed, path in enumerate(paths)]
    model = from_files(*(resnet(path) for path in paths))
    x = torch.randn(2, 3, 32, 32)
    for index, source in enumerate(sources):
        assert torch.equal(model(x, stitch_id=index).logits, source(x))


@torch.no_grad()
def test_weights_come_before_all_that_timm_knows(tmp_path) -> None:
    """Also before those of a timm folder."""
    folder = tmp_path / "folder"
    timm.models.save_for_hf(save_resnet(tmp_path / "a.pth", seed=1), folder, model_args=WIDTHS)
    source = save_resnet(tmp_path / "c.pth", seed=3)
    anchors = [{"architecture": f"local-dir:{folder}", "weights": tmp_path / "c.pth"}, resnet(tmp_path / "c.pth")]
    model = from_files(*anchors)
    x = torch.randn(2, 3, 32, 32)
    for index in range(2):
        assert torch.equal(model(x, stitch_id=index).logits, source(x))


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    good, broken = tmp_path / "good.pth", tmp_path / "broken.pth"
    save_resnet(good)
    broken.write_bytes(b"no checkpoint")
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")  # weights_only refuses to run what a file brings
    for name in ("broken.pth", "broken.safetensors", "list.pth", "module.pth"):
        with pytest.raises(ValueError, match=f"anchor 'resnet18': the weights .*{name}' cannot be read"):
            from_files(resnet(good), resnet(tmp_path / name))
    save_resnet(tmp_path / "wider.pth", channels=[12] * 4)
    save_resnet(tmp_path / "deeper.pth", name="resnet34")
    for name in ("wider.pth", "deeper.pth"):
        for num_labels in (4, 7):  # also where the classifier is not taken
            with pytest.raises(ValueError, match=f"anchor 'resnet18': the weights .*{name}' do not fit: RuntimeError"):
                from_files(resnet(good), resnet(tmp_path / name), num_labels=num_labels)
    for absent in (tmp_path / "absent.pth", tmp_path, "", 3):
        with pytest.raises(ValueError, match="anchor 'resnet18': weights must be a checkpoint file, there is none at"):
            from_files(resnet(good), resnet(absent))


def test_weights_need_pretrained(tmp_path) -> None:
    save_resnet(tmp_path / "a.pth")
    for make_it in (from_files, lambda *anchors, **settings: stitchable.make_config(anchors, **settings)):
        with pytest.raises(ValueError, match=r"anchor 'resnet18' has weights=.*pretrained=False"):
            make_it(resnet(tmp_path / "a.pth"), resnet(None), pretrained=False)
    assert from_files(resnet(None), resnet(None, channels=[12] * 4), pretrained=False, num_labels=2)


def in_hand(width: int, num_classes: int = 4, name: str = "resnet18") -> dict:
    """A module with random weights, and what makes it."""
    kwargs = {"channels": [width] * 4}
    module = randomise(timm.create_model(name, num_classes=num_classes, **kwargs), seed=width).eval()
    return {"architecture": name, "kwargs": kwargs, "module": module}


@torch.no_grad()
def test_modules_in_hand_are_copied(tmp_path) -> None:
    small, large = in_hand(8), in_hand(12)
    del small["architecture"]  # timm's modules know theirs
    model = from_files(large, small)
    x = torch.randn(2, 3, 32, 32)
    expected = [anchor["module"](x) for anchor in (small, large)]
    for index, logits in enumerate(expected):
        assert torch.equal(model(x, stitch_id=index).logits, logits)
    assert model.config.num_labels == 4
    # They may be anything by now, so no place is named where their weights come from.
    assert [anchor["pretrained"] for anchor in model.config.anchors] == [None, None]
    model.anchors[0].conv1.weight.zero_()
    assert torch.equal(small["module"](x), expected[0])
    model = from_files(small, large)
    model.save_pretrained(tmp_path)
    assert torch.equal(StitchableForImageClassification.from_pretrained(tmp_path)(x, stitch_id=1).logits, expected[1])


@torch.no_grad()
def test_modules_without_further_arguments_stand_for_themselves() -> None:
    modules = [randomise(timm.create_model(name)).eval() for name in ("test_vit2", "test_vit")]
    model = stitchable.from_anchors(modules)
    x = torch.randn(2, 3, 160, 160)
    for index, module in enumerate((modules[1], modules[0])):
        assert torch.equal(model.eval()(x, stitch_id=index).logits, module(x))
    assert [anchor["architecture"] for anchor in model.config.anchors] == ["test_vit", "test_vit2"]


@torch.no_grad()
def test_modules_of_other_classes_get_new_classifiers() -> None:
    small, large = in_hand(8), in_hand(12, num_classes=6)
    with pytest.raises(ValueError, match="differ in num_labels: resnet18 4, resnet18 6"):
        from_files(small, large)
    model = from_files(small, large, num_labels=6)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.anchors[0].forward_features(x), small["module"].forward_features(x))
    assert torch.equal(model(x, stitch_id=1).logits, large["module"](x))
    assert model(x, stitch_id=0).logits.shape == (2, 6)


def test_a_module_knows_which_of_timms_weights_it_has() -> None:
    modules = [timm.create_model("vit_base_patch16_224.mae", depth=2), timm.create_model("vit_base_patch16_224")]
    assert [_architecture_of(module) for module in modules] == ["vit_base_patch16_224.mae", "vit_base_patch16_224"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": nn.Linear(2, 2)}, "nobody knows the architecture of this Linear"),
        ({"module": nn.Linear(2, 2), "architecture": "resnet18"}, "is no 'resnet18' with kwargs .*conv1.weight has no"),
        ({"module": in_hand(8)["module"]}, r"conv1.weight has the shape \(8, 64, .*\) in the module, the shape \(64,"),
        ({**in_hand(8), "kwargs": {"channels": [12] * 4}}, r"is no 'resnet18' with kwargs .*give what"),
        ({**in_hand(8), "weights": "a.pth"}, "'weights' or 'module'"),
        ({**in_hand(8), "module": "a.pth"}, "the module of an anchor is a torch.nn.Module, got str"),
    ],
)
def test_modules_that_are_something_else_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_files(in_hand(12), change)
    with pytest.raises(ValueError, match=message):
        stitchable.make_config([in_hand(12), change], pretrained=True, image_size=32)


def test_modules_need_pretrained() -> None:
    with pytest.raises(ValueError, match="anchor 'resnet18' has a module with weights, but pretrained=False"):
        from_files(in_hand(8), in_hand(12), pretrained=False)
