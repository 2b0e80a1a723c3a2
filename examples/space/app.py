"""A page to try a stitchable model on: an image, a slider over the budget, two stitches side by side.

`stitchable app MODEL` shows it. This folder is a Hugging Face Space as well: there the variable STITCHABLE_MODEL says
which model, and the folder "images" holds more pictures.
"""

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from transformers import BaseImageProcessor

from stitchable import StitchableConfig, StitchableForImageClassification
from stitchable.card import SAMPLE, short_names
from stitchable.cascades import runnable, stages_in_words
from stitchable.model.cascades import score
from stitchable.model.routes import Cascade, Choice, find_cascade, find_stitch
from stitchable.model.schema import write
from stitchable.plots import flops_unit, plot_stitches, route_in_words
from stitchable.processing import upright
from stitchable.publishing import file_of, processor_of

TIMED_CALLS = 5
_ABOUT_CASCADES = (
    " Or a cascade, within it on average: that runs a dearer network only where a cheaper one is not sure of the image."
)


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

    Raises:
        ValueError: no stitch has known FLOPs.
    """
    model.eval()
    names = short_names(model.config)
    flops = [stitch.flops for stitch in model.stitches if stitch.flops]
    if not flops:
        raise ValueError("no stitch of this model has known FLOPs; stitchable.update_costs(model) counts them")
    unit, divisor = flops_unit(max(flops))
    least, most = (math.ceil(1000 * number / divisor) / 1000 for number in (min(flops), max(flops)))
    is_measured = any("accuracy" in stitch.metrics and stitch.flops for stitch in model.stitches)

    def choose(budget: float) -> int | str:
        # It becomes the model's default too, on which no call of this page relies.
        return value_of(model.for_budget(mean_flops=round(budget * divisor)))

    def draw(first: int | str, second: int | str) -> Any:
        cascades = runnable(model.config)
        return plot_stitches(model.stitches, names, marked={"A": first, "B": second}, cascades=cascades)

    def answer(picture: str | None, value: int | str) -> tuple[str, dict[str, float] | None]:
        choice = chosen_by(model, value)
        facts = describe(choice, names, unit, divisor)
        if picture is None:
            return facts, None
        pixel_values = processor(images=read_picture(picture), return_tensors="pt")["pixel_values"]
        scores, seconds = classify(model, pixel_values, choice)
        why = f"\n\n{which_stage(model, pixel_values, choice)}" if isinstance(choice, Cascade) else ""
        return f"{facts}{why}\n\n**{1e3 * seconds:.2f} ms** here, the median of {TIMED_CALLS} calls", scores

    # What a call takes is measured, so no other may run at the same time: neither the other side's nor the drawing.
    one_at_a_time: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "trigger_mode": "always_last",
    }
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(86400, 86400)) as page:
        gr.Markdown(
            f"# {title}\nOne checkpoint that is {len(model.stitches)} networks. Move a budget, and the most accurate "
            f"network within it answers, with no reload.{_ABOUT_CASCADES if model.cascades else ''}"
        )
        with gr.Row():
            with gr.Column():
                picture = _picture_input(pictures)
            if is_measured:
                curve = gr.Plot(show_label=False, elem_id="curve")
            else:
                gr.Markdown("No stitch has a measured accuracy; `stitchable eval` measures them.")
        chosen = []
        with gr.Row():
            for side, start in (("A", least), ("B", most)):
                with gr.Column():
                    label = f"Budget {side}, {unit} per image"
                    budget = gr.Slider(
                        least, max(most, least + 0.001), start, step=0.001, label=label, elem_id=f"budget-{side}"
                    )
                    choices: list[Any] = [(f"{s.id}: {route_in_words(s, names)}", s.id) for s in model.stitches]
                    choices += [(in_words(x), value_of(x)) for x in model.cascades]
                    stitch = gr.Dropdown(choices, value=choose(start), label=f"Stitch {side}", elem_id=f"stitch-{side}")
                    facts = gr.Markdown(elem_id=f"facts-{side}")
                    scores = gr.Label(num_top_classes=5, label=f"Top 5 of {side}", elem_id=f"scores-{side}")
                chosen.append(stitch)
                budget.change(_shown(choose), budget, stitch, trigger_mode="always_last", show_progress="hidden")
                events = [page.load, picture.change, stitch.change]
                gr.on(events, _shown(answer), [picture, stitch], [facts, scores], **one_at_a_time)
        if is_measured:
            events = [page.load, *(stitch.change for stitch in chosen)]
            gr.on(events, draw, chosen, curve, show_progress="hidden", **one_at_a_time)
    return page


def create_message(message: str) -> gr.Blocks:
    """A page that only says something."""
    with gr.Blocks(title="stitchable", analytics_enabled=False) as page:
        gr.Markdown(message, elem_id="message")
    return page


def launch(page: gr.Blocks, port: int | None = None) -> None:
    """Show a page until it is stopped; the variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where, too."""
    page.launch(server_port=port, footer_links=[], max_file_size="20mb")


def _picture_input(pictures: Sequence[str | Path]) -> gr.Image:
    """The image of the page, by its file, and pictures to pick from."""
    picture = gr.Image(
        str(pictures[0]) if pictures else None,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="Image",
        height=260,
        elem_id="picture",
    )
    preprocess = picture.preprocess  # changed on the instance: gradio writes a stub file beside every subclass

    def checked(payload: Any) -> Any:
        try:
            return preprocess(payload)
        except FileNotFoundError as error:
            raise gr.Error("This picture is no longer here; upload it again.", print_exception=False) from error
        except Exception as error:  # decoders raise whatever they like
            raise gr.Error("This file is not an image that can be read.", print_exception=False) from error

    picture.preprocess = checked  # type: ignore[method-assign]
    # Not gr.Examples, which would put a fresh gr.Image in the place of this one.
    cached = [picture.move_resource_to_block_cache(str(path)) for path in pictures]
    picture.keep_in_cache.update(path for path in cached if path)
    if cached:
        samples = gr.Dataset(components=["image"], samples=[[path] for path in cached], label="Or pick one")
        samples.click(lambda sample: sample[0], samples, picture, show_progress="hidden")
    return picture


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a visitor did wrong as a message on the page."""

    def run(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, TypeError) as error:  # TypeError: a budget that was deleted
            raise gr.Error(str(error), print_exception=False) from error

    return run


def value_of(choice: Choice) -> int | str:
    """What the page knows a stitch or a cascade by."""
    return f"cascade {choice.id}" if isinstance(choice, Cascade) else choice.id


def chosen_by(model: StitchableForImageClassification, value: int | str) -> Choice:
    """The inverse of `value_of`.

    Raises:
        ValueError: the model has none such.
    """
    if isinstance(value, str):
        return find_cascade(model.cascades, int(value.removeprefix("cascade ")), model.stitches)
    return find_stitch(model.stitches, value)


def in_words(cascade: Cascade) -> str:
    """Its stages: which stitch runs, and below which score the next one does."""
    return f"cascade {cascade.id}: {stages_in_words(write(cascade)['stages'])}"


@torch.inference_mode()
def which_stage(model: StitchableForImageClassification, pixel_values: torch.Tensor, cascade: Cascade) -> str:
    """Which stage of a cascade answers an image (1, C, H, W), and why: each score against its threshold."""
    answered = int(model(pixel_values, cascade=cascade.id).stitch_ids)
    number = [stage.stitch for stage in cascade.stages].index(answered) + 1
    reasons = []
    for stage in cascade.stages[:number]:
        if stage.threshold is not None:
            sure = float(score(model(pixel_values, stitch_id=stage.stitch).logits, stage))
            name = "margin" if stage.score == "margin" else "largest probability"
            relation = "below" if sure < stage.threshold else "at least"
            reasons.append(f"{name} of stitch {stage.stitch} {sure:.3f}, {relation} {stage.threshold:.3f}")
    return f"**Stage {number} of {len(cascade.stages)}**, stitch {answered}, answered: {'; '.join(reasons)}"


def classify(
    model: StitchableForImageClassification, pixel_values: torch.Tensor, choice: Choice
) -> tuple[dict[str, float], float]:
    """The score of every class by its name for one image, and the median seconds of a few calls after a first one."""
    how = {"cascade" if isinstance(choice, Cascade) else "stitch_id": choice.id}

    def call() -> torch.Tensor:
        return model(pixel_values, **how).logits.float().cpu()  # which waits for the device

    with torch.inference_mode():
        scores = call()[0].softmax(-1).tolist()
        seconds = statistics.median(_seconds(call) for _ in range(TIMED_CALLS))
    return dict(zip(class_names(model.config), scores, strict=True)), seconds


def class_names(config: StitchableConfig) -> list[str]:
    """The classes in order, with their numbers where several have one name (ImageNet has two kinds of crane)."""
    names = [name for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def describe(choice: Choice, names: Sequence[str], unit: str, divisor: float) -> str:
    """What is known of a stitch or a cascade."""
    accuracy = choice.metrics.get("accuracy")
    if isinstance(choice, Cascade):
        title, what = in_words(choice).capitalize().split(": ", 1)
        figures = [f"{choice.flops / divisor:.3f} {unit} on average, at most {choice.max_flops / divisor:.3f}"]
    else:
        title, what = f"Stitch {choice.id}", route_in_words(choice, names)
        figures = [f"{choice.flops / divisor:.3f} {unit}"] if choice.flops else []
        figures += [f"{choice.params:,} parameters"] if choice.params else []
    figures += [] if accuracy is None else [f"accuracy {100 * accuracy:.2f} %"]
    return f"**{title}**: {what}\n\n{', '.join(figures)}"


def read_picture(path: str | Path) -> Image.Image:
    """An image file in RGB, turned as its EXIF data say; of an animation the first frame.

    Raises:
        ValueError: it cannot be read, or is a line more than a picture.
    """
    try:
        with Image.open(path) as image:
            return upright(image)
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        reason = str(error).replace(str(path), "the file") or type(error).__name__
        raise ValueError(f"This image cannot be read: {reason}.") from error


def pictures_of(model: StitchableForImageClassification, folder: Path | None) -> list[Path]:
    """The images in a folder, and the one that the model's checkpoint brings with its card."""
    files = sorted(folder.iterdir()) if folder else []
    suffixes = Image.registered_extensions()
    pictures = [path for path in files if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    sample = file_of(model, SAMPLE)
    return [*pictures, *([Path(sample)] if sample else [])]


def main() -> None:
    """Run as a Space."""
    source = os.environ.get("STITCHABLE_MODEL")
    images = Path(__file__).with_name("images")
    try:
        if not source:
            raise ValueError("the variable STITCHABLE_MODEL must be the id of a stitchable model")
        model: Any = StitchableForImageClassification.from_pretrained(source)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        pictures = pictures_of(model, images if images.is_dir() else None)
        page = create_page(model, processor_of(model), source, pictures)
    except (ValueError, OSError, ImportError, HfHubHTTPError, SafetensorError) as error:
        page = create_message(f"# No model\n{source or 'Nothing'} cannot be shown: {error}")
    launch(page)


if __name__ == "__main__":
    main()
