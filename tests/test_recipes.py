"""Every recipe and every command of training/recipes/README.md: parsed, built, and stepped; and what is refused."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

import stitchable.building
from families import randomise
from stitchable import StitchableForImageClassification
from stitchable.model.routes import find_stitch
from stitchable.training.augmentation import make_mixup
from stitchable.training.books import Books, Checkpoints
from stitchable.training.fit import Phase, fit
from stitchable.training.losses import StitchLoss, load_teacher
from stitchable.training.plan import check_plan, make_model
from stitchable.training.processes import RunStopped
from stitchable.training.recipe import Data, Recipe, Schedule, load_recipe, recipes
from stitchable.training.sampling import StitchSampler

FOLDER = Path(__file__).parents[1] / "training" / "recipes"
DIGITS = FOLDER / "digits.yaml"
DEIT = FOLDER / "deit_ti_s_b.yaml"
RECIPES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
LABELS = [f"class {number}" for number in range(10)]


def commands() -> list[list[str]]:
    """The command lines in the code blocks of the README, split into words."""
    blocks = re.findall(
        r"^```\n(.*?)^```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def load(words: list[str]) -> Recipe:
    """The recipe that a command line runs."""
    place = words.index("--recipe")
    overrides = [word for word in words[place + 2 :] if "=" in word]
    return load_recipe(FOLDER.parents[1] / words[place + 1], overrides)


COMMANDS = {" ".join(words): words for words in commands()}


@pytest.fixture(scope="module")
def _profiled_once() -> Iterator[None]:
    """Profile an architecture once for all the commands that share it."""
    profiles: dict[str, object] = {}
    profile = stitchable.building.profile_architecture

    def remember(*arguments: object) -> object:
        if repr(arguments) not in profiles:
            profiles[repr(arguments)] = profile(*arguments)  # type: ignore[arg-type]
        return profiles[repr(arguments)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitchable.building, "profile_architecture", remember)
        yield


def test_the_recipes_are_all_there() -> None:
    assert set(RECIPES) >= {
        "digits.yaml",
        "cifar10.yaml",
        "deit_ti_s_b.yaml",
        "swin_ti_s_b.yaml",
        "resnet18_50.yaml",
        "resnet18_swin_ti.yaml",
        "levit_192_256.yaml",
        "ablations/sandwich.yaml",
        "ablations/single_stitch.yaml",
        "ablations/layer_drop.yaml",
    }
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"| `{name}` |" not in text] == []
    outputs = [load_recipe(FOLDER / name).output for name in RECIPES]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.usefixtures("_profiled_once")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs_as_far_as_its_plan(command: str) -> None:
    words = COMMANDS[command]
    assert (FOLDER.parents[1] / next(word for word in words if word.endswith(".py"))).is_file()
    check_plan(load(words), Accelerator())


def test_commands_of_the_readme_write_to_folders_of_their_own() -> None:
    trained = [load(words) for words in COMMANDS.values() if words[0] == "accelerate"]
    # The first two lines of the README change the data, or nothing, of recipes whose full commands come later.
    outputs = [recipe.output for recipe in trained]
    assert {name for name in outputs if outputs.count(name) > 1} == {"runs/deit_ti_s_b"}


@pytest.mark.usefixtures("_profiled_once")
@pytest.mark.parametrize(
    ("name", "overrides", "number"),
    [
        ("digits.yaml", [], 35),
        ("cifar10.yaml", [], 41),
        ("deit_ti_s_b.yaml", [], 71),
        ("swin_ti_s_b.yaml", [], 41),
        ("resnet18_50.yaml", [], 10),
        ("resnet18_swin_ti.yaml", [], 8),
        ("levit_192_256.yaml", [], 8),
        ("ablations/sandwich.yaml", [], 71),
        ("ablations/single_stitch.yaml", [], 71),
        ("ablations/layer_drop.yaml", [], 71),
        ("deit_ti_s_b.yaml", ["space.kernel_size=2", "space.stride=2"], 51),
        ("deit_ti_s_b.yaml", ["space.kernel_size=3", "space.stride=3"], 75),
        ("deit_ti_s_b.yaml", ["space.kernel_size=4", "space.stride=4"], 99),
        ("deit_ti_s_b.yaml", ["space.direction=slow_to_fast"], 71),
        ("deit_ti_s_b.yaml", ["space.nearest=false"], 732),
    ],
)
def test_a_recipe_is_built_on_the_meta_device(name: str, overrides: list[str], number: int) -> None:
    recipe = load_recipe(FOLDER / name, ["pretrained=false", *overrides])
    with torch.device("meta"):
        model = make_model(recipe, LABELS)
    assert len(model.stitches) == number
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stitch_id", "blocks"), [(28, [9, 3]), (19, [6, 6]), (10, [3, 9]), (62, [9, 3]), (53, [6, 6]), (44, [3, 9])]
)
def test_the_readme_names_the_stitches_of_table_1(stitch_id: int, blocks: list[int]) -> None:
    """Rows of table 1 join after as many blocks of the front as are left out of the back."""
    recipe = load_recipe(DEIT, ["pretrained=false", "data.image_size=32"])
    with torch.device("meta"):
        stitch = find_stitch(make_model(recipe, LABELS).stitches, stitch_id)
    assert [segment.stop - segment.start for segment in stitch.route] == blocks
    assert [segment.anchor for segment in stitch.route] == ([0, 1] if stitch_id < 37 else [1, 2])
    assert any(f"sampling.stitches=[{stitch_id}]" in command for command in COMMANDS) or stitch_id == 28


def test_the_papers_values_are_in_its_recipes() -> None:
    """Section 4 of the paper, "implementation details"."""
    for name in ("deit_ti_s_b", "swin_ti_s_b", "resnet18_50", "resnet18_swin_ti", "levit_192_256"):
        recipe = load_recipe(FOLDER / f"{name}.yaml")
        training = recipe.training
        is_resnet = name.startswith("resnet")
        assert training.batch_size == 1024
        assert training.learning_rate == (0.05 if is_resnet else 1e-4)
        assert training.epochs == (30 if is_resnet else 100 if name.startswith("levit") else 50)
        assert training.anchor_learning_rate_scale == (1.0 if name.startswith("deit") else 0.1)
        assert (recipe.initialization.method, recipe.initialization.num_samples) == ("least_squares", 100)
        assert recipe.sampling.method == "uniform"
        assert recipe.distillation
        assert recipe.distillation.teacher
        assert recipe.distillation.teacher.startswith("regnety_160")
        assert (recipe.space.kernel_size, recipe.space.stride, recipe.space.nearest) == (2, 1, True)


# Two steps of each recipe, with its depths, optimiser, schedule, mixing and loss, but smaller images and batches, and
# narrower anchors: the full ones, built on the meta device above, have up to 166 million parameters.

NARROW = {
    "deit_tiny": {"embed_dim": 12, "num_heads": 3},
    "deit_small": {"embed_dim": 24, "num_heads": 6},
    "deit_base": {"embed_dim": 36, "num_heads": 6},
    "swin_tiny": {"embed_dim": 12, "num_heads": [1, 2, 4, 8]},
    "swin_small": {"embed_dim": 12, "num_heads": [1, 2, 4, 8]},
    "swin_base": {"embed_dim": 16, "num_heads": [1, 2, 4, 8]},
    "resnet18": {"channels": [4, 8, 12, 16]},
    "resnet50": {"channels": [4, 8, 12, 16]},
    "levit_192": {"embed_dim": [12, 24, 36], "key_dim": 4, "num_heads": [3, 5, 6]},
    "levit_256": {"embed_dim": [16, 32, 48], "key_dim": 4, "num_heads": [4, 6, 8]},
}
IMAGE_SIZE = {"deit": 32, "swin": 64, "resn": 64, "levi": 128}  # large enough that no window or grid has a single place


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A folder with an image classifier of ten classes."""
    folder = tmp_path_factory.mktemp("teacher")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=len(LABELS))
    ResNetForImageClassification(config).save_pretrained(folder)
    BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return str(folder)


def reduced(name: str, teacher: str) -> Recipe:
    """A recipe that is stepped in a second: narrow anchors without weights, small images, a batch of four."""
    recipe = load_recipe(FOLDER / name)
    overrides = ["pretrained=false", "training.batch_size=4"]
    if recipe.data.dataset.startswith("ILSVRC"):
        kinds = [anchor.architecture for anchor in recipe.anchors]
        overrides += [f"data.image_size={max(IMAGE_SIZE[kind[:4]] for kind in kinds)}"]
        for number, kind in enumerate(kinds):
            (narrow,) = [kwargs for prefix, kwargs in NARROW.items() if kind.startswith(prefix)]
            overrides += [f"anchors.{number}.kwargs.{key}={value}" for key, value in narrow.items()]
    if recipe.distillation and recipe.distillation.teacher:
        overrides += [f"distillation.teacher={teacher}"]
    return load_recipe(FOLDER / name, overrides)


def parameters_of(model: StitchableForImageClassification, stitch_ids: set[int]) -> set[str]:
    """Names of the parameters that stitches use, by their routes."""
    parts: set[tuple[str, str | int]] = set()
    for stitch in (find_stitch(model.stitches, stitch_id) for stitch_id in stitch_ids):
        parts |= {
            *(("anchors." + str(stitch.route[0].anchor), part) for part in ("stem", "prefix")),
            ("anchors." + str(stitch.route[-1].anchor), "head"),
        }
        parts |= {(f"anchors.{anchor}", block) for anchor, start, stop in stitch.route for block in range(start, stop)}
        parts |= {("stitching_layers", layer) for layer in stitch.layers}
    names = set()
    for name, _ in model.named_parameters():
        role, number, rest = name.split(".", 2)
        if role == "anchors":
            part = (f"anchors.{number}", model.chains[int(number)].part_of(rest))
        else:
            part = (role, f"{number}.{rest.split('.')[0]}")
        if part in parts:
            names.add(name)
    return names


class RandomImages:
    """In place of a `TrainingLoader`: epochs of two batches, mixed as the recipe has it."""

    batches_per_epoch, num_corrupt = 2, 0

    def __init__(self, schedule: Schedule, image_size: Sequence[int]) -> None:
        self.size, self.image_size = schedule.batch_size, image_size
        self.mix = make_mixup(schedule, len(LABELS), schedule.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            x = torch.randn(self.size, 3, *self.image_size)
            labels = torch.randint(len(LABELS), (self.size,))
            x, labels = self.mix(x, labels) if self.mix else (x, labels)
            yield {"pixel_values": x, "labels": labels}


class Stepper:
    """The epoch of two steps after the recipe's warm-up, on random images, and what it left."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        schedule, sampling, distillation = recipe.training, recipe.sampling, recipe.distillation
        self.model = randomise(make_model(recipe, LABELS))
        self.sampler = StitchSampler(self.model.stitches, sampling.stitches, method=sampling.method, seed=recipe.seed)
        settings = distillation.model_dump(exclude={"teacher"}) if distillation else {}
        name = distillation.teacher if distillation else None
        guide = load_teacher(name, self.model.config) if name else None
        self.losses: list[float] = []
        self.loss = StitchLoss(schedule.label_smoothing, teacher=guide, **settings)
        self.phase = Phase(0, "stitches", schedule, self.sampler, self.lose)  # type: ignore[arg-type]
        self.folder = folder

    def lose(self, *arguments: Any) -> torch.Tensor:
        """The loss of the recipe, noted."""
        loss = self.loss(*arguments)
        self.losses.append(loss.item())
        return loss

    def run(self) -> tuple[set[int], list[float]]:
        """The stitches that were drawn, and the losses."""
        accelerator = Accelerator(cpu=True)
        books = Books(accelerator, Checkpoints(self.folder, 1), None, self.folder)
        images = RandomImages(self.phase.schedule, self.model.config.image_size)
        first = 2 * int(self.phase.schedule.warmup_epochs)

        def look(epoch: int) -> dict[str, float]:
            self.optimizer = books.parts.optimizer
            raise RunStopped("enough")

        self.phase.after_epoch = look
        with pytest.raises(RunStopped, match="enough"):
            fit(accelerator, self.model, images, self.phase, books, first_step=first)  # type: ignore[arg-type]
        return {*self.sampler.draw(first), *self.sampler.draw(first + 1)}, self.losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile, while it looks at a block
@pytest.mark.parametrize("name", RECIPES)
def test_every_block_of_a_recipe_is_compiled(name: str, teacher: str) -> None:
    """In training and evaluation, at full depth; without a break in a graph, for `fullgraph` raises at one."""
    model = make_model(reduced(name, teacher), LABELS)
    calls: list[nn.Module] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        return lambda *arguments: calls.append(graph) or graph(*arguments)

    torch.compiler.reset()
    # Torch's own, which one of timm's optimisers raises for the whole process where it is imported after dynamo.
    with torch._dynamo.config.patch(recompile_limit=8):
        model.compile_blocks(backend=count, fullgraph=True, dynamic=False)  # quicker than with sizes as symbols
        blocks = [module for module in model.modules() if module._compiled_call_impl is not None]
        for training in (True, False):
            model.train(training)
            x = torch.randn(2, 3, *model.config.image_size)
            calls.clear()
            with torch.set_grad_enabled(training):
                for anchor in range(len(model.anchors)):
                    model(x, stitch_id=anchor)
            assert len(calls) == len(blocks)
    torch.compiler.reset()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_steps_and_moves_what_it_drew(name: str, teacher: str, tmp_path: Path) -> None:
    recipe = reduced(name, teacher)
    stepper = Stepper(recipe, tmp_path)
    model: nn.Module = stepper.model
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    drawn, losses = stepper.run()
    assert all(0 < loss < 1e4 for loss in losses), losses  # not NaN either
    assert all(torch.isfinite(value).all() for value in model.parameters())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == parameters_of(stepper.model, drawn)

    schedule = recipe.training
    rates = {group["role"]: group["lr"] for group in stepper.optimizer.param_groups}
    expected = rates["stitching layers"] * schedule.anchor_learning_rate_scale
    assert rates["anchors"] == pytest.approx(expected)
    assert 0.5 * schedule.learning_rate < rates["stitching layers"] <= schedule.learning_rate
    assert {group["weight_decay"] for group in stepper.optimizer.param_groups} == {0.0, schedule.weight_decay}


# What is refused, before anything is downloaded.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainning.epochs=3"], "trainning: unknown key, did you mean training?"),
        (["training.epoch=3"], "training.epoch: unknown key, did you mean epochs?"),
        (["training.augmentation.cutmx=1.0"], "training.augmentation.cutmx: unknown key, did you mean cutmix?"),
        (["pretraining.augmentation.flip=1.0"], "pretraining.augmentation.flip: unknown key"),
        (["distillation={kind: hard, teachr: x}"], "distillation.teachr: unknown key, did you mean teacher?"),
        (["anchors.1.kwarg={}"], "anchors.1.kwarg: unknown key, did you mean kwargs?"),
        (["space.zzz=1"], "space.zzz: unknown key; there are kernel_size, stride"),
        (["training.epochs=many"], "training.epochs: Input should be a valid integer, got 'many'"),
        (["training.epochs=1.5"], "training.epochs: Input should be a valid integer"),
        (["training.epochs=-1"], "training.epochs: Input should be greater than or equal to 0, got -1"),
        (["training.epochs=true"], "training.epochs: Input should be a valid integer"),
        (["training.learning_rate=0"], "training.learning_rate: Input should be greater than 0"),
        (["training.augmentation.horizontal_flip=2"], "training.augmentation.horizontal_flip: Input should be less"),
        (["training.clip=hard"], "training.clip: Input should be 'norm' or 'agc', got 'hard'"),
        (
            ["training.augmentation.crop_scale=[1,0.1]"],
            "training.augmentation: crop_scale must be two parts of the area",
        ),
        (["space.direction=up"], "space.direction: Input should be 'fast_to_slow'"),
        (["anchors=[{architecture: resnet18}]"], "anchors: List should have at least 2 items"),
        (["anchors=[{name: a}, {architecture: b}]"], "anchors.0.name: unknown key"),
        (["anchors=[{kwargs: {}}, {architecture: b}]"], "anchors.0.architecture: Field required"),
        (["sampling.stitches=[]"], "sampling.stitches: List should have at least 1 item"),
        # Impossible combinations.
        (["training.warmup_epochs=160"], "training: warmup_epochs is 160.0, but the whole training has 160 epochs"),
        (
            ["training.augmentation.mixup=0.8", "training.batch_size=63"],
            "training: mixup and cutmix mix pairs of images",
        ),
        (["distillation={kind: hard}"], "distillation: kind hard needs a teacher"),
        (["distillation={kind: in_place, teacher: x}"], "distillation: kind in_place has no teacher"),
        (["distillation={kind: in_place}"], "distillation.kind in_place needs sampling.method sandwich"),
        (["training.trainable=own", "gradient_accumulation_steps=2"], "training.trainable own: the back anchors teach"),
        (["anchors.0.weights=x.pth"], "anchors.weights are given, but pretrained is false"),
        (
            ["training.augmentation.auto_augment=v0"],
            "training.augmentation.auto_augment cannot be used where data.in_mem",
        ),
        (
            ["training.augmentation.crop_scale=[0.1,1]"],
            "training.augmentation.crop_scale cannot be used where data.in_m",
        ),
        (["data.in_memory=false"], "pretraining.augmentation.affine cannot be used where data.in_memory is not true"),
        (["data.dataset=parquet"], "data: dataset parquet reads files of your own: give files"),
        (["data.dataset=imagefolder"], "data: dataset imagefolder reads files of your own: give files"),
        (["data.files=x"], "data: the digits come with scikit-learn: they have no files"),
        (["data.streaming=true"], "data: the digits come with scikit-learn: they have no files and cannot be streamed"),
        (["data.dataset=x/y", "data.streaming=true"], "data: streaming and in_memory exclude each other"),
        (
            ["data.dataset=x/y", "data.in_memory=false", "data.streaming=true"],
            "data: a stream does not know its length: give num_train_images",
        ),
        (["data.num_train_images=5"], "data: num_train_images is for streaming; to train on a part, slice train_split"),
        # Overrides that are none.
        (["seed"], "an override is key.path=value, got 'seed'"),
        (["=3"], "an override is key.path=value, got '=3'"),
        (["anchors.7.architecture=x"], "the override 'anchors.7.architecture=x' cannot be applied"),
        (["anchors.x.architecture=x"], "the override 'anchors.x.architecture=x' cannot be applied"),
        (["seed=[1"], "the override 'seed=[1' cannot be applied"),
        (["output=${nothing}/x"], "nothing"),
    ],
)
def test_what_no_recipe_can_be_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(DIGITS, overrides)


def test_pretrained_anchors_keep_their_statistics_unless_the_recipe_says_otherwise() -> None:
    assert load_recipe(DEIT).training.batch_norms == "keep"
    assert load_recipe(DIGITS).training.batch_norms == "update"
    assert load_recipe(FOLDER / "resnet18_swin_ti.yaml").training.batch_norms == "update"  # as timm's scripts


def test_repeats_need_a_data_set_with_a_length() -> None:
    overrides = ["data.streaming=true", "data.num_train_images=1281167"]
    with pytest.raises(ValueError, match=r"training\.augmentation\.repeats needs a data set that is not"):
        load_recipe(DEIT, overrides)
    assert load_recipe(DEIT, [*overrides, "training.augmentation.repeats=1"]).data.streaming


def test_several_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"\n  space\.stride: .*\n  training\.epochs: ") as error:
        load_recipe(DIGITS, ["space.stride=x", "training.epochs=x"])
    assert str(DIGITS) in str(error.value)


def test_overrides_are_yaml_and_reach_into_lists() -> None:
    overrides = ["training.learning_rate=5e-1", "pretraining=null", "space.stages=[0]", "anchors.0.kwargs.depth=3"]
    recipe = load_recipe(DIGITS, [*overrides, "data.class_names=[a, b]", "name=a=b", "anchors.1.kwargs={depth: 2}"])
    assert recipe.training.learning_rate == 0.5
    assert recipe.pretraining is None
    assert recipe.space.stages == [0]
    assert recipe.anchors[0].kwargs == {"img_size": 8, "patch_size": 2, "depth": 3, "embed_dim": 6, "num_heads": 1}
    assert recipe.anchors[1].kwargs == {"depth": 2}  # replaced as a whole
    assert recipe.data.class_names == ["a", "b"]
    assert recipe.name == "a=b"
    assert load_recipe(DIGITS).training.learning_rate == 4e-3


def test_files_of_a_data_set_are_given_on_the_command_line() -> None:
    overrides = ["data.dataset=parquet", "data.files.train=a/train-*.parquet", "data.files.test=[b.parquet, c.parquet]"]
    data = load_recipe(FOLDER / "cifar10.yaml", overrides).data
    assert data.files == {"train": "a/train-*.parquet", "test": ["b.parquet", "c.parquet"]}
    assert load_recipe(DEIT, ["data.dataset=imagefolder", "data.files=PATH"]).data.files == "PATH"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"dataset": "uoft-cs/cifar10"}, "uoft-cs/cifar10"),
        ({"dataset": "parquet", "files": {"train": "a/b/*", "test": ["data/cifar10/test-*.parquet"]}}, "cifar10"),
        ({"dataset": "parquet", "files": {"val": "data/flowers/val.parquet"}, "test_split": "val[:9]"}, "flowers"),
        ({"dataset": "imagefolder", "files": "data/pets/"}, "pets"),
        ({"dataset": "imagefolder", "files": "."}, "imagefolder"),
    ],
)
def test_images_are_called_after_their_data_set_or_folder(settings: dict, name: str) -> None:
    assert Data(**settings).name == name


def test_a_recipe_takes_from_its_base_what_it_does_not_say(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "first.yaml").write_text(DIGITS.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "deep" / "second.yaml").write_text(
        "base: ../first.yaml\nname: second\ntraining: {epochs: 7}\n", encoding="utf-8"
    )
    (tmp_path / "deep" / "third.yaml").write_text(
        "base: second.yaml\npretraining: null\ntraining: {clip: null}\n", encoding="utf-8"
    )
    first, third = load_recipe(tmp_path / "first.yaml"), load_recipe(tmp_path / "deep" / "third.yaml", ["seed=3"])
    assert (third.name, third.seed, third.pretraining) == ("second", 3, None)
    assert (third.training.epochs, third.training.clip) == (7, None)
    assert third.training.learning_rate == first.training.learning_rate
    assert third.anchors == first.anchors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold a mapping of keys to values"),
        ("just words", "just words: unknown key"),
        ("a: [", "is not YAML"),
        ("a: 1\na: 2\n", "is not YAML"),
        ("", "name: Field required"),
        ("base: none.yaml\n", "there is no recipe"),
        ("base: test.yaml\n", "is its own base"),
        ("base: ../recipe/test.yaml\n", "is its own base"),
        ("base: other.yaml\n", "is its own base"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: str, message: str, tmp_path) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "other.yaml").write_text("base: test.yaml\n", encoding="utf-8")
    (folder / "test.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(folder / "test.yaml")
    assert str(folder) in str(error.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\xff\n")
    with pytest.raises(ValueError, match=r"latin\.yaml"):
        load_recipe(tmp_path / "latin.yaml")


def test_a_recipe_of_ours_is_found_by_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits", ["seed=3"]) == load_recipe(DIGITS, ["seed=3"])
    assert set(recipes()) == {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")}
    assert load_recipe("ablations/sandwich").sampling.method == "sandwich"
    with pytest.raises(ValueError, match=r"there is no recipe digit: did you mean digits\?"):
        load_recipe("digit")
    with pytest.raises(ValueError, match=r"there is no recipe x: there are ablations/layer_drop, .*, digits, "):
        load_recipe("x")
    # A file of that name is what was meant by whoever has one.
    Path("digits").write_text("name: mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="digits is not a recipe"):
        load_recipe("digits")
