"""What the page of `stitchable app` is made of, without a browser; tests/test_browser.py has the page in one."""

import gc
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from families import images, make
from odd_images import broken, picture
from stitchable.app import load_page, space_folder
from stitchable.card import SAMPLE, Card
from stitchable.model.cascades import score
from stitchable.model.routes import Stage
from stitchable.model.schema import write
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from test_running_cascades import middle, with_cascade

page = load_page()
# gradio leaves event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _forget_pages() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def page_of(model) -> str:
    """All that the page says at the start."""
    return str(page.create_page(model, image_processor(model.config, crop_pct=1.0), "tiny").get_config_file())


def test_scores_are_those_of_the_stitch_and_no_class_is_lost() -> None:
    names = {0: "cat", 1: "crane", 2: "dog", 3: "crane", 4: "owl"}
    model = make("vit", id2label=names)
    assert page.class_names(model.config) == ["cat", "crane (1)", "dog", "crane (3)", "owl"]
    processor = image_processor(model.config, crop_pct=1.0)
    pixel_values = processor(images=picture(), return_tensors="pt")["pixel_values"]
    scores, seconds = page.classify(model, pixel_values, model.stitches[5])
    with torch.inference_mode():
        expected = model(pixel_values, stitch_id=5).logits[0].softmax(-1)
    assert list(scores.values()) == pytest.approx(expected.tolist())
    assert 0 < seconds < 10


def test_a_line_of_pixels_is_refused_before_it_is_resized(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be read: one side is more than 50 times the other"):
        page.read_picture(broken(tmp_path)["line"])


@pytest.mark.parametrize("kept", [list(range(9)), [4]])
def test_a_page_needs_no_measured_accuracy_and_no_second_stitch(kept: list[int]) -> None:
    model = make("vit") if len(kept) > 1 else make("vit").extract(kept[0])
    text = page_of(model)
    assert "No stitch has a measured accuracy" in text
    assert f"One checkpoint that is {len(kept)} networks" in text
    for stitch in model.stitches:
        assert f"{stitch.id}: vit-8" in text or f"{stitch.id}: vit-12" in text
        model.record(stitch.id, metrics={"accuracy": 0.5})
    assert "No stitch has a measured accuracy" not in page_of(model)


@torch.no_grad()
def test_a_cascade_says_which_stage_answered_and_why() -> None:
    x = images("vit", 6)
    model, cascade = with_cascade(
        stitches=(0, 1), thresholds=[middle(make("vit"), 0, x, Stage(0, 1.0, "max_probability", 0.5))], number=3
    )
    (first, last), seen = cascade.stages, set()
    for image in x.split(1):
        sure, answered = (
            score(model(image, stitch_id=0).logits, first).item(),
            model(image, cascade=3).stitch_ids.item(),
        )
        seen.add(answered)
        relation, stage = ("below", 2) if answered == last.stitch else ("at least", 1)
        assert page.which_stage(model, image, cascade) == (
            f"**Stage {stage} of 2**, stitch {answered}, answered: largest probability of stitch 0 {sure:.3f}, "
            f"{relation} {first.threshold:.3f}"
        )
        scores, _ = page.classify(model, image, cascade)
        assert list(scores.values()) == pytest.approx(model(image, cascade=3).logits[0].softmax(-1).tolist())
    assert seen == {0, 1}
    words = f"0, where p < {first.threshold:.3g} → 1"
    assert page.describe(cascade, ["a", "b"], "kFLOPs", 1e3).startswith(f"**Cascade 3**: {words}\n\n")
    for choice in (cascade, model.stitches[4]):
        assert page.chosen_by(model, page.value_of(choice)) == choice
    text = page_of(model)
    assert f"cascade 3: {words}" in text
    assert "Or a cascade, within it on average" in text
    assert "Or a cascade" not in page_of(make("vit"))


def test_a_mean_budget_chooses_a_cascade() -> None:
    model, cascade = with_cascade(stitches=(0, 1), thresholds=(0.5,))
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    model.cascades = [{**write(cascade), "metrics": {"accuracy": 0.9}}]
    assert "'value': 'cascade 0'" in page_of(model)


def test_unknown_figures_are_left_out() -> None:
    model = make("vit")
    model.record(4, flops=None, params=None)
    assert page.describe(model.stitches[4], ["a", "b"], "kFLOPs", 1e3) == "**Stitch 4**: a 0–1 → b 0–2\n\n"
    for stitch in model.stitches:
        model.record(stitch.id, flops=None)
    with pytest.raises(ValueError, match=r"stitchable\.update_costs\(model\) counts them"):
        page_of(model)


def test_pictures_are_the_users_and_then_the_checkpoints(tmp_path) -> None:
    model = make("vit")
    assert page.pictures_of(model, None) == []
    save_repository(model, tmp_path / "model", image_processor(model.config), Card("tiny"))
    model.name_or_path = str(tmp_path / "model")
    images = tmp_path / "images"
    (images / "folder").mkdir(parents=True)
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (images / name).touch()
    assert [Path(path).name for path in page.pictures_of(model, images)] == ["a.JPG", "b.png", SAMPLE]


def test_the_example_is_a_complete_space() -> None:
    folder = space_folder()
    header = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (header["sdk"], (folder / header["app_file"]).is_file()) == ("gradio", True)
    assert "stitchable[app]" in (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lowest = re.search(r"gradio>=([\d.]+)", (folder.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert lowest is not None
    assert [int(part) for part in header["sdk_version"].split(".")][:2] == [int(part) for part in lowest[1].split(".")]
