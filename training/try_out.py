"""Load a checkpoint folder as its users do, in a fresh process, and print predictions at two budgets.

    python training/try_out.py FOLDER [--modules FILE ...] --images IMAGE [IMAGE ...]

Without modules, stitchable is kept from being imported: the users of a checkpoint need not have it installed. With a
family of one's own they need it, and the files that register the family.
"""

import argparse
import sys
import warnings

from transformers import AutoModelForImageClassification, pipeline
from transformers.utils import logging


def main() -> None:
    """Print the top prediction for each image at two budgets: the cheapest stitch, and half of the dearest one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--modules", nargs="*", default=[])
    parser.add_argument("--images", nargs="+", required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    if arguments.modules:
        from plan import run_modules

        run_modules(arguments.modules)
    else:
        sys.modules["stitchable"] = None  # type: ignore[assignment]
    folder, images = arguments.folder, arguments.images
    logging.disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("image-classification", model=model, image_processor=folder)
    flops = sorted(stitch.flops for stitch in model.stitches if "accuracy" in stitch.metrics)
    for budget in (flops[0], max(flops[0], flops[-1] / 2)):
        stitch = model.for_budget(budget)
        print(
            f"budget {budget / 1e6:.2f} MFLOPs: stitch {stitch.id}, accuracy {100 * stitch.metrics['accuracy']:.2f} %"
        )
        for image, predictions in zip(images, classify(images, top_k=1), strict=True):
            print(f"    {image.rsplit('/', 1)[-1]}: {predictions[0]['label']} ({predictions[0]['score']:.3f})")


if __name__ == "__main__":
    main()
