"""A folder that is a complete Hub repository: weights, code, image processor, card, figure and stitch table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import BaseImageProcessor

from stitchable.model.configuration_stitchable import STITCHABLE_VERSION
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import Stitch, find_stitch, pareto_front
from stitchable.plots import flops_unit, plot_stitches

FIGURE = "accuracy_flops.png"
STITCH_TABLE = "stitches.json"


@dataclass
class Card:
    """What a model card says beyond what the model knows.

    Attributes:
        name: of the model, as in the title and the snippet.
        dataset: what it was trained and measured on.
        license: an SPDX identifier as the Hub writes it.
        recipe: the settings it was trained with, as text; printed in full.
        accuracy_before: accuracy of the anchors, by stitch id, before they were trained together.
    """

    name: str
    dataset: str
    license: str = "apache-2.0"
    recipe: str = ""
    accuracy_before: Mapping[int, float] = field(default_factory=dict)


def save_repository(
    model: StitchableForImageClassification, folder: str | Path, processor: BaseImageProcessor, card: Card
) -> None:
    """Write everything a Hub repository of this model needs.

    Args:
        model: its stitches measured.
        folder: new or empty.
        processor: the image processor it was measured with.
        card: what the model card says.

    Raises:
        ValueError: the folder holds something, or no stitch was measured.
    """
    folder = Path(folder)
    check_new_folder(folder)
    names = short_names(model)
    figure = plot_stitches(model.stitches, names)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    figure.savefig(folder / FIGURE)
    table = {"anchors": names, "stitches": [stitch.to_dict() for stitch in model.stitches]}
    (folder / STITCH_TABLE).write_text(json.dumps(table, indent=1) + "\n")
    make_card(model, card).save(folder / "README.md")


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something, and make sure that one can be written.

    Raises:
        ValueError: it holds another run, is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror}") from None
    if any(folder.iterdir()):
        raise ValueError(f"{folder} already holds another run; choose a new folder, or remove it")


def make_card(model: StitchableForImageClassification, card: Card) -> ModelCard:
    """The model card, with a Markdown table of all stitches and their figures in the metadata."""
    stitches, names = model.stitches, short_names(model)
    measured = [stitch for stitch in stitches if "accuracy" in stitch.metrics]
    anchors = [stitch for stitch in measured if stitch.is_anchor]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["stitchable", "image-classification", "timm"],
        license=card.license,
        base_model=[entry["pretrained"] for entry in model.config.anchors if entry.get("pretrained")] or None,
        model_name=card.name,
        eval_results=[_eval_result(stitch, card.dataset) for stitch in measured],
    )
    return ModelCard.from_template(
        data,
        template_path=str(_template()),
        name=card.name,
        dataset=card.dataset,
        figure=FIGURE,
        num_stitches=len(stitches),
        anchors=[
            {"name": name, "architecture": entry["architecture"], "kwargs": json.dumps(entry["kwargs"])}
            for name, entry in zip(names, model.config.anchors, strict=True)
        ],
        table=stitch_table(stitches, names),
        front=stitch_table(pareto_front(stitches), names),
        budget=_middle(anchors or measured).flops,
        recipe=card.recipe,
        throughput=getattr(model.config, "throughput", None),
        before=[
            {"name": names[anchor], "before": f"{100 * accuracy:.2f}", "after": f"{100 * after:.2f}"}
            for anchor, accuracy in card.accuracy_before.items()
            for after in (find_stitch(stitches, anchor).metrics.get("accuracy"),)
            if after is not None
        ],
        versions=", ".join(
            [
                f"stitchable {STITCHABLE_VERSION}",
                *(f"{name} {version(name)}" for name in ("torch", "timm", "transformers")),
            ]
        ),
    )


def stitch_table(stitches: Sequence[Stitch], anchor_names: Sequence[str]) -> str:
    """A Markdown table: id, route, FLOPs, parameters, accuracy, and images per second where they were measured."""
    unit, divisor = flops_unit(max((stitch.flops or 0 for stitch in stitches), default=0))
    rows = [["id", "route", unit, "params", "accuracy", "images/s"], ["---:", ":---", *["---:"] * 4]]
    for stitch in stitches:
        route = " → ".join(f"{anchor_names[anchor]} {start}–{stop - 1}" for anchor, start, stop in stitch.route)
        accuracy = f"{100 * stitch.metrics['accuracy']:.2f} %" if "accuracy" in stitch.metrics else ""
        rate = f"{stitch.metrics['images_per_second']:,.0f}" if "images_per_second" in stitch.metrics else ""
        flops = f"{(stitch.flops or 0) / divisor:.3f}"
        rows.append([str(stitch.id), route, flops, f"{stitch.params:,}", accuracy, rate])
    if not any(row[-1] for row in rows[2:]):
        rows = [row[:-1] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def short_names(model: StitchableForImageClassification) -> list[str]:
    """A name per anchor: its architecture, with its width or place where several share it."""
    architectures = [entry["architecture"].split("/")[-1] for entry in model.config.anchors]
    if len(set(architectures)) == len(architectures):
        return architectures
    widths = [entry["cuts"][-1][0] for entry in model.config.anchors]
    labels = widths if len(set(widths)) == len(widths) else range(len(widths))
    return [f"{architecture.split('_')[0]}-{label}" for architecture, label in zip(architectures, labels, strict=True)]


def _eval_result(stitch: Stitch, dataset: str) -> EvalResult:
    # Results that differ only in metric_args stay apart in a model-index and survive a round trip.
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type="accuracy",
        metric_name="accuracy",
        metric_value=round(stitch.metrics["accuracy"], 4),
        metric_args={"stitch_id": stitch.id},
    )


def _middle(stitches: Sequence[Stitch]) -> Stitch:
    by_flops = sorted(stitches, key=lambda stitch: stitch.flops or 0)
    return by_flops[len(by_flops) // 2]


def _template() -> Path:
    installed = Path(__file__).with_name("card_template.md")
    # In an editable installation the template lies where the repository keeps it.
    return installed if installed.exists() else Path(__file__).parents[2] / "model_cards" / installed.name
