"""The command `stitchable`, each subcommand on real checkpoints and images, and what it says to a mistake."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from click.testing import Result
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from families import images, make, randomise
from processes import run_python
from stitchable import StitchableConfig, StitchableForImageClassification, initialize_stitches
from stitchable.card import Card
from stitchable.conversion import RELEASES
from stitchable.images import _number, read_batches
from stitchable.processing import image_processor
from stitchable.publishing import save_repository, update_repository
from stitchable_cli import app


def run(*arguments: object, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == (1 if fails else 0), result.output
    assert not fails or result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    return result


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of a tiny model with named classes, not measured."""
    model = make("vit", id2label={i: f"class {i}" for i in range(5)})
    save_repository(model, tmp_path / "model", image_processor(model.config, crop_pct=1.0), Card("tiny"))
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Ten images in folders named after their classes."""
    rng = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / "pictures" / f"class {number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype="uint8")).save(path)
    return tmp_path / "pictures"


def test_build_takes_your_own_weights(tmp_path) -> None:
    x, paths, expected = torch.randn(2, 3, 64, 64), [], []
    for name in ("resnet14t", "resnet10t"):
        module = randomise(timm.create_model(name, num_classes=5)).eval()
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
        paths += ["--weights", tmp_path / f"{name}.safetensors"]
        expected.append(module(x))
    space = ["--image-size", 64, "--pairs", "all", "--stages", "0"]
    names = ["resnet14t", "resnet10t"]
    run("build", *names, *paths, *space, "-o", tmp_path / "new")
    model = StitchableForImageClassification.from_pretrained(tmp_path / "new").eval()
    assert [anchor["pretrained"] for anchor in model.config.anchors] == [
        "resnet10t.safetensors",
        "resnet14t.safetensors",
    ]
    for index, logits in enumerate(reversed(expected)):
        assert torch.equal(model(x, stitch_id=index).logits, logits)
    for wrong, message in (
        (paths[:2], "2 anchors, 1 files"),
        ([*paths[:2], "--weights", "no"], "there is none at 'no'"),
    ):
        result = run("build", *names, *wrong, *space, "-o", tmp_path / "other", fails=True)
        assert message in result.stderr


def test_build_fits_a_family_on_images(tmp_path, pictures) -> None:
    small = ["resnet10t", "resnet14t"]
    result = run(
        *(
            "build",
            *small,
            "--no-pretrained",
            "--image-size",
            64,
            "--num-labels",
            5,
            "--output",
            tmp_path / "new",
            "--pairs",
            "all",
            "--stages",
            "0",
        ),
        *("--images", pictures, "--num-samples", 8),
    )
    model = StitchableForImageClassification.from_pretrained(tmp_path / "new")
    assert result.stdout == f"{tmp_path / 'new'}: {len(model.stitches)} stitches of 2 anchors\n"
    assert (model.config.num_labels, list(model.config.image_size)) == (5, [64, 64])
    assert "# new" in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    fresh = StitchableForImageClassification(model.config)
    for stitch in model.stitches[2:]:
        fitted, random = (m.get_stitching_layer(stitch.layers[0]).linear.weight for m in (model, fresh))
        assert not torch.equal(fitted, random)
    again = StitchableForImageClassification.from_pretrained(tmp_path / "new")
    shuffled = read_batches(str(pictures), image_processor(model.config), batch_size=8)
    initialize_stitches(again, shuffled, num_samples=8)
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)


def test_table_and_plot(folder, tmp_path) -> None:
    config = StitchableConfig.from_pretrained(folder)
    assert json.loads(run("table", folder, "--json").stdout) == config.stitches
    lines = run("table", folder).stdout.splitlines()
    assert lines[0] == "| id | route | kFLOPs | params |"
    assert len(lines) == 2 + 9
    assert run("plot", folder, tmp_path / "x.png", fails=True).stderr.startswith("error: no stitch has a measured acc")
    for entry in config.stitches:
        entry["metrics"] = {"accuracy": entry["id"] / 10}
    config.save_pretrained(folder)
    front = json.loads(run("table", folder, "--pareto", "--json").stdout)
    assert [entry["id"] for entry in front] == [0, 6, 8][: len(front)] or front[-1]["id"] == 8
    run("plot", folder, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as figure:
        assert figure.width > 500
    assert "exists; choose another name" in run("plot", folder, tmp_path / "x.png", fails=True).stderr


def test_eval_writes_what_it_measured_into_the_folder(folder, pictures) -> None:
    weights = (folder / "model-anchor-1.safetensors").stat().st_mtime_ns
    config = StitchableConfig.from_pretrained(folder)
    config.stitches[8]["metrics"] = {"accuracy": 0.9}  # on other data, which is not to stand beside the new figures
    config.save_pretrained(folder)
    stitches = ",".join(map(str, range(8)))
    measured = json.loads(run("eval", folder, pictures, "--json", "--batch-size", 4, "--stitches", stitches).stdout)
    assert set(measured) == {str(i) for i in range(8)}
    config = StitchableConfig.from_pretrained(folder)
    assert {str(entry["id"]): entry["metrics"]["accuracy"] for entry in config.stitches if "metrics" in entry} == {
        i: figures["accuracy"] for i, figures in measured.items()
    }
    card = ModelCard.load(folder / "README.md")
    assert len(card.data.eval_results) == 8
    assert "accuracy on pictures." in card.text
    assert "it prints" in card.text
    assert (folder / "model-anchor-1.safetensors").stat().st_mtime_ns == weights


def test_cascade_writes_what_it_found_into_the_folder(folder, pictures) -> None:
    config = StitchableConfig.from_pretrained(folder)
    config.stitches[8]["metrics"] = {"accuracy": 0.9}  # on other data, which is not to stand beside the new figures
    config.save_pretrained(folder)
    options = ("--batch-size", 4, "--stitches", "0,1,2,3")
    found = json.loads(run("cascade", folder, pictures, "--json", *options).stdout)
    config = StitchableConfig.from_pretrained(folder)
    assert config.cascades == found
    assert {entry["id"] for entry in config.stitches if entry.get("metrics")} == {0, 1, 2, 3}
    assert all((entry["dataset"], entry["images"]) == ("pictures", 10) for entry in found)
    assert "accuracy on pictures." in ModelCard.load(folder / "README.md").text
    printed = run("cascade", folder, pictures, *options).stdout
    assert printed.count("\n|") == len(found) + 1 if found else "no cascade is better" in printed


@pytest.fixture
def cascaded(folder) -> Path:
    """The checkpoint with a cascade of both anchors that was found on a data set "noise"."""
    model = StitchableForImageClassification.from_pretrained(folder)
    small, large = (float(model.stitches[i].flops) for i in (0, 1))
    stages = [
        {"stitch": 0, "flops": small, "score": "max_probability", "threshold": 0.4},
        {"stitch": 1, "flops": large, "reached": 0.5},
    ]
    figures = {"metrics": {"accuracy": 0.6, "gain": 0.1}, "interval": [0.05, 0.15], "images": 2000, "dataset": "noise"}
    model.cascades = [{"id": 3, "stages": stages, "flops": small + large / 2, "max_flops": small + large, **figures}]
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    update_repository(model, folder, dataset="noise")
    return folder


def test_table_and_plot_show_cascades(cascaded, tmp_path) -> None:
    assert "| 3 | 0, where p < 0.4 → 1 |" in run("table", cascaded).stdout
    *_, last = json.loads(run("table", cascaded, "--json").stdout)
    assert last == StitchableConfig.from_pretrained(cascaded).cascades[0]
    run("plot", cascaded, tmp_path / "x.svg")
    assert "cascades, mean FLOPs" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    card = ModelCard.load(cascaded / "README.md")
    assert {"cascade_id": 3} in [result.metric_args for result in card.data.eval_results]


def test_eval_measures_cascades_on_other_data(cascaded, pictures) -> None:
    measured = json.loads(run("eval", cascaded, pictures, "--json").stdout)
    (entry,) = StitchableConfig.from_pretrained(cascaded).cascades
    assert measured["cascades"] == {"3": entry["metrics"]}
    assert entry["metrics"].keys() == {"accuracy", "mean_flops"}
    assert (entry["dataset"], "interval" in entry) == ("noise", False)
    assert "of other data" in run("table", cascaded).stdout


def test_calibrate_predicts_the_latency_of_cascades(cascaded) -> None:
    output = run("calibrate", cascaded, "--num-runs", 1, "--threads", torch.get_num_threads()).stdout
    assert "ms, 95 %" in output
    assert "of 1 cascades that were measured, the median error is" in output
    assert StitchableForImageClassification.from_pretrained(cascaded).cascades[0].latency_ms > 0


def test_extract_saves_one_cascade(cascaded, tmp_path) -> None:
    output = run("extract", cascaded, tmp_path / "new", "--cascade", 3).stdout
    assert output.startswith(f"{tmp_path / 'new'}: cascade 3 of 2 stitches, ")
    alone = StitchableForImageClassification.from_pretrained(tmp_path / "new")
    assert ([stitch.id for stitch in alone.stitches], alone.config.cascade_id) == ([0, 1], 3)
    whole = StitchableForImageClassification.from_pretrained(cascaded)
    assert torch.equal(alone.eval()(images("vit")).logits, whole.eval()(images("vit"), cascade=3).logits)
    message = "extract MODEL STITCH_ID OUTPUT, or MODEL OUTPUT --cascade ID"
    for wrong in ((tmp_path / "other",), (4, tmp_path / "other", "--cascade", 3)):
        assert message in run("extract", cascaded, *wrong, fails=True).stderr
    assert "there is no cascade 4" in run("extract", cascaded, tmp_path / "other", "--cascade", 4, fails=True).stderr
    assert "is a number, got 'x'" in run("extract", cascaded, "x", tmp_path / "other", fails=True).stderr


@pytest.mark.slow
def test_calibrate_makes_budgets(folder) -> None:
    output = run("calibrate", folder, "--num-runs", 1, "--threads", torch.get_num_threads()).stdout
    assert "| ms | MB |" in output
    assert "median error" in output
    model = StitchableForImageClassification.from_pretrained(folder)
    assert model.for_budget(latency_ms=1e6).latency_ms > 0
    assert "Milliseconds of a call and peak of memory: predicted" in (folder / "README.md").read_text(encoding="utf-8")


def test_extract_saves_one_stitch(folder, tmp_path) -> None:
    output = run("extract", folder, 4, tmp_path / "alone").stdout
    alone = StitchableForImageClassification.from_pretrained(tmp_path / "alone")
    whole = StitchableForImageClassification.from_pretrained(folder)
    assert (
        output
        == f"{tmp_path / 'alone'}: stitch 4, {alone.num_parameters():,} parameters, {alone.stitch.flops:,} FLOPs\n"
    )
    assert torch.equal(alone(images("vit")).logits, whole(images("vit"), stitch_id=4).logits)
    assert (tmp_path / "alone" / "README.md").exists()


def test_select_and_prune_keep_the_ids_of_what_they_keep(folder, pictures, tmp_path) -> None:
    output = run("select", folder, "-o", tmp_path / "few", "--images", pictures, "--number", 2).stdout
    kept = StitchableForImageClassification.from_pretrained(tmp_path / "few")
    ids = [stitch.id for stitch in kept.stitches]
    assert (
        output == f"{tmp_path / 'few'}: {len(ids)} of 9 stitches, beside the anchors {', '.join(map(str, ids[2:]))}\n"
    )
    assert 3 <= len(ids) <= 4
    whole = StitchableForImageClassification.from_pretrained(folder)
    x = images("vit")
    assert torch.equal(kept(x, stitch_id=ids[2]).logits, whole(x, stitch_id=ids[2]).logits)
    run("eval", tmp_path / "few", pictures)
    config = StitchableConfig.from_pretrained(tmp_path / "few")
    config.stitches[2]["metrics"]["accuracy"] = 0.0
    config.save_pretrained(tmp_path / "few")
    run("prune", tmp_path / "few", "-o", tmp_path / "fewer")
    left = [stitch["id"] for stitch in StitchableConfig.from_pretrained(tmp_path / "fewer").stitches]
    assert left == [i for i in ids if i != ids[2]]


def test_export_writes_graphs_or_a_program(folder, tmp_path) -> None:
    output = run("export", folder, tmp_path / "graphs", "--stitches", "0").stdout
    size = sum(path.stat().st_size for path in (tmp_path / "graphs").iterdir())
    assert output == f"{tmp_path / 'graphs'}: 1 graphs and their weights, {size:,} bytes\n"
    assert run("export", folder, tmp_path / "x.pt2", "--stitches", "4").stdout == f"{tmp_path / 'x.pt2'}: stitch 4\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "{empty}"], "has no config.json of a stitchable model"),
        (["table", "no/where/at/all"], "no/where/at/all"),
        (["eval", "{empty}", "{pictures}"], "has no config.json of a stitchable model"),
        (["eval", "{folder}", "{empty}"], "no images can be loaded"),
        (["eval", "{folder}", "{empty}/none"], "is neither a folder of images nor the id of a data set on the Hub"),
        (["eval", "{folder}", "{pictures}", "--stitches", "a"], "[-]-stitches must be numbers with commas between"),
        (["eval", "{folder}", "{pictures}", "--stitches", "77"], "stitch_id 77 is out of range"),
        (["eval", "{folder}", "{strangers}"], "has a class 'stranger' that the model does not know"),
        (["eval", "{folder}", "{broken}"], "the image .*0.png cannot be read"),
        (["calibrate", "{folder}", "--dtype", "int8"], "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (["calibrate", "{folder}", "--threads", "0"], "[-]-threads must be at least 1"),
        (["eval", "{folder}", "{pictures}", "--device", "nowhere"], "the model cannot be put on 'nowhere'"),
        (["table", "{folder}", "--pareto"], "has been measured; stitchable eval does"),
        (["eval", "{folder}", "{splits}"], "has the splits train, validation; choose one"),
        (["cascade", "{folder}", "{pictures}", "--stitches", "77"], "stitch_id 77 is out of range"),
        (["cascade", "{folder}", "{pictures}", "--stitches", "1"], "a cascade needs at least two stitches"),
        (["calibrate", "{folder}", "--batch-sizes", "0"], "batch_sizes and num_runs must be at least 1"),
        (["select", "{folder}", "-o", "{new}", "--images", "{pictures}"], "give a number of stitches to keep or a"),
        (["select", "{folder}", "-o", "{new}", "--images", "{pictures}", "--number", "0"], "number=0 keeps nothing"),
        (["select", "{folder}", "-o", "{folder}", "--images", "{pictures}", "--number", "2"], "already holds"),
        (["prune", "{folder}", "-o", "{new}"], "no stitch has a measured accuracy"),
        (["extract", "{folder}", "4", "{folder}"], "already holds something"),
        (["extract", "{folder}", "99", "{new}"], "stitch_id 99 is out of range"),
        (["build", "vit_tiny_patch16_224", "-o", "{new}"], "at least two anchors"),
        (["build", "vit_tiny", "resnet18", "-o", "{new}"], "has no model 'vit_tiny'; the nearest are"),
        (["build", "resnet18", "resnet34", "-o", "{folder}"], "already holds something"),
        (["convert", "{folder}/config.json", "{new}", "--family", "deit"], "is no checkpoint that can be read without"),
        (["convert", "{folder}/config.json", "{new}", "--family", "vit"], "the authors released deit, swin, resnet"),
        (["export", "{folder}", "{new}", "--stitches", "99"], "stitch_id 99 is out of range"),
        (["export", "{folder}", "{folder}"], "already holds something"),
        (["export", "{folder}", "{new}/x.pt2"], "a program holds one stitch: give [-]-stitches ID"),
        (["push", "{empty}", "someone/tiny"], "is no checkpoint of a stitchable model"),
        (["push", "{folder}", "not a name"], "Repo id must use alphanumeric"),
        (["push", "{folder}", "someone/tiny"], "offline"),
        (["app", "{empty}"], "has no config.json of a stitchable model"),
        (["app", "{folder}", "--images", "{new}"], "there is no folder .*new"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, folder, pictures, tmp_path) -> None:
    for name in ("stranger", "class 1"):
        (tmp_path / "strangers" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "strangers" / name / "1.png")
        (tmp_path / "broken" / name.replace("stranger", "class 0")).mkdir(parents=True)
    (tmp_path / "broken" / "class 0" / "0.png").write_bytes(b"\x89PNG broken")
    Image.new("RGB", (9, 9)).save(tmp_path / "broken" / "class 1" / "1.png")
    for split in ("train", "validation"):
        (tmp_path / "splits" / split / "class 1").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "splits" / split / "class 1" / "1.png")
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("empty", "new", "pictures", "strangers", "broken", "splits")}
    result = run(*(argument.format(folder=folder, **places) for argument in arguments), fails=True)
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_the_help_is_in_groups() -> None:
    commands, options = run("--help").stdout, run("build", "--help").stdout
    titles = ["Make a model", "Look at it and measure it", "Give it away"]
    assert [commands.index(title) for title in titles] == sorted(commands.index(title) for title in titles)
    made, looked, given = (commands.split(title)[1] for title in titles)
    assert re.search(r"^\W+build\b", made, re.MULTILINE).start() < made.index(titles[1])
    assert re.search(r"^\W+calibrate\b", looked, re.MULTILINE).start() < looked.index(titles[2])
    assert re.search(r"^\W+push\b", given, re.MULTILINE)
    assert options.index("Images") < options.index("--num-samples")
    assert options.index("Which stitches there are") < options.index("--kernel-size")


@pytest.mark.parametrize("label", [-1, 5, None, "a"])
def test_labels_that_are_none_of_the_classes_are_refused(label) -> None:
    """Data sets whose labels are secret have -1."""
    with pytest.raises(ValueError, match="is none of the classes; choose a split whose labels are known"):
        _number(label, [3, 4, 0, 1, 2])
    assert _number(2, [3, 4, 0, 1, 2]) == 0


def test_help_reads_well() -> None:
    text = run("--help").stdout
    for name in (
        "build",
        "select",
        "prune",
        "table",
        "plot",
        "eval",
        "cascade",
        "calibrate",
        "extract",
        "export",
        "convert",
        "push",
    ):
        assert name in text
        assert f"Usage: root {name} [OPTIONS]" in run(name, "--help").stdout


def test_help_and_mistakes_in_options_import_neither_torch_nor_the_package(tmp_path) -> None:
    """Which take seconds; `import stitchable` registers its classes with transformers, so it has to import them."""
    code = """
import sys
from typer.testing import CliRunner
from stitchable_cli import app
for name in ["", *(command.name for command in app.registered_commands)]:
    assert CliRunner().invoke(app, [name, "--help"][not name :]).exit_code == 0, name
    assert CliRunner().invoke(app, [name, "--no-such-option"][not name :]).exit_code == 2, name
    print(name)
print({module.split(".")[0] for module in sys.modules} & {"torch", "transformers", "timm", "numpy", "stitchable"})
"""
    *names, imported = run_python(code, cwd=tmp_path).splitlines()
    assert set(names) > {"", "build", "eval", "convert", "app"}
    assert imported == "set()"


def test_help_names_the_releases_that_convert_knows() -> None:
    assert ", ".join(RELEASES) in " ".join(run("convert", "--help").stdout.replace("│", " ").split())


def test_train_makes_a_model_by_the_name_of_a_recipe(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["pretraining=null", "training.epochs=1", "training.warmup_epochs=0", "data.test_fraction=0.8"]
    overrides += ["space.stride=5", "evaluation.throughput=false", "trackers=[]"]
    result = run("train", "digits", *overrides)
    assert "the snippet of runs/digits/README.md prints" in result.stdout
    assert len(StitchableConfig.from_pretrained("runs/digits").stitches) > 3
    assert "runs/digits already holds something" in run("train", "digits", *overrides, "--resume", fails=True).stderr


def test_train_says_what_is_wrong_with_a_recipe(tmp_path) -> None:
    assert "there is no recipe digit: did you mean digits?" in run("train", "digit", fails=True).stderr
    assert "seeds: unknown key, did you mean seed?" in run("train", "digits", "seeds=3", fails=True).stderr
    path = tmp_path / "none.yaml"
    assert f"there is no recipe {path}: No such file" in run("train", path, fails=True).stderr
