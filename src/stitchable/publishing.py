"""A folder that is a complete Hub repository, and how it gets to the Hub: in one commit, with nothing lost."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from PIL import Image
from transformers import BaseImageProcessor
from transformers.utils import cached_file

from stitchable.card import (
    CARD,
    FIGURE,
    SAMPLE,
    Card,
    eval_results_files,
    is_plain,
    make_card,
    merge_cards,
    short_names,
    what_it_prints,
)
from stitchable.carried import is_families_file
from stitchable.model import modeling_stitchable
from stitchable.model.configuration_stitchable import STITCHABLE_VERSION, StitchableConfig
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.preprocessing import load_image_processor
from stitchable.plots import plot_stitches
from stitchable.processing import image_processor

STITCH_TABLE = "stitches.json"
# Files of an earlier push that would stay beside the new ones and be loaded in their place.
_REPLACED = ["model.safetensors", "model-*.safetensors", "model.*.safetensors", "model.safetensors.index*.json"]
_REPLACED += [".eval_results/stitch-*.yaml"]


def save_repository(
    model: StitchablePreTrainedModel,
    folder: str | Path,
    processor: BaseImageProcessor,
    card: Card,
    *,
    sample: Image.Image | None = None,
) -> None:
    """Write everything a Hub repository of this model needs.

    Args:
        model: with the figures of its stitches, as far as they were measured.
        folder: new or empty.
        processor: the image processor it was measured with.
        card: what the model card says; the config of the model keeps it.
        sample: an image for the snippet of the card; a grey one if None.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    check_new_folder(folder)
    card.store(model.config)
    processor.save_pretrained(folder)  # first, or the model would look for one of its own
    model.save_pretrained(folder)
    (sample or Image.new("RGB", (64, 64), "grey")).save(folder / SAMPLE)
    _describe(model, folder)
    make_card(model, card, what_it_prints(model, folder)).save(folder / CARD)


def update_repository(
    model: StitchablePreTrainedModel,
    folder: str | Path,
    *,
    dataset: str | None = None,
    split: str = "",
) -> None:
    """Write new figures of the stitches into a folder: config, stitch table, figure and card. Weights stay.

    Args:
        model: was loaded from the folder, and measured or calibrated since.
        folder: a checkpoint of a stitchable model.
        dataset: what it was measured on, if that is new.
        split: of the data set.

    Raises:
        ValueError: names with line breaks or other characters that cannot be seen.
    """
    folder = Path(folder)
    old = ModelCard.load(folder / CARD) if (folder / CARD).exists() else None
    name = old.data.get("model_name") if old else None
    card = Card.of(model.config, name if name and is_plain(name) else folder.resolve().name)
    if dataset is not None:
        card = replace(card, dataset=dataset, split=split)
    card.store(model.config)
    model.config.save_pretrained(folder)
    if not (folder / "preprocessor_config.json").exists():
        processor_of(model).save_pretrained(folder)
    if not (folder / SAMPLE).exists():
        Image.new("RGB", (64, 64), "grey").save(folder / SAMPLE)
    _describe(model, folder)
    made = make_card(model, card, what_it_prints(model, folder))
    (folder / CARD).write_text(merge_cards(str(made), old, card.name), encoding="utf-8")


def _describe(model: StitchablePreTrainedModel, folder: Path) -> None:
    """Write the stitch table, its figure, and the headline results."""
    names = short_names(model.config)
    if any("accuracy" in stitch.metrics for stitch in model.stitches):
        plot_stitches(model.stitches, names).savefig(folder / FIGURE)
    table = {"anchors": names, "stitches": [stitch.to_dict() for stitch in model.stitches]}
    (folder / STITCH_TABLE).write_text(
        json.dumps(table, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    for path in folder.glob(".eval_results/stitch-*.yaml"):
        path.unlink()
    for name, content in eval_results_files(model.stitches, Card.of(model.config, "").dataset).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def push_model(
    model: StitchablePreTrainedModel,
    repo_id: str,
    *,
    processor: BaseImageProcessor | None = None,
    token: bool | str | None = None,
    **options: Any,
) -> CommitInfo:
    """Push a model: weights, code, image processor, stitch table, card and figure, as one commit.

    Args:
        model: its config says what the card says; where it was loaded from says the rest.
        repo_id: "user/name" on the Hub; made if it does not exist.
        processor: the image processor it was measured with; if None, that of the checkpoint the model was loaded from,
            else timm's for the largest anchor.
        token: as in `HfApi`, also to look for files of that checkpoint; None for the stored one.
        options: of `push_folder`.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_repository(
            model,
            folder,
            processor or processor_of(model, token),
            Card.of(model.config, repo_id),
            sample=_sample_of(model, token),
        )
        return push_folder(folder, repo_id, token=token, **options)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload a stitchable model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Push a folder that `save_repository` wrote, as one commit; nothing where the repository holds the same already.

    What people wrote into the card that is there is kept (see `merge_cards`), and weights of earlier pushes that the
    folder does not have are removed. A push that breaks off leaves the repository as it was.

    Args:
        folder: a checkpoint of a stitchable model.
        repo_id: "user/name" on the Hub; made if it does not exist.
        commit_message: as in `HfApi.upload_folder`, like the next.
        commit_description: see there.
        private: whether a new repository is; None for the default of its owner.
        token: as in `HfApi`; None for the stored one.
        revision: branch, made if it does not exist.
        create_pr: whether to open a pull request instead.
        tags: to be added to the card.

    Raises:
        ValueError: the folder is no checkpoint of a stitchable model, its stitch table is not that of its config, or it
            has code that is neither this package's nor of a family that the config names.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses, a missing token among it.
    """
    folder = Path(folder)
    _check_checkpoint(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "repository"
        shutil.copytree(folder, staged, copy_function=_link, ignore=shutil.ignore_patterns("__pycache__"))
        _check_checkpoint(staged)
        if (staged / CARD).exists():
            merged = merge_cards(
                (folder / CARD).read_text(encoding="utf-8"), _card_of(api, repo_id, revision), repo_id, tags or ()
            )
            (staged / CARD).unlink()  # a link to the user's own
            (staged / CARD).write_text(merged, encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=_REPLACED,
        )


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something, and make sure that one can be written.

    Raises:
        ValueError: it holds something, is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror}") from None
    if any(folder.iterdir()):
        raise ValueError(f"{folder} already holds something; choose a new folder, or remove it")


def _check_checkpoint(folder: Path) -> None:
    config = _read_json(folder / "config.json")
    if config.get("model_type") != StitchableConfig.model_type:
        raise ValueError(f"{folder} is no checkpoint of a stitchable model: it has no config.json that says so")
    table = folder / STITCH_TABLE
    if table.exists() and _read_json(table).get("stitches") != config.get("stitches"):
        raise ValueError(
            f"{table} is not the table of the stitches in {folder / 'config.json'}, from which models are loaded; "
            "remove it, or let stitchable eval or calibrate write both anew"
        )
    _check_code(folder, StitchableConfig.from_dict(config))


def _check_code(folder: Path, config: StitchableConfig) -> None:
    """Refuse code that whoever loads the repository with `trust_remote_code=True` may run, but nobody meant to publish.

    That is all but this package's, and the files of families of one's own that the config names.
    """
    package = Path(modeling_stitchable.__file__).parent
    ours = {path.name: path.read_bytes() for path in package.glob("*.py")}
    has_own = any(not timm.is_model(anchor["architecture"]) for anchor in config.anchors)
    families = set(config.families) - set(ours) if has_own else set()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name in families or path.read_bytes() == ours.get(name):
            continue
        if name != "families.py" or not is_families_file(path.read_text(encoding="utf-8"), families):
            raise ValueError(
                f"{path} would be published, but is neither code of stitchable {STITCHABLE_VERSION} nor of a family "
                "that config.json names; remove it, or save the model anew into another folder"
            )
    for path in sorted(folder.rglob("*.json")):
        content = _read_json(path)
        expected = config.auto_map if path == folder / "config.json" else None
        if content.get("auto_map") != expected or "custom_pipelines" in content:
            raise ValueError(
                f"{path} names code that is not of stitchable {STITCHABLE_VERSION} (auto_map, custom_pipelines), which "
                "would be run by those who trust this repository; save the model anew into another folder"
            )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _link(source: str, target: str) -> None:
    """Copy without a copy where the file system can: checkpoints are large."""
    source = os.path.realpath(source)  # in a cache of the Hub files are links themselves
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _card_of(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return ModelCard.load(path)


def processor_of(model: StitchablePreTrainedModel, token: bool | str | None = None) -> BaseImageProcessor:
    """The image processor of the checkpoint that a model was loaded from, else timm's for the largest anchor.

    Args:
        model: as `from_pretrained` returned it, or made here.
        token: as for any file of the Hub; None for the stored one.

    Raises:
        ValueError: that checkpoint is no longer there, or its image processor is none of transformers.
    """
    path = file_of(model, "preprocessor_config.json", token)
    return image_processor(model.config) if path is None else load_image_processor(Path(path).parent)


def _sample_of(model: StitchablePreTrainedModel, token: bool | str | None) -> Image.Image | None:
    path = file_of(model, SAMPLE, token)
    return Image.open(path) if path else None


def file_of(model: StitchablePreTrainedModel, name: str, token: bool | str | None = None) -> str | None:
    """A file of the checkpoint that a model was loaded from, if it has one of this name.

    Args:
        model: as `from_pretrained` returned it, or made here.
        name: of the file.
        token: as for any file of the Hub; None for the stored one, since a model keeps none.

    Raises:
        ValueError: that checkpoint is no longer there.
    """
    if not model.name_or_path:
        return None
    where = {**model.hub_arguments, "token": token, "_raise_exceptions_for_missing_entries": False}
    try:
        return cached_file(model.name_or_path, name, **where)
    except OSError as error:
        raise ValueError(
            f"the model was loaded from {model.name_or_path}, where its {name} can no longer be found: {error}; give "
            "processor=, or token= where only a token finds it (a model keeps none)"
        ) from error
