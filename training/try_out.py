"""Load a checkpoint folder as its users do, where stitchable is not installed, and print predictions at two budgets.

python training/try_out.py FOLDER IMAGE [IMAGE ...]
"""

import sys
import warnings

# The package may be installed beside this script; its users need not have it.
sys.modules["stitchable"] = None  # type: ignore[assignment]
warnings.filterwarnings("ignore")

from transformers import AutoModelForImageClassification, pipeline  # noqa: E402
from transformers.utils import logging  # noqa: E402


def main(folder: str, images: list[str]) -> None:
    """Print the top prediction for each image at two budgets: the cheapest stitch, and half of the dearest one."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("image-classification", model=model, image_processor=folder)
    flops = sorted(stitch.flops for stitch in model.stitches)
    for budget in (flops[0], flops[-1] / 2):
        stitch = model.for_budget(budget)
        print(
            f"budget {budget / 1e6:.2f} MFLOPs: stitch {stitch.id}, accuracy {100 * stitch.metrics['accuracy']:.2f} %"
        )
        for image, predictions in zip(images, classify(images, top_k=1), strict=True):
            print(f"    {image.rsplit('/', 1)[-1]}: {predictions[0]['label']} ({predictions[0]['score']:.3f})")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
