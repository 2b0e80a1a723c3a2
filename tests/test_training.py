"""The training script and its loop, on recipes of seconds."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from transformers import pipeline

from stitchable import StitchableForImageClassification, evaluate
from stitchable.fingerprints import NUM_STORED
from stitchable.imagenet import in_words
from stitchable.processing import image_processor
from stitchable.publishing import push_folder
from stitchable.training import own
from stitchable.training.books import (
    Checkpoints,
    check_same_processes,
    check_same_recipe,
    read_progress,
    write_recipe,
)
from stitchable.training.data import load_data, make_test_loader
from stitchable.training.processes import RunStopped, make_accelerator
from stitchable.training.recipe import load_recipe
from stitchable.training.train import run

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "training" / "recipes" / "digits.yaml"
QUICK = ["pretraining.epochs=1", "training.epochs=1", "training.warmup_epochs=0", "pretraining.warmup_epochs=0"]
QUICK += ["initialization.num_samples=20"]
# Seconds, with everything that a resumed run must restore: several phases, drop path, mixed labels.
TINY = ["pretraining=null", "training.epochs=2", "training.warmup_epochs=0", "data.test_fraction=0.8"]
TINY += ["evaluation.throughput=false", "evaluation.stitches=[0,1,2,5]", "evaluation.cascades=false", "trackers=[]"]
TINY += ["sampling={}"]  # one stitch per step
EVERYTHING = [*TINY, "training.augmentation.mixup=0.8", "checkpoints.every=3"]
EVERYTHING += ["anchors.1.kwargs.drop_path_rate=0.3", "training.augmentation.repeats=2"]
EVERYTHING += ["pretraining={epochs: 1, batch_size: 64, learning_rate: 1e-3}"]

ONE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
ONE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
TWO_ON_A_CPU = [*ONE[:4], "2", *ONE[5:]]  # which the launcher does not start, but the trainer
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    """Accelerate keeps its state for the whole process; each run here is a new one."""
    _fresh()


def _fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def command(*overrides: str, launcher: list[str] | None = None) -> list[str]:
    return [sys.executable, *(launcher or []), "training/train.py", "--recipe", str(DIGITS), *overrides]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def train(*overrides: str, launcher: list[str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*overrides, launcher=launcher),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def strict(path: Path) -> object:
    """A JSON file, without the constants that Python writes and no other language reads."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path} has {constant}, which is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_diverged_anchor_leaves_strict_json(tmp_path: Path, caplog) -> None:
    recipe = load_recipe(DIGITS, [])
    overrides = ["pretrained=true"]
    for number, anchor in enumerate(recipe.anchors):
        model = timm.create_model(anchor.architecture, num_classes=10, **anchor.kwargs)
        if number == 1:
            model.norm.bias.data.fill_(torch.nan)
        path = tmp_path / f"{number}.safetensors"
        save_file(model.state_dict(), path)
        overrides.append(f"anchors.{number}.weights={path}")
    overrides += ["evaluation.cascades=true", "training.epochs=0", "initialization.method=kaiming"]
    run(load_recipe(DIGITS, [*TINY, *overrides, f"output={tmp_path / 'run'}"]))
    assert "no cascades were searched: the logits of stitch 1 are not finite" in caplog.text
    results = strict(tmp_path / "run-run" / "results.json")
    assert {i: "loss" in figures for i, figures in results["trained"].items()} == {
        "0": True,
        "1": False,
        "2": True,
        "5": False,
    }
    for path in [*tmp_path.glob("run/*.json"), *tmp_path.glob("run-run/*.json")]:
        strict(path)
    with pytest.raises(OfflineModeIsEnabled):  # where else it would be pushed
        push_folder(tmp_path / "run", "someone/tiny")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {
        name: weight for path in sorted(output.glob("model-*.safetensors")) for name, weight in load_file(path).items()
    }


def start_and_signal(output: Path, overrides: list[str], after_steps: int, number: int) -> tuple[int, str]:
    """Start a run, send it a signal once it has begun `after_steps` steps; returns its exit status and stderr."""
    with subprocess.Popen(
        command(f"output={output}", *overrides),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        draws = Path(f"{output}-run") / "draws.tsv"
        deadline = time.monotonic() + 120
        while not draws.exists() or draws.read_text(encoding="utf-8").count("\n") < after_steps:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_the_main_job_from_anchors_to_predictions(tmp_path, capsys) -> None:
    output = tmp_path / "run"
    result = train(f"output={output}", *QUICK, launcher=ONE)
    assert result.returncode == 0, result.stderr
    table = json.loads((output / "config.json").read_text(encoding="utf-8"))["stitches"]
    assert len(table) == 35
    names = {"accuracy", "top5_accuracy", "loss", "images_per_second"}
    assert all(set(stitch["metrics"]) == names for stitch in table)
    assert "parameters are loaded for this stitch alone" in result.stdout
    printed = "".join(result.stdout.split("README.md prints\n")[1].splitlines(keepends=True)[:-2])
    assert printed in (output / "README.md").read_text(encoding="utf-8")
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert len(config["trained_on"]) == NUM_STORED
    assert {(entry["dataset"], entry["images"]) for entry in config["cascades"]} == {("digits", 599)}
    lines = result.stdout.strip().splitlines()[-2:]
    assert all("MFLOPs per image on average: " in line for line in lines)
    assert "stitches: 100%" in result.stderr.replace("\r", "\n")
    assert re.search(r"stitches, epoch 1/1: loss [\d.]+, learning_rate [\d.e-]+, images_per_second \d+", result.stdout)
    assert list(Path(f"{output}-run").rglob("events.out.tfevents*"))

    # The block that README.md opens with runs on what the demo leaves.
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    exec(block[1].replace("runs/digits", str(output)))
    assert re.search(r"0\.15 MFLOPs: (stitch|cascade) \d+ at", capsys.readouterr().out)

    with pytest.raises(ValueError, match="already holds something"):
        run(load_recipe(DIGITS, [f"output={output}", *QUICK]))
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["stitches"] == table


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_size=2000"], "training.batch_size=2000, but there are only 1198 training images"),
        (["initialization.num_samples=5000"], "initialization.num_samples=5000, but there are only 1198"),
        (["space.stages=[5]"], "stages must be distinct numbers"),
        (["output=/dev/null/run"], "/dev/null/run cannot be made"),
        (["sampling.stitches=[99]"], "sampling.stitches: stitch_id 99 is out of range"),
        (["evaluation.stitches=[99]"], "evaluation.stitches: stitch_id 99"),
        (["sampling.stitches_per_step=3"], "64 images at a time, which sampling.stitches_per_step=3 does not divide"),
        (["sampling={stitches: [0, 2], anchor_probability: 0.5}"], "anchor_probability needs both anchors and other"),
        (["sampling={method: sandwich, stitches_per_step: 2}"], "a sandwich is one stitch with its anchors"),
        (["trackers=[no_such]"], "the tracker 'no_such' is not installed"),
        (["modules=[nowhere.py]"], "there is no file nowhere.py"),
        (["training.optimizer=adamz"], "timm cannot make the optimizer 'adamz'"),
        (["training.optimizer_options={speed: 3}"], "timm cannot make the optimizer 'adamw'"),
        (
            ["distillation={kind: hard, teacher: nobody/nothing}", "pretraining=null"],
            "nobody/nothing' cannot be loaded",
        ),
    ],
)
def test_what_cannot_be_done_is_said(overrides: list[str], message: str, tmp_path) -> None:
    recipe = load_recipe(DIGITS, ["trackers=[]", "pretraining.epochs=0", f"output={tmp_path / 'run'}", *overrides])
    with pytest.raises(ValueError, match=re.escape(message)):
        run(recipe)
    assert not (recipe.run_folder / "recipe.yaml").exists()  # the corrected recipe may use the same output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = train(f"output={output}", *EVERYTHING)
    assert result.returncode == 0, result.stderr
    return output


# Of 15 steps of pretraining (3 anchors), then 10 of stitches.
@pytest.mark.parametrize("steps", [pytest.param(7, marks=pytest.mark.slow), 20])
def test_a_killed_run_resumes_to_the_same_bits(steps: int, uninterrupted: Path, tmp_path) -> None:
    output = tmp_path / "run"
    status, _ = start_and_signal(output, EVERYTHING, steps, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert list(Path(f"{output}-run").glob("checkpoint-*[0-9]"))
    result = train(f"output={output}", "--resume", *EVERYTHING)
    assert result.returncode == 0, result.stderr
    expected = weights(uninterrupted)
    resumed = weights(output)
    assert list(resumed) == list(expected)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    logs = [Path(f"{folder}-run") / "draws.tsv" for folder in (output, uninterrupted)]
    assert logs[0].read_text(encoding="utf-8") == logs[1].read_text(encoding="utf-8")
    assert len(list(Path(f"{output}-run").glob("checkpoint-*"))) == 2  # older ones are pruned
    results = [
        json.loads((Path(f"{folder}-run") / "results.json").read_text(encoding="utf-8"))
        for folder in (output, uninterrupted)
    ]
    assert results[0] == results[1]


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path) -> None:
    output = tmp_path / "run"
    overrides = [*TINY, "training.epochs=200"]
    status, errors = start_and_signal(output, overrides, 6, signal.SIGINT)
    assert status == 1
    assert "Traceback" not in errors
    step = int(re.search(r"interrupted after step (\d+) of stitches", errors)[1])
    assert f"checkpoint-00-{step + 1:08d}; --resume goes on from it" in errors
    with pytest.raises(ValueError, match=r"another recipe: training.learning_rate is 0.1, was 0.004"):
        run(load_recipe(DIGITS, [f"output={output}", *overrides, "training.learning_rate=0.1"]), resume=True)
    with pytest.raises(ValueError, match="holds an unfinished or finished run; go on with --resume"):
        run(load_recipe(DIGITS, [f"output={output}", *overrides]))
    with pytest.raises(ValueError, match="there is no run to resume"):
        run(load_recipe(DIGITS, [f"output={output}-2", *overrides]), resume=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path) -> None:
    """Files may grow to 600 kB only: the optimiser's state of the first checkpoints fits, a later one does not."""
    output = tmp_path / "run"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    overrides = [*TINY, "checkpoints.every=1", "training.epochs=20"]
    result = train(f"output={output}", *overrides, preexec_fn=limit)
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert "--resume goes on from it" in result.stderr
    assert not list(Path(f"{output}-run").glob("*.partial"))
    (last,) = re.findall(r"The last good checkpoint is (\S+);", result.stderr)
    assert (Path(last) / "progress.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    overrides = [*TINY, "training.learning_rate=1e30", "training.clip=null", "checkpoints.every=1"]
    message = r"the loss of step \d+, stitch \d+(, \d+)*, is (nan|inf)\. The last good checkpoint"
    with pytest.raises(RunStopped, match=message):
        run(load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *overrides]))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shards there")
def test_sharding_that_would_not_happen_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="Accelerate shards weights only on GPUs; here, choose MULTI_CPU"):
        make_accelerator()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sandwich", ["sampling={method: sandwich}", "distillation={kind: in_place}"]),
        ("groups", ["sampling={method: flops_groups, flops_gap: 5e4}", "evaluation.every=1"]),
        ("rounds", ["sampling={order: rounds, stitches_per_step: 4, anchor_probability: 0.25}"]),
        pytest.param(
            "agc", ["training.clip=agc", "training.clip_at=0.01", "training.optimizer=sgd"], marks=pytest.mark.slow
        ),
        ("smoothed labels", ["training.label_smoothing=0.1", "initialization.method=kaiming"]),
    ],
)
def test_settings_reach_a_finished_run(name: str, overrides: list[str], tmp_path) -> None:
    recipe = load_recipe(DIGITS, [f"output={tmp_path / name}", *TINY, "training.optimizer_options={}", *overrides])
    model = run(recipe)
    assert (tmp_path / name / "model.safetensors.index.json").exists()
    measured = [stitch.id for stitch in model.stitches if "accuracy" in stitch.metrics]
    assert measured == [0, 1, 2, 5]


def test_stitches_that_are_trained_too_little_are_warned_of(tmp_path, caplog) -> None:
    run(load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *TINY, "sampling.anchor_probability=0.25"]))
    # Two epochs of five steps; of three anchors and 32 others, one of the others is drawn least.
    assert "gives a stitch about 0 updates, where 300 are few" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_with_unreadable_ones(streaming: bool, tmp_path, capsys, caplog) -> None:
    """Files, decoded and augmented one by one; what cannot be read is replaced or left out, and counted."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 6)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                PILImage.fromarray(pixels).save(folder / f"{index}.jpg")
            (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:200])
    data = f"data={{dataset: imagefolder, files: {tmp_path / 'images'}, on_corrupt_image: skip, crop_pct: 1.0}}"
    stream = ["data.streaming=true", "data.num_train_images=32"] if streaming else []
    augmentation = "{crop_scale: [0.5, 1.0], auto_augment: rand-m9-mstd0.5-inc1, random_erasing: 0.25, cutmix: 1.0}"
    overrides = [*TINY, data, "data.image_mean=[0.5,0.5,0.5]", "data.image_std=[0.5,0.5,0.5]", *stream]
    overrides.remove("data.test_fraction=0.8")
    overrides += ["training.batch_size=8", "initialization.num_samples=10", "evaluation.batch_size=5"]
    model = run(
        load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *overrides, f"training.augmentation={augmentation}"])
    )
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert "replaced_images" in capsys.readouterr().out
    assert "another image takes its place" in caplog.text
    assert "test/cat/0.jpg" in caplog.text
    correct = model.stitches[0].metrics["accuracy"] * 10  # of 12 test images
    assert correct == pytest.approx(round(correct))


def test_labels_that_are_numbers_are_the_pretrained_anchors_classes(tmp_path) -> None:
    """Of 1,000 classes, which a pipeline tells in words."""
    image, rows = PILImage.new("RGB", (8, 8)), {"label": [1] * 63 + [999]}
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for split in ("train", "test"):
        Dataset.from_dict({"image": [image] * 64, **rows}, features).to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    data = f"data={json.dumps({'dataset': 'parquet', 'files': files, 'image_size': 8})}"
    overrides = [data, "pretraining=null", "training.epochs=0", "training.warmup_epochs=0", "pretrained=true"]
    overrides += ["initialization.num_samples=20", "evaluation={throughput: false, stitches: [0, 1, 2]}", "trackers=[]"]
    overrides += [f"output={tmp_path / 'run'}", "training.batch_size=8", "training.augmentation={}"]
    anchors = load_recipe(DIGITS).anchors
    for number, anchor in enumerate(anchors):
        path = tmp_path / f"anchor-{number}.safetensors"
        save_file(timm.create_model(anchor.architecture, **anchor.kwargs).state_dict(), path)
        overrides += [f"anchors.{number}.weights={path}"]
    model = run(load_recipe(DIGITS, overrides)).eval()
    assert (model.config.num_labels, model.config.id2label[1]) == (1000, "goldfish, Carassius auratus")
    theirs = timm.create_model(anchors[2].architecture, **anchors[2].kwargs).eval()
    theirs.load_state_dict(load_file(path))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x, stitch_id=2).logits, theirs(x))  # with its classifier
    classify = pipeline("image-classification", str(tmp_path / "run"))
    assert {answer["label"] for answer in classify(image, top_k=1000)} == set(in_words(ImageNetInfo().label_names()))


def test_mixed_precision(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = run(load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *TINY]))
    assert model.dtype == torch.float32  # the weights stay in full precision
    assert math.isfinite(model.stitches[5].metrics["loss"])


def test_training_the_stitching_layers_alone_leaves_the_anchors_as_they_were(tmp_path) -> None:
    overrides = [f"output={tmp_path / 'run'}", *TINY, "training.trainable=stitching_layers"]
    model = run(load_recipe(DIGITS, overrides))
    _fresh()
    untrained = run(load_recipe(DIGITS, [*overrides, f"output={tmp_path / 'untrained'}", "training.epochs=0"]))
    expected = untrained.state_dict()
    differing = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])}
    assert differing
    assert all(name.startswith("stitching_layers.") for name in differing)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_its_own_is_taught_and_an_interrupted_run_goes_on_behind_finished_stitches(
    tmp_path, monkeypatch
) -> None:
    overrides = [f"output={tmp_path / 'run'}", *TINY, "training.trainable=own", "sampling.stitches=[0,3,4]"]
    teach_together, taught = own.teach_together, []

    def interrupted(model, stitch_ids, *arguments):
        if taught == [3]:
            raise KeyboardInterrupt
        taught.extend(stitch_ids)
        return teach_together(model, stitch_ids, *arguments)

    monkeypatch.setattr(own, "teach_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(DIGITS, overrides))
    _fresh()
    monkeypatch.setattr(own, "teach_together", lambda *given: taught.extend(given[1]) or teach_together(*given))
    model = run(load_recipe(DIGITS, overrides), resume=True)
    assert taught == [3, 4]
    assert [stitch.id for stitch in model.stitches if stitch.own] == [3, 4]
    _fresh()
    untaught = run(load_recipe(DIGITS, [*overrides, f"output={tmp_path / 'untaught'}", "training.epochs=0"]))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in untaught.state_dict().items())
    saved = StitchableForImageClassification.from_pretrained(tmp_path / "run", stitch_id=3)
    assert set(saved.own) == {"3"}


# Adam would blow rounding up where a gradient is nearly zero.
@pytest.mark.parametrize(
    "program",
    [
        "-m stitchable.training --recipe",
        pytest.param("-m stitchable_cli train", marks=pytest.mark.slow),
        pytest.param("script", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_started_whatever_starts_the_trainer(program: str, tmp_path) -> None:
    """In a folder without the repository; they say how many they are where a batch cannot be shared."""
    started = [str(ROOT / "training" / "train.py"), "--recipe"] if program == "script" else program.split()
    result = subprocess.run(
        [sys.executable, *TWO_ON_A_CPU, *started, "digits", "training.batch_size=63", "trackers=[]", "output=run"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "training.batch_size=63 images cannot be shared equally by 2 processes" in result.stderr


PLAIN = [*TINY, "training.clip=null", "training.optimizer=sgd", "training.optimizer_options={}"]
PLAIN += ["sampling.stitches_per_step=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(load_recipe(DIGITS, [f"output={folder}", *PLAIN]))
    _fresh()
    return folder


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile, while it looks at a block
@pytest.mark.parametrize(
    "name",
    [
        "two accumulated gradients",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("two processes", "compiled blocks")),
    ],
)
def test_however_it_is_launched_it_is_the_same_training(name: str, alone: Path, tmp_path, monkeypatch) -> None:
    """The same images and stitches, so the same weights up to rounding."""
    output = tmp_path / "run"
    if name == "two processes":
        result = train(f"output={output}", *PLAIN, launcher=TWO)
        assert result.returncode == 0, result.stderr
    else:
        # What `accelerate launch --dynamo_backend eager` tells the script.
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER" if "compiled" in name else "NO")
        accumulation = "gradient_accumulation_steps=2" if "gradients" in name else "gradient_accumulation_steps=1"
        model = run(load_recipe(DIGITS, [f"output={output}", *PLAIN, accumulation]))
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert len(compiled) == (18 if "compiled" in name else 0)
    expected = weights(alone)
    for tensor_name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-3, atol=1e-3)
    lines = [
        (Path(f"{folder}-run") / "draws.tsv").read_text(encoding="utf-8").splitlines() for folder in (output, alone)
    ]
    assert [line.split("\t")[:3] for line in lines[0]] == [line.split("\t") for line in lines[1]]


def test_a_run_resumed_with_accumulated_gradients_is_the_same_training(tmp_path) -> None:
    """From a checkpoint after an odd number of steps, so that a step could take halves of two batches."""
    overrides = [*PLAIN, "training.augmentation={}", "training.learning_rate=0.1", "checkpoints={every: 3, keep: 9}"]
    run(load_recipe(DIGITS, [f"output={tmp_path / 'whole'}", *overrides]))
    run_folder = tmp_path / "parts-run"
    shutil.copytree(tmp_path / "whole-run", run_folder)
    for path in [*run_folder.glob("checkpoint-*[!3]"), *run_folder.glob("evaluation-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [path.name for path in run_folder.glob("checkpoint-*")] == ["checkpoint-00-00000003"]
    _fresh()
    overrides = [f"output={tmp_path / 'parts'}", *overrides, "gradient_accumulation_steps=2"]
    run(load_recipe(DIGITS, overrides), resume=True)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert (run_folder / "draws.tsv").read_bytes() == (tmp_path / "whole-run" / "draws.tsv").read_bytes()


def test_what_may_change_when_a_run_is_resumed(tmp_path) -> None:
    """A stream is dealt out to its workers: with others, some images of the epoch would come twice and others never."""
    data = ["data.dataset=imagefolder", f"data.files={tmp_path}", "data.class_names=[a, b]", "data.in_memory=false"]
    data += ["pretraining=null", "training.augmentation={}", f"output={tmp_path / 'run'}"]
    streamed = [*data, "data.streaming=true", "data.num_train_images=64"]
    changes = ["data.num_workers=2", "gradient_accumulation_steps=2", "evaluation.batch_size=7"]
    write_recipe(load_recipe(DIGITS, data))
    check_same_recipe(load_recipe(DIGITS, [*data, *changes]))
    write_recipe(load_recipe(DIGITS, streamed))
    check_same_recipe(load_recipe(DIGITS, [*streamed, *changes[1:]]))
    with pytest.raises(ValueError, match=r"of another recipe: data\.num_workers is 2, was 0$"):
        check_same_recipe(load_recipe(DIGITS, [*streamed, *changes]))
    checkpoint = Checkpoints(tmp_path, keep=1).save(make_accelerator(), 0, 7, {})
    check_same_processes(read_progress(checkpoint), 1)
    with pytest.raises(ValueError, match="dealt out to 1 processes, so that with 2 some images would come twice"):
        check_same_processes(read_progress(checkpoint), 2)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path) -> None:
    message = r"training.batch_size=64 images cannot be shared equally by 1 processes with 3 .*; take a multiple of 3"
    with pytest.raises(ValueError, match=message):
        run(load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *TINY, "gradient_accumulation_steps=3"]))


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch) -> None:
    """A run that was killed after its last evaluation publishes the same figures without another one."""
    recipe = load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *TINY])
    run(recipe)
    table = (tmp_path / "run" / "config.json").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "run")
    _fresh()
    evaluated = []
    monkeypatch.setattr(
        "stitchable.training.train.evaluate_resumably", lambda *arguments, **options: evaluated.append(arguments)
    )
    run(recipe, resume=True)
    assert not evaluated
    assert (tmp_path / "run" / "config.json").read_text(encoding="utf-8") == table


def test_an_unfinished_checkpoint_is_none(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for name in ("checkpoint-00-00000009", "checkpoint-01-00000002", "checkpoint-01-00000004.partial"):
        (tmp_path / name).mkdir()
    assert checkpoints.latest() == tmp_path / "checkpoint-01-00000002"


@pytest.mark.slow
def test_two_processes_publish_what_they_saved(tmp_path) -> None:
    """Random stitching layers, which each process draws for itself."""
    overrides = [*TINY, "training.epochs=0", "initialization.method=kaiming"]
    result = train(f"output={tmp_path / 'two'}", *overrides, launcher=TWO)
    assert result.returncode == 0, result.stderr
    recipe = load_recipe(DIGITS, overrides)
    model = StitchableForImageClassification.from_pretrained(tmp_path / "two")
    published = {stitch.id: stitch.metrics for stitch in model.stitches if stitch.metrics}
    processor = image_processor(model.config, crop_pct=recipe.data.crop_pct)
    loader = make_test_loader(load_data(recipe.data).test, recipe.data, processor, 512, Accelerator(cpu=True))
    for stitch_id, metrics in evaluate(model, loader, list(published)).items():
        assert metrics == pytest.approx(published[stitch_id], rel=1e-5)


@pytest.mark.slow
def test_the_digits_curve_is_real(tmp_path) -> None:
    """No stitch is below the cheapest anchor, and the joint training does not ruin the anchors."""
    result = train(f"output={tmp_path / 'run'}", launcher=ONE)
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["stitches"]
    accuracy = {stitch["id"]: stitch["metrics"]["accuracy"] for stitch in table}
    assert min(accuracy.values()) == accuracy[0]
    before = json.loads((tmp_path / "run-run" / "results.json").read_text(encoding="utf-8"))["before"]
    assert all(accuracy[anchor] > before[str(anchor)]["accuracy"] - 0.02 for anchor in range(3))
