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
from stitchable.fingerprints import Watch
from stitchable.training.losses import StitchLoss
from stitchable.training.sampling import StitchSampler
from stitchable.training.trainer import StitchTrainer
from test_distributed import TESTS, launch

OURS = {"sampler", "stitches_per_step", "anchor_probability", "own", "stitch_loss"}


def trainer(folder: Path, family: str = "vit", **settings: object) -> StitchTrainer:
    ours = {name: settings.pop(name) for name in OURS & settings.keys()}
    x = images(family, 8)
    rows = [{"pixel_values": pixels, "labels": number % 5} for number, pixels in enumerate(x)]
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return StitchTrainer(make(family), arguments, train_dataset=rows, eval_dataset=rows, **ours)


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


def test_what_was_measured_is_forgotten_and_what_trains_remembered(tmp_path) -> None:
    training = trainer(tmp_path, max_steps=1)
    model = training.model
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    training.train()
    assert not any(stitch.metrics for stitch in model.stitches)
    watch = Watch([images("vit", 8)], model.config)
    assert len(list(watch)) == 1
    assert watch.num_known == 8


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


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_two_processes_train_what_one_does(k: int, tmp_path) -> None:
    losses = []
    for number in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
        output = launch("distributed_trainer.py", *launcher, arguments=(tmp_path / str(number), k))
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


def test_several_stitches_share_a_batch(tmp_path) -> None:
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd", "max_grad_norm": 0.0}
    settings |= {"lr_scheduler_type": "constant"}
    training = trainer(tmp_path, stitches_per_step=2, anchor_probability=0.5, **settings)
    training.train()
    drawn = training.sampler.draw(0)
    assert len(drawn) == 2
    reference = make("vit")
    batch = next(iter(training.get_train_dataloader()))
    for j, stitch_id in enumerate(drawn):
        output = reference(batch["pixel_values"][j::2], labels=batch["labels"][j::2], stitch_id=stitch_id)
        (output.loss / 2).backward()
    for (name, value), expected in zip(training.model.named_parameters(), reference.parameters(), strict=True):
        moved = expected if expected.grad is None else expected - 1e-2 * expected.grad
        torch.testing.assert_close(value, moved, rtol=1e-4, atol=1e-6, msg=name)


def test_what_stitches_cannot_share_is_refused_or_left_out(tmp_path) -> None:
    with pytest.raises(ValueError, match="must divide per_device_train_batch_size, which is 3"):
        trainer(tmp_path, stitches_per_step=2, per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="are for a sampler that is made here"):
        trainer(tmp_path, sampler=StitchSampler(make("vit").stitches), anchor_probability=0.5)
    training = trainer(tmp_path, stitches_per_step=3, per_device_train_batch_size=6)  # 6 images, then 2
    assert training.train().global_step == 6


def test_own_parameters_leave_the_anchors_as_they_are(tmp_path) -> None:
    training = trainer(tmp_path, own=2, stitches_per_step=2, max_steps=4)
    model = training.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    drawn = {i for step in range(4) for i in training.sampler.draw(step)}
    assert drawn
    assert all(model.stitches[i].own for i in drawn)
    assert {name.split(".")[1] for name in moved if name.startswith("own.")} == {str(i) for i in drawn}
    assert all(name.startswith("own.") for name in moved)
    training.save_model(str(tmp_path / "saved"))
    loaded = StitchableForImageClassification.from_pretrained(tmp_path / "saved")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    with pytest.raises(ValueError, match="so they have no anchor_probability"):
        trainer(tmp_path, own=2, anchor_probability=0.5)
    with pytest.raises(ValueError, match="for a sampler that is made here"):
        trainer(tmp_path, own=2, sampler=training.sampler)


def test_the_statistics_of_batch_norms_stay(tmp_path) -> None:
    training = trainer(tmp_path, family="resnet", max_steps=2)
    before = {name: value.clone() for name, value in training.model.named_buffers()}
    weights = {name: value.detach().clone() for name, value in training.model.named_parameters()}
    training.train()
    assert before
    assert all(torch.equal(value, before[name]) for name, value in training.model.named_buffers())
    assert any(not torch.equal(value, weights[name]) for name, value in training.model.named_parameters())


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
