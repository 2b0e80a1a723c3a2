"""The model card: metadata, tables of all stitches, how the model was made, and a snippet with what it printed."""

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import pipeline

from stitchable.cascades import cascade_table, runnable
from stitchable.front import in_words, judge_stitches, pareto_front
from stitchable.model.configuration_stitchable import STITCHABLE_VERSION, StitchableConfig
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel
from stitchable.model.routes import Stitch, best_of, measured_by
from stitchable.plots import flops_unit
from stitchable.processing import load_image_processor
from stitchable.tables import frame_of, short_names

CARD = "README.md"
FIGURE = "accuracy_flops.png"
SAMPLE = "sample.png"
KEPT_BELOW = "<!-- What stands below this line is kept when the card is written anew. -->"


@dataclass
class Card:
    """What a model card says beyond what the model knows; the config carries it, so that the card can be written anew.

    Attributes:
        name: of the model, as in the title and the snippet.
        dataset: what it was measured on; the id of a data set of the Hub, or a name.
        split: of the data set.
        license: an identifier as the Hub writes it; None where nobody has said so.
        recipe: the settings it was trained with, as text; printed in full. Empty for a model that was not trained.
        accuracy_before: accuracy of the anchors, by stitch id, before they were trained together.
        notes: further paragraphs on how the model was made, each in one line.

    Raises:
        ValueError: a name with line breaks or other characters that cannot be seen, or a field of another type.
    """

    name: str
    dataset: str = ""
    split: str = ""
    license: str | None = None
    recipe: str = ""
    accuracy_before: Mapping[int, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check what may come from a file."""
        for name in ("name", "dataset", "split", "license"):
            value = getattr(self, name)
            if not is_plain(value) and not (name == "license" and value is None):
                raise ValueError(f"the {name} of a card is one line of text that can be seen, got {value!r}")
        if not isinstance(self.recipe, str):
            raise ValueError(f"the recipe of a card is text, got {self.recipe!r}")
        if isinstance(self.notes, str) or not all(map(is_plain, self.notes)):
            raise ValueError(f"the notes of a card are lines of text that can be seen, got {self.notes!r}")
        self.notes = list(self.notes)
        before = {int(anchor): float(value) for anchor, value in dict(self.accuracy_before).items()}
        self.accuracy_before = {anchor: value for anchor, value in before.items() if math.isfinite(value)}

    def store(self, config: StitchableConfig) -> None:
        """Put all but the name into a config, in JSON types."""
        facts = {key: value for key, value in asdict(self).items() if key != "name"}
        config.card = {**facts, "accuracy_before": {str(i): value for i, value in self.accuracy_before.items()}}

    @classmethod
    def of(cls, config: StitchableConfig, name: str) -> "Card":
        """The inverse of `store`; what the config does not know is left empty.

        Raises:
            ValueError: a config whose facts are none.
        """
        known = {entry.name for entry in fields(cls)} - {"name"}
        facts = getattr(config, "card", None) or {}
        if not isinstance(facts, Mapping):
            raise ValueError(f"the config has no facts for a card: they go by name, got {facts!r}")
        try:
            return cls(name, **{key: facts[key] for key in known & set(facts)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"the config has no facts for a card: {error}") from error


def is_plain(text: Any) -> bool:
    """Whether it is text on one line, all of which can be seen."""
    return isinstance(text, str) and text.isprintable()


def make_card(model: StitchablePreTrainedModel, card: Card, output: str = "") -> ModelCard:
    """The model card, with a Markdown table of all stitches and their figures in the metadata.

    Args:
        model: with the figures of its stitches.
        card: what else it says.
        output: what the snippet prints, as `what_it_prints` returns it.

    Raises:
        ValueError: something that it should say is the mark below which the text of a card is kept.
    """
    stitches, names = model.stitches, short_names(model.config)
    measured = [stitch for stitch in stitches if "accuracy" in stitch.metrics]
    metric = measured_by(stitches)
    cascades = runnable(model.config)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["stitchable", "image-classification", "timm"],
        license=card.license,
        datasets=[card.dataset] if _is_on_hub(card.dataset) else None,
        base_model=[e["pretrained"] for e in model.config.anchors if _is_on_hub(e.get("pretrained"))] or None,
        model_name=card.name,
        eval_results=[
            *(_eval_result(stitch.metrics["accuracy"], card.dataset, stitch_id=stitch.id) for stitch in measured),
            *(
                _eval_result(cascade["metrics"]["accuracy"], card.dataset, cascade_id=cascade["id"])
                for cascade in cascades
                if "accuracy" in cascade.get("metrics", {})
            ),
        ]
        or None,
    )
    dataset = (card.dataset or "unnamed data") + (f" ({card.split} split)" if card.split else "")
    made = ModelCard.from_template(
        data,
        template_path=str(_template()),
        title=in_markdown(card.name),
        name=as_code(card.name),
        quoted_name=_as_string(card.name),
        dataset=in_markdown(dataset),
        metric=metric,
        figure=FIGURE if any(metric in stitch.metrics for stitch in stitches) else None,
        num_stitches=len(stitches),
        anchors=[_anchor(*named) for named in zip(names, model.config.anchors, strict=True)],
        table=stitch_table(stitches, names),
        front=stitch_table(pareto_front(stitches, metric), names),
        judged=in_words(judged) if (judged := judge_stitches(stitches, card.accuracy_before)) else "",
        cascades=cascade_table(cascades) if cascades else "",
        budget=_budget(stitches),
        chosen=_chosen(stitches).id,
        sample=SAMPLE,
        output=as_block(output, "text") if output else "",
        kept_below=KEPT_BELOW,
        recipe=as_block(card.recipe, "yaml") if card.recipe else "",
        notes=[in_markdown(note) for note in card.notes],
        throughput=_circumstances(model.config, "throughput"),
        latency=_circumstances(model.config, "latency"),
        before=[
            {"name": in_markdown(names[anchor]), "before": f"{100 * accuracy:.2f}", "after": f"{100 * after:.2f}"}
            for anchor, accuracy in card.accuracy_before.items()
            for after in (_accuracy(stitches, anchor),)
            if after is not None
        ],
        versions=_versions(),
    )
    if made.text.count(KEPT_BELOW) != 1:
        raise ValueError(f"a card cannot quote {KEPT_BELOW!r}, which ends what is written anew")
    return made


def _anchor(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """An anchor of the config, in Markdown."""
    kwargs = as_code(json.dumps(entry["kwargs"], sort_keys=True)) if entry.get("kwargs") else ""
    return {"name": in_markdown(name), "architecture": as_code(entry["architecture"]), "kwargs": kwargs}


def _versions() -> str:
    packages = (f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    return ", ".join([f"stitchable {STITCHABLE_VERSION}", *packages])


def what_it_prints(model: StitchablePreTrainedModel, folder: str | Path) -> str:
    """What the snippet of the card prints for the sample image of a folder, computed without running any text of it.

    Args:
        model: with the figures of its stitches; nothing of it changes.
        folder: a checkpoint of it, with image processor and sample image.

    Returns:
        The lines; none where the snippet has no answer: no budget can choose a stitch, since nobody counted the FLOPs,
        or the model takes no RGB images.
    """
    folder, budget = Path(folder), _budget(model.stitches)
    if budget is None or model.config.num_channels != 3:
        return ""
    stitch = _chosen(model.stitches)
    small = StitchableForImageClassification.from_pretrained(folder, stitch_id=stitch.id)
    processor = load_image_processor(folder)
    classify = pipeline("image-classification", model=small, image_processor=processor, device="cpu")
    return (
        f"stitch {stitch.id}: {stitch.flops:,} FLOPs, {stitch.params:,} parameters\n"
        f"{classify(str(folder / SAMPLE), top_k=1)}\n"
        f"{small.num_parameters():,} of {model.num_parameters():,} parameters are loaded for this stitch alone\n"
    )


def in_markdown(text: Any) -> str:
    """Text as Markdown that shows just it, also in a cell of a table; no markup, HTML, link or line comes of it."""
    line = "".join(character if character.isprintable() else " " for character in str(text))
    # Of an address a link is made that no escape prevents; the code has no bars, which would end a cell of a table.
    pieces = re.split(r"([^\s|]*(?:://|www\.|@)[^\s|]*)", line, flags=re.IGNORECASE)
    pieces[1::2] = map(as_code, pieces[1::2])
    # An underscore within a word stands for itself.
    pieces[::2] = (
        re.sub(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(piece, quote=False)) for piece in pieces[::2]
    )
    return "".join(pieces)


def as_code(text: str) -> str:
    """One line as a span of code."""
    ticks = "`" * (_longest_run_of_backticks(text) + 1)
    return f"`{text}`" if ticks == "`" else f"{ticks} {text} {ticks}"


def as_block(text: str, language: str) -> str:
    """Lines as a block of code, which no line of them ends."""
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _as_string(text: str) -> str:
    """As Python has it."""
    return json.dumps(text, ensure_ascii=False)


# What stands in the template before the name of the model, and how the name is quoted there.
_PLACES_OF_THE_NAME = (
    ("from_pretrained(", _as_string),
    ("image_processor=", _as_string),
    ("on the Hub, for ", as_code),
)


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def merge_cards(text: str, theirs: ModelCard | None, name: str, tags: Sequence[str] = ()) -> str:
    """A card as it goes to a repository of this name, with what people wrote into the card that is there.

    Args:
        text: the card, of which the snippet takes the repository's name.
        theirs: the card that is replaced. Kept are its metadata that ours lacks, and of its text what stands below our
            mark, or all where it has no mark.
        name: id of the repository.
        tags: to be added.
    """
    ours = ModelCard(text)
    old = ours.data.get("model_name")
    if old and is_plain(old):
        snippet, anchors, rest = ours.text.partition("\n## Anchors\n")
        for before, quoted in _PLACES_OF_THE_NAME:
            snippet = snippet.replace(f"{before}{quoted(old)}", f"{before}{quoted(name)}")
        ours.text = f"{snippet}{anchors}{rest}"
    if old:
        ours.data["model_name"] = name
    known_tags = ours.data.get("tags") or []
    ours.data["tags"] = [*known_tags, *(tag for tag in tags if tag not in known_tags)]
    if theirs is None:
        return str(ours)
    above, mark, below = theirs.text.partition(KEPT_BELOW)
    kept = below.strip() if mark else above.strip()
    if kept and ours.text.partition(KEPT_BELOW)[2].strip() == "":
        ours.text = f"{ours.text.rstrip()}\n\n{kept}\n"
    known = ours.data.to_dict()
    for key, value in theirs.data.to_dict().items():
        if key not in known and key not in ("model-index", "model_name"):
            ours.data[key] = value
        elif key in ("tags", "datasets", "base_model") and isinstance(value, list):
            ours.data[key] = [*known[key], *(entry for entry in value if entry not in known[key])]
    return str(ours)


def eval_results_files(stitches: Sequence[Stitch], dataset: str) -> dict[str, str]:
    """Path -> content of the Hub's newer form of results, for the anchors and the best stitch.

    One file per result, since a file holds one score of a benchmark. There are none for data that are not on the Hub.
    """
    measured = [stitch for stitch in stitches if "accuracy" in stitch.metrics]
    if not measured or not _is_on_hub(dataset):
        return {}
    best = max(measured, key=lambda stitch: stitch.metrics["accuracy"])
    headline = {stitch.id: stitch for stitch in [*(stitch for stitch in measured if stitch.is_anchor), best]}
    files = {}
    for stitch in headline.values():
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id="image-classification",
            value=round(100 * stitch.metrics["accuracy"], 2),
            notes=f"top-1 accuracy in percent of stitch {stitch.id}, {stitch.flops:,} FLOPs",
        )
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        files[f".eval_results/stitch-{stitch.id}.yaml"] = content
    return files


def stitch_table(stitches: Sequence[Stitch], anchor_names: Sequence[str]) -> str:
    """A Markdown table: id, route, FLOPs, parameters, and what was measured or predicted of any of the stitches."""
    frame = frame_of(stitches, anchor_names)
    unit, divisor = flops_unit(max((stitch.flops or 0 for stitch in stitches), default=0))
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "route": ("route", in_markdown),
        "flops": (unit, lambda flops: f"{flops / divisor:.3f}"),
        "params": ("params", "{:,.0f}".format),
        "accuracy": ("accuracy", lambda accuracy: f"{100 * accuracy:.2f} %"),
        "agreement": ("agreement", lambda agreement: f"{100 * agreement:.2f} %"),
        "images_per_second": ("images/s", "{:,.0f}".format),
        "latency_ms": ("ms", "{:.2f}".format),
        "memory_mb": ("MB", "{:.1f}".format),
    }
    columns = {"id": [str(stitch_id) for stitch_id in frame.index]} | {
        title: frame[name].map(form, na_action="ignore").fillna("").tolist()
        for name, (title, form) in shown.items()
        if name in frame
    }
    rules = [":---" if name == "route" else "---:" for name in columns]
    rows = [list(columns), rules, *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _eval_result(accuracy: float, dataset: str, **of: int) -> EvalResult:
    # Results that differ only in metric_args stay apart in a model-index and survive a round trip.
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset or "unnamed",
        dataset_name=dataset or "unnamed",
        metric_type="accuracy",
        metric_name="accuracy",
        metric_value=round(accuracy, 4),
        metric_args=of,
    )


def _is_on_hub(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _circumstances(config: StitchableConfig, of: str) -> dict[str, Any]:
    """What `config.throughput` or `config.latency` says of how its figures were made, in Markdown."""
    facts = getattr(config, of, None)
    if not isinstance(facts, Mapping):
        return {}
    names = ("device", "threads", "batch_size", "dtype", "num_runs")
    shown: dict[str, Any] = {name: in_markdown(facts[name]) for name in names if facts.get(name) is not None}
    error, verified = facts.get("median_error"), facts.get("verified")
    if isinstance(error, float | int) and isinstance(verified, Mapping) and math.isfinite(error):
        shown |= {"median_error": f"{100 * error:.1f}", "num_verified": len(verified)}
    return shown


def _accuracy(stitches: Sequence[Stitch], stitch_id: int) -> float | None:
    # A model of some of the stitches may lack it.
    return next((stitch.metrics.get("accuracy") for stitch in stitches if stitch.id == stitch_id), None)


def _budget(stitches: Sequence[Stitch]) -> float | None:
    """The FLOPs of the anchor in the middle, or of the stitch in the middle where there is no anchor."""
    anchors = [stitch for stitch in stitches if stitch.is_anchor]
    by_flops = sorted(anchors or stitches, key=lambda stitch: stitch.flops or 0)
    return by_flops[len(by_flops) // 2].flops


def _chosen(stitches: Sequence[Stitch]) -> Stitch:
    """The best of them within these FLOPs, whatever they were measured by."""
    budget = _budget(stitches)
    affordable = [stitch for stitch in stitches if budget and stitch.flops and stitch.flops <= budget]
    return best_of(affordable or stitches, measured_by(stitches))


def _template() -> Path:
    installed = Path(__file__).with_name("card_template.md")
    # In an editable installation the template lies where the repository keeps it.
    return installed if installed.exists() else Path(__file__).parents[2] / "model_cards" / installed.name
