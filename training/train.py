"""Make a stitchable model: anchors in, one checkpoint with every stitch trained and measured out.

    accelerate launch training/train.py --recipe training/recipes/digits.yaml key.path=value ...

Algorithm 1 of Stitchable Neural Networks (Pan et al., CVPR 2023): fit the stitching layers by least squares, then train
everything together, one randomly drawn stitch per step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from data import load_data, make_loader, preprocess, random_subset
from recipe import Recipe, Schedule, load_recipe
from sampling import UniformSampler
from stitchable import StitchableForImageClassification, evaluate, initialize_stitches
from stitchable.processing import image_processor
from stitchable.publishing import Card, check_new_folder, save_repository


def main() -> None:
    """Run a recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", required=True, help="a YAML file, such as training/recipes/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values to change in the recipe")
    arguments = parser.parse_args()
    try:
        run(load_recipe(arguments.recipe, arguments.overrides))
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(recipe: Recipe) -> StitchableForImageClassification:
    """Everything a recipe asks for, from data to a folder that is a Hub repository.

    Raises:
        ValueError: what the recipe asks for cannot be done; as far as can be known, before anything is trained.
    """
    output = Path(recipe.output)
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        check_new_folder(output)
    say = accelerator.print
    set_seed(recipe.seed)

    say(f"1/6 data: {recipe.data.dataset}")
    dataset = load_data(recipe.data)
    names = dataset["train"].features["label"].names
    model = StitchableForImageClassification.from_anchors(
        [anchor.model_dump() for anchor in recipe.anchors],
        pretrained=recipe.pretraining is None,
        id2label=dict(enumerate(names)),
        image_mean=recipe.data.image_mean,
        image_std=recipe.data.image_std,
        **recipe.space.model_dump(),
    )
    if accelerator.process_index:
        # The same weights everywhere until here; from now on each further process augments in its own way.
        torch.manual_seed(recipe.seed + accelerator.process_index)
    processor = image_processor(model.config, crop_pct=recipe.data.crop_pct)
    train_set, test_set = preprocess(dataset["train"], processor), preprocess(dataset["test"], processor)
    check_sizes(recipe, len(train_set))
    test_loader = make_loader(test_set, 512)
    anchors = [stitch.id for stitch in model.stitches if stitch.is_anchor]
    say(f"    {len(train_set)} training and {len(test_set)} test images; {len(model.stitches)} stitches")

    if recipe.pretraining:
        say(f"2/6 pretraining {len(anchors)} anchors")
        for anchor in anchors:
            fit(accelerator, model, train_set, recipe.pretraining, [anchor], recipe.seed, f"anchor {anchor}")
    model.to(accelerator.device)
    before = evaluate(model, test_loader, anchors)
    say("    " + _line(before))

    say(f"3/6 initialising the stitching layers: {recipe.initialization.method}")
    samples = make_loader(random_subset(train_set, recipe.initialization.num_samples, recipe.seed), 100)
    initialize_stitches(model, samples, **recipe.initialization.model_dump())
    initialized = evaluate(model, tqdm(test_loader, desc="evaluating", disable=not accelerator.is_main_process))
    say(f"    mean accuracy of all stitches {100 * _mean_accuracy(initialized):.2f} %")

    say("4/6 training all stitches together")
    fit(accelerator, model, train_set, recipe.training, [s.id for s in model.stitches], recipe.seed, "all stitches")

    say("5/6 evaluating all stitches")
    after = evaluate(model, tqdm(test_loader, desc="evaluating", disable=not accelerator.is_main_process))
    say(f"    mean accuracy of all stitches {100 * _mean_accuracy(after):.2f} %")
    say("    " + _line({anchor: after[anchor] for anchor in anchors}))

    if accelerator.is_main_process:
        say(f"6/6 saving {output}")
        card = Card(
            name=recipe.name,
            dataset=recipe.data.dataset,
            recipe=yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False),
            accuracy_before={anchor: metrics["accuracy"] for anchor, metrics in before.items()},
        )
        save_repository(model, output, processor, card)
        try_out(output, dataset["test"])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return model


def make_accelerator() -> Accelerator:
    """An Accelerator for steps that use a part of the parameters, on whatever the launcher started.

    Raises:
        ValueError: the launcher started several processes that would not train together.
    """
    # DDP must be told that a step leaves parameters out, or it silently stops averaging gradients.
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, Accelerate makes a process group of torchrun's processes only if told to stay on the CPU.
    on_cpu = num_processes > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[handler])
    if accelerator.num_processes != num_processes:
        raise ValueError(f"{num_processes} processes were started, but Accelerate sees {accelerator.num_processes}")
    return accelerator


def check_sizes(recipe: Recipe, num_images: int) -> None:
    """Refuse batches and samples that the training set cannot fill.

    Raises:
        ValueError: names the setting, what it is, and what is possible.
    """
    wanted = {"training.batch_size": recipe.training.batch_size}
    if recipe.pretraining:
        wanted["pretraining.batch_size"] = recipe.pretraining.batch_size
    if recipe.initialization.method == "least_squares":
        wanted["initialization.num_samples"] = recipe.initialization.num_samples
    for name, number in wanted.items():
        if number > num_images:
            raise ValueError(f"{name}={number}, but there are only {num_images} training images")


def fit(
    accelerator: Accelerator,
    model: StitchableForImageClassification,
    dataset: torch.utils.data.Dataset,
    schedule: Schedule,
    stitch_ids: list[int],
    seed: int,
    title: str,
) -> None:
    """Train the model in place, each step one stitch drawn from `stitch_ids`."""
    loader = make_loader(dataset, schedule.batch_size, affine=schedule.affine, seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, int(schedule.warmup_epochs * len(loader)), max(1, schedule.epochs * len(loader))
    )
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    wrapped.train()
    draws = iter(UniformSampler(stitch_ids, seed))
    progress = tqdm(total=schedule.epochs * len(loader), desc=title, disable=not accelerator.is_main_process)
    for _ in range(schedule.epochs):
        for batch in loader:
            stitch_id = next(draws)
            loss = wrapped(**batch, stitch_id=stitch_id).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), schedule.max_grad_norm)
            optimizer.step()
            scheduler.step()
            # Gradients become None, so that the optimiser leaves alone what the next step does not use.
            optimizer.zero_grad(set_to_none=True)
            progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    progress.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()


def try_out(folder: Path, dataset, num_images: int = 4) -> None:
    """Load the folder as a user does, in a fresh process that cannot import stitchable, and print predictions."""
    rows = list(dataset.select(range(num_images)))
    with tempfile.TemporaryDirectory() as images:
        paths = [Path(images) / f"{index}_is_{row['label']}.png" for index, row in enumerate(rows)]
        for path, row in zip(paths, rows, strict=True):
            row["image"].save(path)
        subprocess.run([sys.executable, Path(__file__).with_name("try_out.py"), folder, *paths], check=True)


def _mean_accuracy(measured: dict[int, dict[str, float]]) -> float:
    return sum(metrics["accuracy"] for metrics in measured.values()) / len(measured)


def _line(measured: dict[int, dict[str, float]]) -> str:
    return ", ".join(f"anchor {i}: {100 * metrics['accuracy']:.2f} %" for i, metrics in measured.items())


if __name__ == "__main__":
    main()
