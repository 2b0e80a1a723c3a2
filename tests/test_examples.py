"""examples/cifar10_resnets: a family of your own, registered by importing a file, with weights from files."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

import stitchable
from families import randomise
from processes import run_python
from stitchable import (
    Adapter,
    Layout,
    StitchableForImageClassification,
    evaluate,
    initialize_stitches,
    register_anchor,
)
from stitchable.families import registry
from stitchable.families.registry import run_modules
from stitchable.training.plan import check_plan
from stitchable.training.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "examples" / "cifar10_resnets"
DATA = Path(__file__).parents[2] / "shared" / "data"
"""CIFAR-10 as parquet files in cifar10/, the published weights in cifar10_resnets/; only slow tests look there.

The weights are those of https://github.com/akamaster/pytorch_resnet_cifar10.
"""
LAYERS = (20, 32, 44, 56)


def load_example(name: str) -> ModuleType:
    """A file of the example as a module, once: timm warns of models that are registered twice."""
    run_modules([str(FOLDER / f"{name}.py")])
    return sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def cifar_resnet() -> ModuleType:
    load_example("register_cifar_resnet")
    return sys.modules["cifar_resnet"]


def plain(layers: int, seed: int = 0) -> nn.Module:
    return randomise(timm.create_model(f"cifar_resnet{layers}"), seed).eval()


def publish(model: nn.Module, path: Path) -> None:
    """Save as the published checkpoints are: below "state_dict", as DataParallel names them, but "linear" for "fc"."""
    weights = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "best_prec1": 91.73}, path)


@pytest.fixture
def sources(tmp_path) -> list[nn.Module]:
    """Plain ResNet-20 and 32 with random weights, published in `tmp_path`."""
    models = [plain(layers, seed=layers) for layers in LAYERS[:2]]
    for layers, model in zip(LAYERS[:2], models, strict=True):
        publish(model, tmp_path / f"resnet{layers}.th")
    return models


@pytest.fixture
def model(sources, tmp_path) -> StitchableForImageClassification:
    anchors = [
        {"architecture": f"cifar_resnet{layers}", "weights": tmp_path / f"resnet{layers}.th"} for layers in LAYERS[:2]
    ]
    return stitchable.from_anchors(anchors, stages=[0, 1, 2]).eval()


def images(number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32)


@pytest.mark.parametrize(("layers", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_the_parameters_are_those_of_the_paper(layers: int, millions: float) -> None:
    """Table 6 of He et al. (2015); layers are the convolutions and the classifier."""
    model = timm.create_model(f"cifar_resnet{layers}")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == layers


@torch.no_grad()
def test_a_block_is_the_residual_and_every_second_pixel(cifar_resnet: ModuleType) -> None:
    block = randomise(cifar_resnet.Block(4, 8, stride=2)).eval()
    x = images()[:, :1].expand(-1, 4, -1, -1) * torch.arange(1, 5).view(4, 1, 1)
    shortcut = torch.zeros(2, 8, 16, 16)
    shortcut[:, 2:6] = x[:, :, ::2, ::2]
    inner = block.bn1(block.conv1(x)).relu()
    torch.testing.assert_close(block(x), (block.bn2(block.conv2(inner)) + shortcut).relu())
    assert torch.equal(randomise(cifar_resnet.Block(4, 4, stride=1)).shortcut(x), x)


def test_the_interface_is_timms() -> None:
    model, x = plain(20), images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, model.num_features, 8, 8)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(3)
    assert (model(x).shape, model.num_classes) == ((2, 3), 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)


def test_checkpointing_changes_no_gradient() -> None:
    x, gradients = images(), []
    for enable in (False, True):
        model = plain(20).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_anchors_are_the_plain_models(model, sources) -> None:
    x = images()
    assert [anchor["pretrained"] for anchor in model.config.anchors] == ["resnet20.th", "resnet32.th"]
    for index, source in enumerate(sources):
        assert torch.equal(model(x, stitch_id=index).logits, source(x))


@torch.no_grad()
def test_a_stitch_is_the_composition_of_its_parts(model, sources) -> None:
    x = images()
    for stitch in model.stitches[2:]:
        (front, _, stop), (back, start, _) = stitch.route
        layer = model.get_stitching_layer(stitch.layers[0])
        front_blocks, back_blocks = (
            [*source.layer1, *source.layer2, *source.layer3] for source in (sources[front], sources[back])
        )
        features = sources[front].bn1(sources[front].conv1(x)).relu()
        features = nn.Sequential(*front_blocks[:stop])(features)
        features = torch.einsum("nihw,oi->nohw", features, layer.linear.weight) + layer.linear.bias.view(-1, 1, 1)
        features = nn.Sequential(*back_blocks[start:])(features)
        expected = sources[back].fc(features.mean((2, 3)))
        torch.testing.assert_close(model(x, stitch_id=stitch.id).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(model.stitches) == 2 + 12


@torch.no_grad()
def test_a_saved_model_loads_where_the_family_is_registered(model, tmp_path) -> None:
    x = images()
    initialize_stitches(model, [images(8)], num_samples=8)
    model.save_pretrained(tmp_path / "saved")
    reloaded = StitchableForImageClassification.from_pretrained(tmp_path / "saved")
    saved = model.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in reloaded.state_dict().items())
    assert reloaded.stitches == model.stitches
    for stitch in model.stitches:
        expected = model(x, stitch_id=stitch.id).logits
        torch.testing.assert_close(reloaded(x, stitch_id=stitch.id).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.extract(stitch.id)(x).logits, expected, rtol=1e-4, atol=1e-5)


AS_A_USER = """
import sys
{installed}
import torch
from transformers import AutoModelForImageClassification

folder, again = sys.argv[1:]
x, logits = torch.load(folder + "/logits.pt")
try:
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    raise AssertionError("loaded without asking")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
if sys.modules.get("stitchable"):
    stitchable.StitchableForImageClassification.from_pretrained(folder, trust_remote_code=True)
for place in (folder, again):
    model = AutoModelForImageClassification.from_pretrained(place, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x, stitch_id=3).logits, logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(again)
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    ("installed", "module"),
    [
        ("sys.modules['stitchable'] = None", "transformers_modules."),
        pytest.param("import stitchable", "stitchable.model.", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_the_family_travels_with_its_checkpoint(installed, module, model, tmp_path) -> None:
    x = images()
    model.save_pretrained(tmp_path / "saved")
    assert [anchor["class"] for anchor in model.config.anchors] == ["cifar_resnet.CifarResNet"] * 2
    torch.save((x, model(x, stitch_id=3).logits), tmp_path / "saved" / "logits.pt")
    code, modules = AS_A_USER.format(installed=installed), str(tmp_path / "modules")
    assert run_python(code, "saved", "again", cwd=tmp_path, HF_MODULES_CACHE=modules).startswith(module)


BODY = """
import torch
from timm.models import ResNet
{line}

class Mine(ResNet):
    pass
"""


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "mine.py",
            "from stitchable import Layout",
            "mine.py imports stitchable, so that checkpoints of Mine",
        ),
        ("__main__", "", "Mine is not defined in a file of its own"),
    ],
)
def test_a_file_that_cannot_travel_is_warned_of(file, line, message, tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(registry.logger, "propagate", True)
    module = own_module(file, line, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="'resnet18' is a ResNet, not a Mine"):
        register_anchor(module.Mine, Adapter(Layout.NCHW, stem=("conv1",), stages=("layer1",)), example="resnet18")
    assert message in caplog.text


def test_a_file_named_as_one_of_every_checkpoint_is_refused(tmp_path, monkeypatch) -> None:
    module = own_module("routes.py", "", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"Mine is defined in routes\.py, a name that a file of every checkpoint has"):
        register_anchor(module.Mine, Adapter(Layout.NCHW, stem=("conv1",), stages=("layer1",)), example="resnet18")


def own_module(file: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    path = folder / file
    code = BODY.format(line=line)
    if file.endswith(".py"):
        path.write_text(code, encoding="utf-8")
        module.__file__ = str(path)
    exec(compile(code, str(path), "exec"), module.__dict__)
    return module


@pytest.mark.slow
def test_the_published_errors_are_reproduced(tmp_path) -> None:
    """Top-1 in percent of the real weights on all 10,000 test images, through the stitchable model."""
    reproduce = load_example("reproduce_anchors")
    files = {layers: reproduce.find(DATA / "cifar10_resnets", f"resnet{layers}-*.th")[0] for layers in LAYERS}
    anchors = [{"architecture": f"cifar_resnet{layers}", "weights": file} for layers, file in files.items()]
    model = stitchable.from_anchors(anchors)
    test_files = [str(file) for file in reproduce.find(DATA / "cifar10", "test-*.parquet")]
    test_set = reproduce.Dataset.from_parquet(test_files, cache_dir=str(tmp_path))
    measured = evaluate(model, reproduce.batches(test_set, model.config), range(len(LAYERS)))
    percent = {layers: 100 * measured[index]["accuracy"] for index, layers in enumerate(LAYERS)}
    assert percent == pytest.approx(reproduce.PUBLISHED, abs=0.011)  # an image may tip over with another rounding


def test_the_recipe_is_valid_and_names_the_file() -> None:
    recipe = load_recipe(FOLDER / "recipe.yaml")
    assert [path.rsplit("/", 1)[-1] for path in recipe.modules] == ["register_cifar_resnet.py"]
    accelerator = Accelerator(cpu=True)
    check_plan(recipe, accelerator)
    names = [anchor.architecture for anchor in recipe.anchors]
    model = stitchable.from_anchors(names, pretrained=False, **recipe.space.model_dump())
    assert len(model.stitches) == 4 + 54
