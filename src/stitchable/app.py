"""A page to try a stitchable model on: an image, a slider over the budget, two stitches side by side.

`stitchable app MODEL` shows it. The same file is the `app.py` of a Hugging Face Space whose requirements name
`stitchable[app]`: there the variable STITCHABLE_MODEL says which model, and the folder "images" holds more pictures.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image, ImageOps
from transformers import BaseImageProcessor

from stitchable import StitchableForImageClassification
from stitchable.card import SAMPLE, short_names
from stitchable.model.routes import Stitch
from stitchable.plots import flops_unit, plot_stitches, route_in_words
from stitchable.processing import to_rgb
from stitchable.publishing import processor_of

TIMED_CALLS = 5


def create_page(
    model: StitchableForImageClassification,
    processor: BaseImageProcessor,
    title: str,
    pictures: Sequence[str | Path] = (),
) -> gr.Blocks:
    """The page of a model.

    Args:
        model: on its device.
        processor: its image processor.
        title: what to call it.
        pictures: image files to pick from; the page begins with the first.
    """
    model.eval()
    names = short_names(model.config)
    flops = [stitch.flops or 0 for stitch in model.stitches]
    unit, divisor = flops_unit(max(flops))
    least, most = (math.ceil(1000 * number / divisor) / 1000 for number in (min(flops), max(flops)))
    is_measured = any("accuracy" in stitch.metrics for stitch in model.stitches)

    def choose(budget: float) -> int:
        try:
            # It becomes the model's default too, on which no call of this page relies.
            return model.for_budget(flops=budget * divisor).id
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def draw(first: int, second: int) -> Any:
        return plot_stitches(model.stitches, names, marked={"A": first, "B": second})

    def answer(picture: str | None, stitch_id: int) -> tuple[str, dict[str, float] | None]:
        (stitch,) = (stitch for stitch in model.stitches if stitch.id == stitch_id)
        facts = describe(stitch, names, unit, divisor)
        if picture is None:
            return facts, None
        scores, seconds = classify(model, processor, read_picture(picture), stitch_id)
        return f"{facts}\n\n**{1e3 * seconds:.2f} ms** here, the median of {TIMED_CALLS} calls", scores

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# {title}\nOne checkpoint that is {len(model.stitches)} networks. Move a budget, and the most accurate "
            "network within it answers, with no reload."
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    str(pictures[0]) if pictures else None,
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Image",
                    height=260,
                    elem_id="picture",
                )
                _say_what_is_no_image(picture)
                if pictures:
                    gr.Examples([str(path) for path in pictures], picture, label="Or pick one")
            if is_measured:
                curve = gr.Plot(show_label=False, elem_id="curve")
            else:
                gr.Markdown("No stitch has a measured accuracy; `stitchable eval` measures them.")
        chosen = []
        with gr.Row():
            for side, start in (("A", least), ("B", most)):
                with gr.Column():
                    label = f"Budget {side}, {unit} per image"
                    budget = gr.Slider(least, most, start, step=0.001, label=label, elem_id=f"budget-{side}")
                    choices = [(f"{s.id}: {route_in_words(s, names)}", s.id) for s in model.stitches]
                    stitch = gr.Dropdown(choices, value=choose(start), label=f"Stitch {side}", elem_id=f"stitch-{side}")
                    facts = gr.Markdown(elem_id=f"facts-{side}")
                    scores = gr.Label(num_top_classes=5, label=f"Top 5 of {side}", elem_id=f"scores-{side}")
                chosen.append(stitch)
                budget.change(choose, budget, stitch, trigger_mode="always_last", show_progress="hidden")
                gr.on(
                    [page.load, picture.change, stitch.change],
                    answer,
                    [picture, stitch],
                    [facts, scores],
                    trigger_mode="always_last",
                    # One call at a time, or the two sides would slow each other down while they are timed.
                    concurrency_id="model",
                    concurrency_limit=1,
                )
        if is_measured:
            events = [page.load, *(stitch.change for stitch in chosen)]
            gr.on(events, draw, chosen, curve, trigger_mode="always_last", show_progress="hidden")
    return page


def create_message(message: str) -> gr.Blocks:
    """A page that only says something."""
    with gr.Blocks(title="stitchable", analytics_enabled=False) as page:
        gr.Markdown(message, elem_id="message")
    return page


def _say_what_is_no_image(picture: gr.Image) -> None:
    """Make a file that is no image a message on the page, where gradio only logs Pillow's error."""
    preprocess = picture.preprocess  # changed on the instance: gradio writes a stub file beside every subclass

    def checked(payload: Any) -> Any:
        try:
            return preprocess(payload)
        except OSError as error:
            raise gr.Error("This file is not an image that can be read.", print_exception=False) from error

    picture.preprocess = checked  # type: ignore[method-assign]


def classify(
    model: StitchableForImageClassification, processor: BaseImageProcessor, image: Image.Image, stitch_id: int
) -> tuple[dict[str, float], float]:
    """The score of every class by its name, and the median seconds of a few calls after a first one."""
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]

    def call() -> torch.Tensor:
        return model(pixel_values, stitch_id=stitch_id).logits.float().cpu()  # which waits for the device

    with torch.inference_mode():
        scores = call()[0].softmax(-1).tolist()
        seconds = statistics.median(_seconds(call) for _ in range(TIMED_CALLS))
    names: Any = model.config.id2label
    return {names[number]: score for number, score in enumerate(scores)}, seconds


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def describe(stitch: Stitch, names: Sequence[str], unit: str, divisor: float) -> str:
    """What the stitch table knows of a stitch."""
    accuracy = stitch.metrics.get("accuracy")
    figures = [f"{(stitch.flops or 0) / divisor:.3f} {unit}", f"{stitch.params or 0:,} parameters"]
    figures += [] if accuracy is None else [f"accuracy {100 * accuracy:.2f} %"]
    return f"**Stitch {stitch.id}**: {route_in_words(stitch, names)}\n\n{', '.join(figures)}"


def read_picture(path: str | Path) -> Image.Image:
    """An image file in RGB, turned as its EXIF data say; of an animation the first frame.

    Raises:
        gradio.Error: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        reason = str(error).replace(str(path), "the file") or type(error).__name__
        raise gr.Error(f"This image cannot be read: {reason}.", print_exception=False) from error


def sample_of(source: str) -> list[Path]:
    """The picture that a repository brings with its card, if it has one."""
    if Path(source).is_dir():
        return list(Path(source).glob(SAMPLE))
    try:
        return [Path(hf_hub_download(source, SAMPLE))]
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return []


def main() -> None:
    """Run as a Space."""
    source = os.environ.get("STITCHABLE_MODEL")
    pictures = sorted(Path(__file__).with_name("images").glob("*"))
    try:
        if not source:
            raise ValueError("the variable STITCHABLE_MODEL must be the id of a stitchable model")
        # Whoever set the variable chose the model with its code.
        model: Any = StitchableForImageClassification.from_pretrained(source, trust_remote_code=True)
        page = create_page(model, processor_of(model), source, [*sample_of(source), *pictures])
    except (ValueError, OSError, HfHubHTTPError) as error:
        page = create_message(f"# No model\n{source or 'Nothing'} cannot be shown: {error}")
    page.launch(footer_links=[])


if __name__ == "__main__":
    main()
