"""What a config.json may say."""

import copy

import pytest

from families import make
from stitchable import StitchableConfig, StitchableForImageClassification


@pytest.fixture(scope="module")
def valid() -> dict:
    return make("vit").config.to_dict()


def test_an_empty_config_is_only_a_default(valid: dict) -> None:
    assert StitchableConfig().stitches == []
    with pytest.raises(ValueError, match="no anchors"):
        StitchableForImageClassification(StitchableConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stitches"][2]["route"].__setitem__(0, [0, 1, 3]), "gap"),
        (lambda c: c["stitches"][2]["route"].__setitem__(1, [1, 0, 9]), "out of range"),
        (lambda c: c["stitches"][2].update(layers=["0-1"]), "unknown stitching layer"),
        (lambda c: c["stitches"][2].update(layers=[]), "need 1 stitching layers"),
        (lambda c: c["stitches"][2].update(speed=3), "speed"),
        (lambda c: c.update(stitch_id=77), "stitch_id 77 is out of range"),
        (lambda c: c.update(stitch_id="a"), "must be an integer"),
        (lambda c: c.update(stitches=[]), "no stitch"),
        (lambda c: c["anchors"][0].update(depth=4), r"anchors\[0\]\.depth must be the sum of its stages, 3, got 4"),
        (lambda c: c["anchors"][0].pop("cuts"), r"lacks \['cuts'\]"),
        (lambda c: c["anchors"][0].pop("architecture"), r"lacks \['architecture'\]"),
        (
            lambda c: c["anchors"][0].update(layout="XYZ"),
            "layout must be one of 'NCHW', 'NHWC', 'NLC', 'UNITS', got 'XYZ'",
        ),
        (
            lambda c: c["anchors"][0]["cuts"].__setitem__(0, [8, 4]),
            r"anchors\[0\]\.cuts\[0\] must be a list of 3: channels, height, width",
        ),
        (lambda c: c["anchors"][0].pop("chain"), r"lacks \['chain'\]"),
        (lambda c: c["anchors"][0].update(chain=3), r"anchors\[0\]\.chain must be a mapping of stem, blocks, neck"),
        (lambda c: c["anchors"][0]["chain"].update(wings=[]), r"anchors\[0\]\.chain has no 'wings'; there are stem"),
        (lambda c: c["anchors"][0]["chain"].update(stem=[3]), r"anchors\[0\]\.chain\.stem\[0\] must be text, got 3"),
        (
            lambda c: c["anchors"][0]["chain"].update(context="os.system"),
            r"anchors\[0\]\.chain: context must be 'function:NAME', got 'os.system'",
        ),
        (
            lambda c: c["anchors"][0]["chain"].update(parts={"tail": ["x"]}),
            r"anchors\[0\]\.chain: the parts are stem, prefix, context, head, got tail",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_at_construction(valid: dict, change, message: str) -> None:
    config = copy.deepcopy(valid)
    change(config)
    with pytest.raises(ValueError, match=message):
        StitchableConfig(**config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["anchors"][0]["chain"]["blocks"].pop(),
            r"anchors\[0\]: its chain has 2 blocks, its stages have 3",
        ),
        (lambda c: c["anchors"][0]["chain"].update(neck=["norms"]), "names a part that this model lacks: .*norms"),
        (lambda c: c["anchors"][0]["chain"].update(call="function:no"), "a function 'no' that is not in operations.py"),
        (lambda c: c["anchors"][1]["cuts"].__setitem__(1, [12, 2, 2]), "equal grids"),
        (lambda c: c["anchors"][1]["cuts"].__setitem__(1, [16, 4, 4]), "joins other cuts elsewhere"),
        (lambda c: c["anchors"][1].update(architecture="vit_none"), "timm .* has no model"),
    ],
)
def test_a_config_that_does_not_fit_its_timm_models_is_refused_by_the_model(valid: dict, change, message: str) -> None:
    config = copy.deepcopy(valid)
    change(config)
    with pytest.raises(ValueError, match=message):
        StitchableForImageClassification(StitchableConfig(**config))


def test_a_newer_checkpoint_warns(valid: dict) -> None:
    with pytest.warns(UserWarning, match=r"written by stitchable 99\.1\.0"):
        StitchableConfig(**{**valid, "stitchable_version": "99.1.0"})


def test_a_checkpoint_names_all_three_auto_classes(valid: dict) -> None:
    assert set(valid["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
