"""A folder that is a complete Hub repository, and how it gets to the Hub: in one commit, with nothing lost."""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from PIL import Image
from transformers import BaseImageProcessor
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from stitchable.card import (
    CARD,
    FIGURE,
    SAMPLE,
    Card,
    eval_results_files,
    is_plain,
    make_card,
    merge_cards,
    what_it_prints,
)
from stitchable.model import modeling_stitchable
from stitchable.model.chain import Anchor
from stitchable.model.configuration_stitchable import STITCHABLE_VERSION, StitchableConfig
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.operations import OWN_CODE
from stitchable.model.routes import measured_by
from stitchable.model.shards import WEIGHTS
from stitchable.processing import image_processor, load_image_processor
from stitchable.tables import plot

_RESULTS = ".eval_results"
# Files of an earlier push that would stay beside the new ones and be loaded in their place.
_REPLACED = [*WEIGHTS, f"{_RESULTS}/stitch-*.yaml"]
# Machine code and bytecode, which nobody can read before it is published.
_COMPILED = (".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib")


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
    _write_results(model, folder)
    make_card(model, card, what_it_prints(model, folder)).save(folder / CARD)


def update_repository(
    model: StitchablePreTrainedModel,
    folder: str | Path,
    *,
    dataset: str | None = None,
    split: str = "",
) -> None:
    """Write new figures of the stitches into a folder: config, figure and card. Weights stay.

    Args:
        model: was loaded from the folder, and measured or calibrated since.
        folder: a checkpoint of a stitchable model.
        dataset: what it was measured on, if that is new.
        split: of the data set.

    Raises:
        ValueError: names with line breaks or other characters that cannot be seen, or as `card_of`.
    """
    folder = Path(folder)
    old = card_of(folder)
    name = old.data.get("model_name") if old else None
    card = Card.of(model.config, name if name and is_plain(name) else folder.resolve().name)
    if dataset is not None:
        card = replace(card, dataset=dataset, split=split)
    card.store(model.config)
    with _written_anew(folder) as scratch:
        model.config.save_pretrained(scratch)
        if not (folder / IMAGE_PROCESSOR_NAME).exists():
            processor_of(model).save_pretrained(scratch)
        if not (folder / SAMPLE).exists():
            Image.new("RGB", (64, 64), "grey").save(scratch / SAMPLE)
        _write_results(model, scratch)
        for path in folder.glob(f"{_RESULTS}/stitch-*.yaml"):
            path.unlink()
    made = make_card(model, card, what_it_prints(model, folder))
    with _written_anew(folder) as scratch:
        (scratch / CARD).write_text(merge_cards(str(made), old, card.name), encoding="utf-8")


def card_of(folder: str | Path) -> ModelCard | None:
    """The card of a folder that `update_repository` is to write anew, to be asked before anything is measured for it.

    None where there is none; what a link to another place leads to is not the folder's, and is neither read nor kept.

    Raises:
        ValueError: a card that cannot be read, or a sub-directory for results that is a link or no directory.
    """
    folder = Path(folder)
    results = folder / _RESULTS
    if results.is_symlink() or (results.exists() and not results.is_dir()):
        raise ValueError(f"{results} is no directory of {folder}, so no results are written there; remove it")
    path = folder / CARD
    return _read_card(path) if path.exists() and not _leads_outside(path, folder) else None


@contextmanager
def _written_anew(folder: Path) -> Iterator[Path]:
    """A scratch folder, whose files then replace those of the folder: no link is written through."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".stitchable-") as scratch:
        yield Path(scratch)
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def _leads_outside(path: Path, folder: Path) -> bool:
    """Whether it is a link out of the folder, and not to a blob of the cache of the Hub that the folder lies in."""
    target, root = path.resolve(), folder.resolve()
    # .../models--USER--NAME/snapshots/COMMIT/FILE -> .../models--USER--NAME/blobs/HASH
    caches = [parent.parent for parent in root.parents if parent.name == "snapshots" and "--" in parent.parent.name]
    return not target.is_relative_to(root) and target.parent not in [cache / "blobs" for cache in caches]


def _write_results(model: StitchablePreTrainedModel, folder: Path) -> None:
    """Write the figure of the stitch table, and the headline results."""
    if any(measured_by(model.stitches) in stitch.metrics for stitch in model.stitches):
        plot(model).savefig(folder / FIGURE)
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
    """Push a model: weights, config, code, image processor, card and figure, as one commit.

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
        ValueError: the folder is no checkpoint of a stitchable model, or it has code that is neither this package's nor
            of a class that the config names and this process registered, a link out of the folder, or JSON or a card
            that cannot be read.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses, a missing token among it.
    """
    folder = Path(folder)
    _check_links(folder)
    _check_checkpoint(folder)
    ours = _read_card(folder / CARD) if (folder / CARD).exists() else None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "repository"
        shutil.copytree(folder, staged, copy_function=_link, ignore=shutil.ignore_patterns("__pycache__"))
        _check_checkpoint(staged)
        if ours is not None:
            merged = merge_cards(str(ours), _card_on_hub(api, repo_id, revision), repo_id, tags or ())
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


def _check_links(folder: Path) -> None:
    """Refuse links, whose targets would be published in their place, out of the folder or to directories."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and (path.is_dir() or _leads_outside(path, folder)):
            raise ValueError(
                f"{path} would be published, but is a link to {path.resolve()}; put a copy in its place, or remove it"
            )


def _check_checkpoint(folder: Path) -> None:
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else None
    if not isinstance(config, dict) or config.get("model_type") != StitchableConfig.model_type:
        raise ValueError(f"{folder} is no checkpoint of a stitchable model: it has no config.json that says so")
    _check_code(folder, StitchableConfig.from_dict(config))


def _check_code(folder: Path, config: StitchableConfig) -> None:
    """Refuse code that whoever loads the repository with `trust_remote_code=True` may run, but nobody meant to publish.

    That is all but this package's, and the files of classes that the config names and this process has registered.
    """
    package = Path(modeling_stitchable.__file__).parent
    ours = {path.name: path.read_bytes() for path in package.glob("*.py")}
    # Of files that a config names, only those that this process has registered: a config may come from a stranger.
    anchors = [Anchor.from_dict(entry) for entry in config.anchors]
    named = {name for anchor in anchors for name in anchor.code} & set(OWN_CODE)
    sources = [inspect.getfile(OWN_CODE[name]) for name in named]
    sources += [other for file in list(sources) for other in get_relative_import_files(file)]
    known = {Path(file).name: Path(file).read_bytes() for file in sources} | ours
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = sorted(path for path in files if "__pycache__" not in path.relative_to(folder).parts)  # is not published
    for path in files:
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if suffix in (".py", *_COMPILED) and path.read_bytes() != known.get(name):
            raise ValueError(
                f"{path} would be published, but is neither code of stitchable {STITCHABLE_VERSION} nor the file of a "
                "class that config.json names and this process has registered; remove it, register the class, or save "
                "the model anew into another folder"
            )
    for path in files:
        if path.suffix.lower() != ".json":
            continue
        found = _code_in(_read_json(path))
        if found != ([config.auto_map] if path == folder / "config.json" else []):
            raise ValueError(
                f"{path} names code that is not of stitchable {STITCHABLE_VERSION} (auto_map, custom_pipelines), which "
                "would be run by those who trust this repository; save the model anew into another folder"
            )


def _code_in(content: Any) -> list[Any]:
    """What JSON says of code that transformers should run, however deep."""
    found, members = [], [content]
    while members:
        member = members.pop()
        if isinstance(member, dict):
            found += [member[key] for key in ("auto_map", "custom_pipelines") if key in member]
            members += member.values()
        elif isinstance(member, list):
            members += member
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} would be published, but is no JSON: {error}; remove it, or write it anew") from error


def _link(source: str, target: str) -> None:
    """Copy without a copy where the file system can: checkpoints are large."""
    source = os.path.realpath(source)  # in a cache of the Hub files are links themselves
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return _read_card(Path(path))


def _read_card(path: Path) -> ModelCard:
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        str(card)  # as it will be written
    except Exception as error:  # the readers of its metadata have many ways to say that they cannot work with them
        raise ValueError(f"the model card {path} cannot be read; mend it, or remove it: {error}") from error
    return card


def processor_of(model: StitchablePreTrainedModel, token: bool | str | None = None) -> BaseImageProcessor:
    """The image processor of the checkpoint that a model was loaded from, else timm's for the largest anchor.

    Args:
        model: as `from_pretrained` returned it, or made here.
        token: as for any file of the Hub; None for the stored one.

    Raises:
        ValueError: that checkpoint is no longer there, or its image processor is none of transformers.
    """
    path = file_of(model, IMAGE_PROCESSOR_NAME, token)
    return image_processor(model.config) if path is None else load_image_processor(Path(path).parent)


def _sample_of(model: StitchablePreTrainedModel, token: bool | str | None) -> Image.Image | None:
    path = file_of(model, SAMPLE, token)
    if path and _leads_outside(Path(path), Path(path).parent):
        raise ValueError(f"{path} would be published, but is a link to {Path(path).resolve()}; put a copy in its place")
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
