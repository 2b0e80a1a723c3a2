"""Stitch EfficientNet-Lite 0, 1 and 2 with their ImageNet weights, on images of yours or on two photographs.

    make demo-imagenet IMAGES=FOLDER
    make demo-imagenet

With a folder of images: least squares, the promising stitches, and what their anchors teach them without labels,
measured as agreement with the largest anchor on images held out. Without, scikit-learn's two photographs fit the
stitching layers, which is enough to see the page and the times, and says nothing about accuracy.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import efficientnet_lite
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import stitchable
from stitchable.card import Card
from stitchable.images import read_batches
from stitchable.latency import calibrate
from stitchable.processing import image_processor
from stitchable.publishing import check_new_folder, save_repository
from stitchable.training.own import Teaching
from stitchable.training.tuning import first_images, in_batches, tune

FIT_ON, SCORE_ON, TAUGHT_ON = 100, 100, 1000  # images
STITCHES, BATCH_SIZE = 4, 16
CROPS = 32  # of the two photographs


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of images; scikit-learn's two photographs if left out")
    parser.add_argument("--output", type=Path, default=Path("runs/imagenet"), help="new folder of the model")
    parser.add_argument("--image-size", type=int, default=160, help="pixels")
    parser.add_argument("--steps", type=int, default=100, help="updates of each stitch that is taught")
    given = parser.parse_args(arguments)
    try:
        run(given.images, given.output, given.image_size, given.steps)
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(images: Path | None, output: Path, image_size: int, steps: int) -> None:
    """Make the model and say what was done.

    Raises:
        ValueError: a package or folder that is missing, images that cannot be read or are too few, or an output that
            holds something.
    """
    if images is not None and not images.is_dir():
        raise ValueError(f"IMAGES is a folder of images, and {images} is none")
    check_new_folder(output)
    model: Any = stitchable.from_anchors(efficientnet_lite.published(), image_size=image_size).eval()
    names = [anchor["architecture"] for anchor in model.config.anchors]
    print(f"{len(model.stitches)} networks of {', '.join(names)} with ImageNet weights, at {image_size} pixels")
    model = on_two_photographs(model, output) if images is None else on_images(model, images, steps)
    found = calibrate(model)
    milliseconds = [stitch.latency_ms for stitch in model.stitches]
    print(
        f"a call takes {min(milliseconds):.0f} to {max(milliseconds):.0f} ms on {found['device']}, one image at a time"
    )
    save_repository(model, output, processor_of(model), Card(output.resolve().name))
    shown = images if images is not None else photographs_of(output)
    print(f"{output}: stitchable table {output}; stitchable app {output} --images {shown}")


def processor_of(model: Any) -> Any:
    """As timm evaluates these networks."""
    return image_processor(model.config, crop_pct=0.875, interpolation="bicubic")


def on_images(model: Any, images: Path, steps: int) -> Any:
    """Least squares, selection and teaching, without a look at labels."""
    pixel_values, _ = first_images(read_batches(str(images), processor_of(model), batch_size=BATCH_SIZE), TAUGHT_ON)
    print(f"{len(pixel_values)} images of {images}, whose labels, if any, are not looked at")
    fit(model, pixel_values[:FIT_ON])
    model = stitchable.select(model, pixel_values[:SCORE_ON].split(BATCH_SIZE), number=STITCHES)
    ids = [stitch.id for stitch in model.stitches if not stitch.is_anchor]
    print(f"of the stitches that cost about the same, those nearest to the anchor at their end are kept: {ids}")
    start = time.monotonic()
    teaching = Teaching(steps=steps)
    scores = tune(model, pixel_values, None, ids, teaching, batch_size=BATCH_SIZE, say=print)
    minutes = (time.monotonic() - start) / 60
    print(f"{steps} updates of each stitch in {minutes:.1f} minutes; on images held out, they agree with the largest")
    print("anchor as follows, which is no accuracy (stitchable eval measures that on images with labels):")
    for stitch_id, (before, after) in scores.items():
        print(f"  stitch {stitch_id}: {100 * before:.1f} -> {100 * after:.1f} %")
    return model


def on_two_photographs(model: Any, output: Path) -> Any:
    """Least squares on crops of them, and what the networks make of the photographs."""
    folder = photographs_of(output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number, photograph in enumerate(photographs):
        photograph.save(folder / f"{number}.png")
    processor = processor_of(model)
    fit(model, processor(images=crops(photographs), return_tensors="pt")["pixel_values"])
    print("fitted on crops of two photographs: enough for the page and the times, far too few for accuracy, which was")
    print("not measured; give a folder of a few hundred images or more: make demo-imagenet IMAGES=FOLDER")
    pixel_values = processor(images=photographs, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        for stitch in model.stitches:
            if stitch.is_anchor:
                best = model(pixel_values, stitch_id=stitch.id).logits.argmax(1).tolist()
                said = ", ".join(model.config.id2label[number] for number in best)
                print(f"  {model.config.anchors[stitch.id]['architecture']} sees: {said}")
    agreement = stitchable.evaluation.measure_agreement(model, in_batches(pixel_values, None))
    same = sum(part == 1 for part in agreement.values())
    print(f"  {same} of {len(agreement)} networks see the same as the largest")
    for stitch in model.stitches:  # two photographs are no measurement
        model.record(stitch.id, metrics={})
    return model


def fit(model: Any, pixel_values: torch.Tensor) -> None:
    """Least squares."""
    start = time.monotonic()
    layers = stitchable.initialize_stitches(model, pixel_values.split(BATCH_SIZE), num_samples=len(pixel_values))
    print(f"{len(layers)} stitching layers by least squares in {time.monotonic() - start:.0f} seconds")


def crops(photographs: list[Image.Image]) -> list[Image.Image]:
    """Square parts of the photographs, of many sizes, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(CROPS):
        photograph = photographs[number % len(photographs)]
        shortest = min(photograph.size)
        side = int(torch.randint(shortest // 3, shortest + 1, (), generator=generator))
        left, top = (int(torch.randint(length - side + 1, (), generator=generator)) for length in photograph.size)
        found.append(photograph.crop((left, top, left + side, top + side)))
    return found


def photographs_of(output: Path) -> Path:
    """Where the two photographs go, for the page."""
    return output.with_name(f"{output.name}-photographs")


if __name__ == "__main__":
    main()
