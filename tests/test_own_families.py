"""Your own families: registered in one call, checked once, then like timm's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import stitchable
from families import randomise
from processes import run_python
from stitchable import (
    Adapter,
    Layout,
    StitchableForImageClassification,
    initialize_stitches,
    register_anchor,
    register_family,
)
from stitchable.costs import count_flops
from stitchable.families import registry
from stitchable.families.registry import run_modules
from stitchable.model.operations import OWN_CODE

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_family" / "digit_mixer.py"
REGISTER = EXAMPLE.with_name("register_digit_mixer.py")
NAMES = ["digit_mixer_s", "digit_mixer_m"]


@pytest.fixture(scope="module", autouse=True)
def digit_mixer() -> None:
    run_modules([str(REGISTER)])


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_OWN", dict(registry._OWN))
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


class Net(nn.Module):
    """A stem, four blocks and a classifier, composed as a test says."""

    def __init__(
        self,
        num_classes: int = 3,
        order: tuple[int, ...] = (0, 1, 2, 3),
        shortcut: bool = False,
        scaled: bool = False,
        tied: bool = False,
        answer: str = "logits",
        rate: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.order, self.shortcut, self.scaled, self.answer = order, shortcut, scaled, answer
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.stem = nn.Conv2d(in_chans, 6, 2, stride=2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.GELU()) for _ in range(4))
        if tied:
            self.blocks[1][0].weight = self.blocks[0][0].weight
        if rate:
            self.rates = [rate.item() for rate in torch.linspace(0, rate, 4)]  # which the meta device cannot do
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = first = self.stem(x)
        for index in self.order:
            x = self.blocks[index](x + first if self.shortcut and index == 2 else x)
        logits = self.classifier(self.pool(x * self.scale if self.scaled else x))
        return logits if self.answer == "logits" else {"logits": logits}


def twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def as_mapping(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": model.stem(x)}


def scaled_stem(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.stem(x) + 0 * model.classifier.weight.sum()


def scaled(model: Net, x: torch.Tensor) -> torch.Tensor:
    return x * model.scale


def adapter(layout: Layout = Layout.NCHW, **parts) -> Adapter:
    return Adapter(
        **{"layout": layout, "stem": ("stem",), "stages": ("blocks",), "head": ("pool", "classifier"), **parts}
    )


def register(described: Adapter, **kwargs) -> None:
    register_family(Net, described, {"net_s": kwargs, "net_m": {}}, input_size=(3, 8, 8), num_classes=3)


def test_a_family_works_like_timms(tmp_path: Path) -> None:
    model = randomise(stitchable.from_anchors(NAMES, pretrained=False)).eval()
    assert (model.config.num_labels, model.config.image_size, model.config.image_mean) == (10, [8, 8], [0.5] * 3)
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for index in range(2):
        assert torch.equal(model(x, stitch_id=index).logits, model.anchors[index](x))
    residuals = initialize_stitches(model, [x], num_samples=40)
    assert max(residuals.values()) < 1
    for stitch in model.stitches:
        extracted = model.extract(stitch.id)
        assert torch.equal(extracted(x).logits, model(x, stitch_id=stitch.id).logits)
        assert count_flops(extracted, x[:1]) == stitch.flops
    model.save_pretrained(tmp_path)
    reloaded = StitchableForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(reloaded(x, stitch_id=4).logits, model(x, stitch_id=4).logits)


def test_a_checkpoint_brings_the_file_of_its_family(tmp_path: Path) -> None:
    model = stitchable.from_anchors(NAMES, pretrained=False, stitch_id=3).eval()
    model.save_pretrained(tmp_path)
    x = torch.ones(1, 3, 8, 8)
    torch.save(model(x).logits, tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["stitchable"] = None  # not installed
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(".", trust_remote_code=True)
torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)).logits, torch.load("expected.pt"))
"""
    run_python(code, cwd=tmp_path)


def test_other_code_of_the_same_names_is_not_taken_for_it(tmp_path: Path) -> None:
    stitchable.from_anchors(NAMES, pretrained=False).save_pretrained(tmp_path)
    StitchableForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    file = tmp_path / EXAMPLE.name
    file.write_text(file.read_text(encoding="utf-8").replace("nn.GELU", "nn.ReLU"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other code of digit_mixer\.DigitMixer than what is registered"):
        StitchableForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    StitchableForImageClassification.from_pretrained(tmp_path)  # what is registered here

    class DigitMixer(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"architecture 'digit_mixer_s' already, of digit_mixer\.DigitMixer"):
        register_family(DigitMixer, adapter(), {"digit_mixer_s": {}}, input_size=(3, 8, 8), num_classes=3)


def test_files_that_do_not_import_are_named(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="there is a module json already"):
        run_modules([str(tmp_path / "json.py")])
    (tmp_path / "broken_family.py").write_text("1 / 0", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run_modules([str(tmp_path / "broken_family.py")])


@torch.no_grad()
def test_your_own_modules_in_hand_are_anchors() -> None:
    modules = [randomise(registry.create_model(name, num_classes=7), seed) for seed, name in enumerate(NAMES)]
    anchors = [{"architecture": name, "module": module} for name, module in zip(NAMES, modules, strict=True)]
    model = stitchable.from_anchors(anchors).eval()
    x = torch.randn(2, 3, 8, 8)
    assert model.config.num_labels == 7
    for index, module in enumerate(modules):
        assert torch.equal(model(x, stitch_id=index).logits, module.eval()(x))
    with pytest.raises(ValueError, match="nobody knows the architecture of this Net"):
        stitchable.from_anchors([Net(), *anchors])


def test_weights_come_from_a_file_and_a_classifier_of_other_classes_is_new(tmp_path: Path) -> None:
    files = {}
    for name in NAMES:
        source = randomise(registry.create_model(name, num_classes=10))
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(source.state_dict(), files[name])
    anchors = [{"architecture": name, "weights": file} for name, file in files.items()]
    same = stitchable.from_anchors(anchors)
    assert torch.equal(same.anchors[1].classifier.weight, source.classifier.weight)
    other = stitchable.from_anchors(anchors, num_labels=4)
    assert torch.equal(other.anchors[1].stem.weight, source.stem.weight)
    assert other.anchors[1].classifier.weight.shape == (4, 32)
    anchors[0]["weights"] = files[NAMES[1]]
    with pytest.raises(ValueError, match=r"digit_mixer_s.*digit_mixer_m\.safetensors.* do not fit"):
        stitchable.from_anchors(anchors)
    with pytest.raises(ValueError, match="has no weights there; give a file"):
        stitchable.from_anchors(NAMES)


@pytest.mark.parametrize(
    ("described", "kwargs", "message"),
    [
        (adapter(), {"order": (0, 2, 1, 3)}, r"own forward block 1 \(blocks\.1\) gets something else .* block 0 ret"),
        (adapter(), {"order": (0, 1, 3)}, r"own forward block 2 \(blocks\.2\) is not run$"),
        (adapter(), {"shortcut": True}, r"own forward block 2 \(blocks\.2\) gets something else .* block 1 returns"),
        (adapter(stem=("blocks.0", "stem")), {}, "no chain: its stem cannot take"),
        (
            adapter(stem=("stem", "blocks.0")),
            {},
            r"block 0 \(blocks\.0\) gets something else .* the stem returns",
        ),
        (adapter(neck=(twice,)), {}, "its neck or head gives other logits"),
        (adapter(stages=("layers",)), {}, "names a part that this model lacks: .*layers"),
        (adapter(Layout.NHWC), {}, r"declares features NHWC, but square images give \(2, 6, 4, 4\)"),
        (adapter(Layout.NLC), {}, r"declares features NLC, but found are some of shape \(2, 6, 4, 4\)"),
        (adapter(stem=(as_mapping,)), {}, "declares features NCHW, but found are some dict"),
        (adapter(head=()), {}, "an adapter whose head ends with the name of the classifier"),
        (adapter(stem=(scaled_stem,)), {}, r"its stem needs .* name them in uses=\{'stem': \(\.\.\.\)\}"),
        (
            adapter(stem=(scaled_stem,), uses={"stem": ("stem", "scal")}),
            {},
            "names a part that this model lacks: .*scal",
        ),
        (adapter(neck=(scaled,)), {"scaled": True}, "its neck or head needs .* uses={'head'"),
        (adapter(), {"tied": True}, r"Net uses blocks\.0\.0\.weight at several places"),
        (adapter(), {"answer": "dict"}, "the forward of Net returns a dict, not logits"),
        (adapter(), {"rate": 0.1}, "'net_s' cannot be made with {'rate': 0.1}: .*meta"),
        (adapter(), {"in_chans": 1}, r"Net cannot take images \(2, 3, 8, 8\)"),
    ],
)
def test_what_is_no_chain_is_refused_at_registration(
    described: Adapter, kwargs: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(OWN_CODE, f"{Path(__file__).stem}.Net", raising=False)
    before = [dict(table) for table in (OWN_CODE, registry._OWN, registry._REGISTERED)]
    with pytest.raises(ValueError, match=message):
        register(described, **kwargs)
    assert before == [OWN_CODE, registry._OWN, registry._REGISTERED]


class TokenNet(nn.Module):
    """A class token, with positions by a name that is not timm's."""

    def __init__(self, num_classes: int = 3, img_size: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.token = nn.Parameter(torch.ones(1, 1, 6))
        self.positions = nn.Parameter(torch.ones(1, 1 + (img_size // 2) ** 2, 6))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True) for _ in range(3)))
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.positions
        return self.classifier(self.blocks(x)[:, 0])


def tokens_of(model: TokenNet, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((model.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)


def class_token_of(model: TokenNet, x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def own_token_of(model: TokenNet) -> torch.Tensor:
    return model.token + model.positions[:, :1]


@torch.no_grad()
def test_a_family_with_a_class_token_meets_a_cnn() -> None:
    parts = {
        "layout": Layout.NLC,
        "stem": ("patches", tokens_of, "positions"),
        "stages": ("blocks",),
        "head": (class_token_of, "classifier"),
        "prefix": ("token",),
    }
    sizes = {"input_size": (3, 8, 8), "num_classes": 3}
    with pytest.raises(ValueError, match="TokenNet: its stem puts other tokens first"):
        register_family(TokenNet, Adapter(**parts), {"token_net": {}}, **sizes)
    register_family(TokenNet, Adapter(**parts, own_prefix=own_token_of), {"token_net": {}}, **sizes)
    settings = {"image_size": 16, "num_labels": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = stitchable.make_config(["token_net", "digit_mixer_m"], direction="both", **settings)
    assert config.anchors[0]["kwargs"] == {"img_size": 16}
    model = randomise(StitchableForImageClassification(config)).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x, stitch_id=0).logits, model.anchors[0](x))
    into_tokens = next(stitch for stitch in model.stitches if len(stitch.route) > 1 and stitch.route[1].anchor == 0)
    mapped = model.get_stitching_layer(into_tokens.layers[0])
    (front, _, stop), (_, start, _) = into_tokens.route
    mixer, net = model.anchors[front], model.anchors[0]
    features = mapped.linear.weight @ mixer.blocks[:stop](mixer.stem(x)).flatten(2) + mapped.linear.bias[:, None]
    tokens = torch.cat((own_token_of(net).expand(2, -1, -1), features.transpose(1, 2)), dim=1)
    expected = net.classifier(net.blocks[start:](tokens)[:, 0])
    torch.testing.assert_close(model(x, stitch_id=into_tokens.id).logits, expected)
    extracted = model.extract(into_tokens.id)
    assert torch.equal(extracted(x).logits, model(x, stitch_id=into_tokens.id).logits)
    assert sum(parameter.numel() for parameter in extracted.parameters()) == into_tokens.params


def test_registration_leaves_the_state_of_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    register(adapter())
    assert torch.equal(torch.randn(3), expected)
    assert stitchable.make_config(["net_s", "net_m"]).num_labels == 3


def test_bad_registrations_are_refused() -> None:
    with pytest.raises(ValueError, match="timm has an architecture 'resnet18'"):
        register_family(Net, adapter(), {"resnet18": {}}, input_size=(3, 8, 8), num_classes=3)
    with pytest.raises(ValueError, match=r"input_size is .*, got 8"):
        register_family(Net, adapter(), {"net_s": {}}, input_size=8, num_classes=3)
    with pytest.raises(ValueError, match=r"'net_m' cannot be made with {'widht': 3}"):
        register_family(Net, adapter(), {"net_s": {}, "net_m": {"widht": 3}}, input_size=(3, 8, 8), num_classes=3)
    for parts, message in (
        ({"stages": "blocks"}, r"stages of an adapter is a tuple, got 'blocks'; write \('blocks',\)"),
        ({"layout": "NCHW"}, "a Layout, such as Layout.NCHW, got 'NCHW'"),
        ({"uses": {"neck": ("scale",)}}, "uses is of the parts .*, got 'neck'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter(**parts)
    before = dict(OWN_CODE)
    with pytest.raises(ValueError, match="'resnet18' is a ResNet, not a Unknown"):
        register_anchor(type("Unknown", (Net,), {"__module__": __name__}), adapter(), example="resnet18")
    assert before == OWN_CODE
    with pytest.raises(ValueError, match=r"no model 'digit_mixer_l'; the nearest are digit_mixer_"):
        stitchable.make_config(["digit_mixer_s", "digit_mixer_l"])


def test_importing_the_package_builds_no_model() -> None:
    program = """
from torch import nn
import timm
modules = {name for name in __import__("sys").modules if name.startswith("timm")}
built = []
construct = nn.Module.__init__
nn.Module.__init__ = lambda self, *args, **kwargs: (built.append(type(self)), construct(self, *args, **kwargs))[1]
import stitchable
assert not [kind for kind in built if kind.__module__.startswith(("timm", "stitchable"))], built
assert {name for name in __import__("sys").modules if name.startswith("timm")} == modules
"""
    run_python(program, cwd=Path.cwd())
