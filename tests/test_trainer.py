"""The Trainer of transformers that draws stitches: trained, saved, resumed, evaluated."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import TrainingArguments

from families import images, make
from hub_server import TOKEN, Hub
from processes import run_python
from stitchable import StitchableForImageClassification
from stitchable.training.losses import StitchLoss
from stitchable.training.sampling import StitchSampler
from stitchable.training.trainer import StitchTrainer
from test_distributed import TESTS, launch


def trainer(folder: Path, **settings: object) -> StitchTrainer:
    x = images("vit", 8)
    rows = [{"pixel_values": pixels, "labels": number % 5} for number, pixels in enumerate(x)]
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return StitchTrainer(make("vit"), arguments, train_dataset=rows, eval_dataset=rows)


def test_each_step_trains_the_stitch_that_the_sampler_draws(tmp_path) -> None:
    training = trainer(tmp_path, max_steps=1, lr_scheduler_type="constant")
    model = training.model
    (drawn,) = training.sampler.draw(0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    training.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    reference = make("vit")
    reference(images("vit", 2), labels=torch.arange(2), stitch_id=drawn).loss.backward()
    assert moved == {name for name, value in reference.named_parameters() if value.grad is not None}


def test_a_resumed_training_is_the_same_and_loads(tmp_path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    parts = trainer(tmp_path / "parts")
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = whole.model.state_dict()
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    parts.save_model(str(tmp_path / "saved"))
    loaded = StitchableForImageClassification.from_pretrained(tmp_path / "saved")
    x = images("vit", 8)
    loss = loaded.eval()(x, labels=torch.arange(8) % 5).loss
    assert parts.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_sandwich_of_accumulated_gradients_is_that_of_whole_batches(tmp_path) -> None:
    weights = []
    for name, parts in (("whole", 1), ("parts", 2)):
        settings = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        training = trainer(tmp_path / name, max_steps=3, optim="sgd", max_grad_norm=0.0, **settings)
        training.sampler = StitchSampler(training.model.stitches, method="sandwich")
        training.stitch_loss = StitchLoss(kind="in_place")
        training.train()
        weights.append(training.model.state_dict())
    before = make("vit").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in weights[0].items())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_train_what_one_does(tmp_path) -> None:
    losses = []
    for number in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
        output = launch("distributed_trainer.py", *launcher, arguments=(tmp_path / str(number),))
        (line,) = [line for line in output.splitlines() if line.startswith("processes ")]
        assert line.split()[1] == str(number)
        losses.append(float(line.split()[3]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    alone, together = (
        StitchableForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("1", "2")
    )
    before = make("vit").state_dict()
    assert sum(not torch.equal(value, before[name]) for name, value in alone.items()) > 10
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)


PUSH = """
from families import images, make
from stitchable.training.trainer import StitchTrainer
from transformers import TrainingArguments

rows = [{"pixel_values": pixels, "labels": number % 5} for number, pixels in enumerate(images("vit", 8))]
options = {"max_steps": 2, "hub_model_id": "someone/tuned", "report_to": [], "disable_tqdm": True, "use_cpu": True}
training = StitchTrainer(make("vit"), TrainingArguments("tuned", **options), train_dataset=rows)
training.train()
training.push_to_hub()
"""


def test_what_was_trained_is_pushed(tmp_path) -> None:
    with Hub() as hub:
        path = os.pathsep.join(str(TESTS / folder) for folder in (".", "../src"))
        run_python(PUSH, cwd=tmp_path, HF_TOKEN=TOKEN, PYTHONPATH=path, **hub.environment(tmp_path / "cache"))
        repository = hub.repositories["someone/tuned"]
    pushed = repository.trees[repository.branches["main"][-1]]
    assert {"README.md", "config.json", "modeling_stitchable.py", "model.safetensors.index.json"} <= set(pushed)
    weights = load(pushed["model-anchor-1.safetensors"])
    expected = StitchableForImageClassification.from_pretrained(tmp_path / "tuned").state_dict()
    assert weights
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
