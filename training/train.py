"""Make a stitchable model: anchors in, one checkpoint with every stitch trained and measured out.

    accelerate launch training/train.py --recipe training/recipes/digits.yaml key.path=value ...

Algorithm 1 of Stitchable Neural Networks (Pan et al., CVPR 2023): fit the stitching layers by least squares, then train
everything together, one randomly drawn stitch per step.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from data import load_data, make_loader, preprocess
from recipe import Recipe, Schedule, load_recipe
from sampling import UniformSampler
from stitchable import StitchableForImageClassification, evaluate, initialize_stitches
from stitchable.processing import image_processor
from stitchable.publishing import Card, save_repository


def main() -> None:
    """Run a recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", required=True, help="a YAML file, such as training/recipes/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values to change in the recipe")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        output = new_folder(recipe.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    run(recipe, output)


def run(recipe: Recipe, output: Path) -> StitchableForImageClassification:
    """Everything a recipe asks for, from data to a folder that is a Hub repository."""
    # A step uses the parameters of one stitch; DDP must be told, or it silently stops averaging.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
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
    processor = image_processor(model.config, crop_pct=recipe.data.crop_pct)
    train_set, test_set = preprocess(dataset["train"], processor), preprocess(dataset["test"], processor)
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
    samples = make_loader(train_set, 100, affine=0, seed=recipe.seed)
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
        card = Card(name=recipe.name, dataset=recipe.data.dataset, recipe=recipe.model_dump(exclude_none=True))
        save_repository(model, output, processor, card)
        try_out(output, dataset["test"])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return model


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
    accelerator.free_memory()


def try_out(folder: Path, dataset, num_images: int = 4) -> None:
    """Load the folder as a user does, in a fresh process that cannot import stitchable, and print predictions."""
    rows = list(dataset.select(range(num_images)))
    with tempfile.TemporaryDirectory() as images:
        paths = [Path(images) / f"{index}_is_{row['label']}.png" for index, row in enumerate(rows)]
        for path, row in zip(paths, rows, strict=True):
            row["image"].save(path)
        subprocess.run([sys.executable, Path(__file__).with_name("try_out.py"), folder, *paths], check=True)


def new_folder(path: str) -> Path:
    """A folder for the results of a run.

    Raises:
        ValueError: it already holds something.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already holds another run; choose another with output=FOLDER or remove it")
    return folder


def _mean_accuracy(measured: dict[int, dict[str, float]]) -> float:
    return sum(metrics["accuracy"] for metrics in measured.values()) / len(measured)


def _line(measured: dict[int, dict[str, float]]) -> str:
    return ", ".join(f"anchor {i}: {100 * metrics['accuracy']:.2f} %" for i, metrics in measured.items())


if __name__ == "__main__":
    main()
