"""The model card: metadata, tables of all stitches, how the model was made, and a snippet with what it printed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from stitchable.model.configuration_stitchable import STITCHABLE_VERSION, StitchableConfig
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.routes import Stitch, pareto_front
from stitchable.plots import flops_unit, route_in_words

CARD = "README.md"
FIGURE = "accuracy_flops.png"
SAMPLE = "sample.png"
OUTPUT = "<!-- What the snippet prints comes here. -->"
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
    """

    name: str
    dataset: str = ""
    split: str = ""
    license: str | None = None
    recipe: str = ""
    accuracy_before: Mapping[int, float] = field(default_factory=dict)

    def store(self, config: StitchableConfig) -> None:
        """Put all but the name into a config, in JSON types."""
        facts = {key: value for key, value in asdict(self).items() if key != "name"}
        config.card = {**facts, "accuracy_before": {str(i): value for i, value in self.accuracy_before.items()}}

    @classmethod
    def of(cls, config: StitchableConfig, name: str) -> "Card":
        """The inverse of `store`; what the config does not know is left empty."""
        known = {entry.name for entry in fields(cls)} - {"name"}
        facts = {key: value for key, value in (getattr(config, "card", None) or {}).items() if key in known}
        before = {int(i): value for i, value in facts.pop("accuracy_before", {}).items()}
        return cls(name, **facts, accuracy_before=before)


class SnippetError(RuntimeError):
    """The snippet of a card fails."""


def make_card(model: StitchablePreTrainedModel, card: Card) -> ModelCard:
    """The model card, with a Markdown table of all stitches and their figures in the metadata."""
    stitches, names = model.stitches, short_names(model.config)
    measured = [stitch for stitch in stitches if "accuracy" in stitch.metrics]
    anchors = [stitch for stitch in stitches if stitch.is_anchor]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["stitchable", "image-classification", "timm"],
        license=card.license,
        datasets=[card.dataset] if _is_on_hub(card.dataset) else None,
        base_model=[e["pretrained"] for e in model.config.anchors if _is_on_hub(e.get("pretrained") or "")] or None,
        model_name=card.name,
        eval_results=[_eval_result(stitch, card.dataset) for stitch in measured] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_template()),
        name=card.name,
        dataset=(card.dataset or "unnamed data") + (f" ({card.split} split)" if card.split else ""),
        figure=FIGURE if measured else None,
        num_stitches=len(stitches),
        anchors=[
            {"name": name, "architecture": entry["architecture"], "kwargs": json.dumps(entry["kwargs"], sort_keys=True)}
            for name, entry in zip(names, model.config.anchors, strict=True)
        ],
        table=stitch_table(stitches, names),
        front=stitch_table(pareto_front(stitches), names),
        budget=_middle(anchors or stitches).flops,
        output=OUTPUT,
        kept_below=KEPT_BELOW,
        recipe=card.recipe,
        throughput=getattr(model.config, "throughput", None),
        latency=getattr(model.config, "latency", None),
        before=[
            {"name": names[anchor], "before": f"{100 * accuracy:.2f}", "after": f"{100 * after:.2f}"}
            for anchor, accuracy in card.accuracy_before.items()
            for after in (_accuracy(stitches, anchor),)
            if after is not None
        ],
        versions=", ".join(
            [
                f"stitchable {STITCHABLE_VERSION}",
                *(f"{name} {version(name)}" for name in ("torch", "timm", "transformers")),
            ]
        ),
    )


def try_out(folder: str | Path) -> str:
    """Run the snippet of the card in a folder as its reader would; put what it prints into the card and return it.

    It runs in a fresh process, offline, without stitchable, on the sample image of the folder.

    Args:
        folder: as `save_repository` leaves it.

    Raises:
        SnippetError: it fails; with the end of what it said.
    """
    path = Path(folder) / CARD
    text, name = path.read_text(encoding="utf-8"), ModelCard.load(path).data.model_name
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None  # of our own template
    code = snippet[1].replace(f'"{name}"', repr(str(path.parent.resolve())))
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(path.with_name(SAMPLE), Path(scratch) / "image.png")
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import sys\nsys.modules['stitchable'] = None\n{code}"],
            env={**os.environ, **quiet, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch},
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise SnippetError(f"the snippet of {path} fails: {result.stderr[-1000:]}")
    path.write_text(
        text.replace(OUTPUT, f"For [{SAMPLE}]({SAMPLE}) it prints\n\n```text\n{result.stdout}```"), encoding="utf-8"
    )
    return result.stdout


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
    if old:
        ours.text = ours.text.replace(f'"{old}"', f'"{name}"').replace(f"`{old}`", f"`{name}`")
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
    unit, divisor = flops_unit(max((stitch.flops or 0 for stitch in stitches), default=0))
    columns: dict[str, list[str]] = {
        "id": [str(stitch.id) for stitch in stitches],
        "route": [route_in_words(stitch, anchor_names) for stitch in stitches],
        unit: [f"{(stitch.flops or 0) / divisor:.3f}" for stitch in stitches],
        "params": [_shown(stitch.params, 1, ",.0f") for stitch in stitches],
        "accuracy": [_shown(stitch.metrics.get("accuracy"), 100, ".2f", " %") for stitch in stitches],
        "images/s": [_shown(stitch.metrics.get("images_per_second"), 1, ",.0f") for stitch in stitches],
        "ms": [_shown(stitch.latency_ms, 1, ".2f") for stitch in stitches],
        "MB": [_shown(stitch.memory_mb, 1, ".1f") for stitch in stitches],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rules = [":---" if name == "route" else "---:" for name in columns]
    rows = [list(columns), rules, *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(figure: float | None, factor: float, form: str, unit: str = "") -> str:
    return "" if figure is None else f"{figure * factor:{form}}{unit}"


def short_names(config: StitchableConfig) -> list[str]:
    """A name per anchor: its architecture, with its width or place where several share it."""
    architectures = [entry["architecture"].split("/")[-1] for entry in config.anchors]
    if len(set(architectures)) == len(architectures):
        return architectures
    widths = [entry["cuts"][-1][0] for entry in config.anchors]
    labels = widths if len(set(widths)) == len(widths) else range(len(widths))
    return [f"{architecture.split('_')[0]}-{label}" for architecture, label in zip(architectures, labels, strict=True)]


def _eval_result(stitch: Stitch, dataset: str) -> EvalResult:
    # Results that differ only in metric_args stay apart in a model-index and survive a round trip.
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset or "unnamed",
        dataset_name=dataset or "unnamed",
        metric_type="accuracy",
        metric_name="accuracy",
        metric_value=round(stitch.metrics["accuracy"], 4),
        metric_args={"stitch_id": stitch.id},
    )


def _is_on_hub(name: str) -> bool:
    return name.count("/") == 1


def _accuracy(stitches: Sequence[Stitch], stitch_id: int) -> float | None:
    # A model of some of the stitches may lack it.
    return next((stitch.metrics.get("accuracy") for stitch in stitches if stitch.id == stitch_id), None)


def _middle(stitches: Sequence[Stitch]) -> Stitch:
    by_flops = sorted(stitches, key=lambda stitch: stitch.flops or 0)
    return by_flops[len(by_flops) // 2]


def _template() -> Path:
    installed = Path(__file__).with_name("card_template.md")
    # In an editable installation the template lies where the repository keeps it.
    return installed if installed.exists() else Path(__file__).parents[2] / "model_cards" / installed.name
