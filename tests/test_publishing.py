"""A folder that is a complete Hub repository, loaded by people who do not have stitchable."""

import ast
import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from transformers import AutoImageProcessor

import stitchable
from families import SHIPPED, images, make
from processes import run_python
from stitchable import evaluate
from stitchable.card import (
    KEPT_BELOW,
    Card,
    eval_results_files,
    in_markdown,
    make_card,
    merge_cards,
    short_names,
    stitch_table,
    what_it_prints,
)
from stitchable.processing import image_processor
from stitchable.publishing import save_repository

# What a user does who installed torch, timm and transformers only.
AS_A_USER = """
import sys
sys.modules["stitchable"] = None  # any import of it fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

folder, image, pixels, expected, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
part = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, stitch_id=3)
x, logits = torch.load(pixels), torch.load(expected)
with torch.no_grad():
    for stitch in model.stitches:
        assert torch.equal(model(x, stitch_id=stitch.id).logits, logits[stitch.id]), stitch
    assert torch.equal(part(x).logits, logits[3])
    assert [s.id for s in part.stitches] == [3]
    features = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert features(x, stitch_id=3).pooler_output.ndim == 2
stitch = model.for_budget(1e12)
assert stitch.metrics["accuracy"] == max(s.metrics["accuracy"] for s in model.stitches)
classify = pipeline("image-classification", model=model, image_processor=folder)
answers = classify(image, top_k=2)
assert {answer["label"] for answer in answers} <= set(config.id2label.values()), answers
model.extract(3).save_pretrained(again)  # and the code travels on
alone = AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(alone(x).logits, logits[3])
print("loaded", type(model).__module__)
"""


def published(name: str, folder: Path):
    model = make(name, id2label={i: f"class {i}" for i in range(5)})
    x = images(name, 12)
    evaluate(model, [{"pixel_values": x, "labels": torch.arange(12) % 5}])
    processor = image_processor(model.config, crop_pct=0.9)
    save_repository(
        model, folder, processor, Card(f"tiny-{name}", "noise", recipe="seed: 1\n", accuracy_before={0: 0.5})
    )
    return model, x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "tnt"])  # the second brings functions that its chain names
def test_a_folder_loads_where_stitchable_is_not_installed(name: str, tmp_path) -> None:
    model, x = published(name, tmp_path / "hub")
    with torch.no_grad():
        logits = {stitch.id: model(x[:2], stitch_id=stitch.id).logits for stitch in model.stitches}
    torch.save(x[:2], tmp_path / "x.pt")
    torch.save(logits, tmp_path / "logits.pt")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    arguments = [tmp_path / path for path in ("hub", "image.png", "x.pt", "logits.pt", "again")]
    output = run_python(AS_A_USER, *arguments, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert "loaded transformers_modules" in output


def test_the_folder_is_complete_and_says_the_same_everywhere(tmp_path) -> None:
    model, _ = published("vit", tmp_path / "hub")
    folder = tmp_path / "hub"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "preprocessor_config.json", "model.safetensors.index.json"),
        *("model-anchor-0.safetensors", "model-anchor-1.safetensors", "model-stitching-layers.safetensors"),
        *("README.md", "accuracy_flops.png", "sample.png"),
        *SHIPPED,
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["stitches"] == [stitch.to_dict() for stitch in model.stitches]
    with Image.open(folder / "accuracy_flops.png") as figure:
        assert figure.size[0] > 500

    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    results = {result.metric_args["stitch_id"]: result.metric_value for result in card.data.eval_results}
    assert results == {stitch.id: round(stitch.metrics["accuracy"], 4) for stitch in model.stitches}
    for stitch in model.stitches:
        row = f"| {stitch.id} |"
        (line,) = [line for line in card.text.split("## All stitches")[1].splitlines() if line.startswith(row)]
        assert f"{stitch.params:,}" in line
        assert f"{100 * stitch.metrics['accuracy']:.2f} %" in line
    assert "{{" not in card.text
    assert "seed: 1" in card.text
    assert f"| vit-8 | 50.00 % | {100 * model.stitches[0].metrics['accuracy']:.2f} % |" in card.text


def test_the_card_shows_the_null_line_and_the_cascades() -> None:
    model = make("vit")
    assert "null line" not in make_card(model, Card("tiny")).text
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5 + 0.1 * (stitch.id == 1)})
    stages = [{"stitch": 0, "temperature": 1.0, "score": "margin", "threshold": 0.25}, {"stitch": 1, "combine": "last"}]
    figures = {"metrics": {"accuracy": 0.6, "gain": 0.1}, "interval": [0.05, 0.15], "images": 2000}
    model.config.cascades = [{"id": 0, "stages": stages, "flops": 1e5, "max_flops": 2e5, **figures}]
    text = make_card(model, Card("tiny", accuracy_before={0: 0.55, 1: 0.75})).text
    assert "of the untouched anchors (the null line): 55.00 %; of the straight line through them: 65.00 %" in text
    cascades = text.split("## Cascades")[1].split("## All stitches")[0]
    assert "| 0 | 0, where margin < 0.25 → 1 | 100.000 | 200.000 | 60.00 % | +10.00 | +5.00 to +15.00 |" in cascades


def test_a_route_reads_as_the_blocks_of_each_anchor() -> None:
    model = make("vit")
    assert short_names(model.config) == ["vit-8", "vit-12"]
    line = stitch_table(model.stitches, short_names(model.config)).splitlines()[2 + 4]
    assert "| 4 | vit-8 0–1 → vit-12 0–2 |" in line


def test_nothing_is_written_over_another_run(tmp_path) -> None:
    model = make("vit")
    processor, card = image_processor(model.config, crop_pct=1.0), Card("tiny", "noise")
    (tmp_path / "other.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="already holds something"):
        save_repository(model, tmp_path, processor, card)
    assert {path.name for path in tmp_path.iterdir()} == {"other.txt"}
    with pytest.raises(ValueError, match="cannot be made"):
        save_repository(model, tmp_path / "other.txt" / "below", processor, card)


def test_a_model_that_was_not_measured_has_a_card_that_says_so(tmp_path) -> None:
    model = make("vit")
    save_repository(model, tmp_path, image_processor(model.config), Card("tiny"))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "No stitch has been measured." in text
    assert "Pareto front" not in text
    assert not (tmp_path / "accuracy_flops.png").exists()
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def snippet_of(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_card_says_what_its_snippet_prints(tmp_path) -> None:
    """Computed in this process: here the snippet is run as its reader would, and says the same."""
    name = tmp_path / 'a "tiny" model'
    model, _ = published("vit", name)
    model.set_stitch(4)
    model.train()
    before = copy.deepcopy(model.state_dict())
    printed = what_it_prints(model, name)
    assert f"it prints\n\n```text\n{printed}```\n" in (name / "README.md").read_text(encoding="utf-8")
    code = snippet_of(name).replace(json.dumps("tiny-vit"), json.dumps(str(name)))
    shutil.copy(name / "sample.png", tmp_path / "image.png")
    without_package = "import sys\nsys.modules['stitchable'] = None\n"
    output = run_python(without_package + code, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    (first, answer, last), theirs = printed.splitlines(), output.splitlines()
    assert [first, last] == [theirs[0], theirs[2]]
    (ours,), (expected,) = ast.literal_eval(answer), ast.literal_eval(theirs[1])
    assert ours == {"label": expected["label"], "score": pytest.approx(expected["score"], abs=1e-6)}
    # The model is as it was.
    assert (model.stitch.id, model.training, model.device.type) == (4, True, "cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("what", ["no FLOPs", "grey images"])
def test_where_the_snippet_has_no_answer_the_card_gives_none(what: str, tmp_path) -> None:
    kwargs = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 2,
        "num_heads": 2,
        "in_chans": 1 if what == "grey images" else 3,
    }
    anchors = [{"architecture": "vit_tiny_patch16_224", "kwargs": {**kwargs, "embed_dim": width}} for width in (8, 12)]
    model = stitchable.from_anchors(anchors, pretrained=False, num_labels=3)
    if what == "no FLOPs":
        for stitch in model.stitches:
            model.record(stitch.id, flops=None)
    save_repository(model, tmp_path / "model", image_processor(model.config), Card("tiny"))
    assert "it prints" not in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


NAMED = 'from_pretrained("{0}", image_processor="{0}")\n\nUse the id of the repository on the Hub, for `{0}`.'
OURS = f"""---\nmodel_name: tiny\ntags:\n- a\n---\n\n# tiny\n\n{NAMED.format("tiny")}\n\n{KEPT_BELOW}\n"""


@pytest.mark.parametrize(
    ("theirs", "metadata", "below"),
    [
        (None, {"tags": ["a"]}, ""),
        ("# Mine\n\nWritten by hand.\n", {"tags": ["a"]}, "# Mine\n\nWritten by hand.\n"),
        (OURS, {"tags": ["a"]}, ""),
        (f"{OURS}\nKeep\n\nme.\n", {"tags": ["a"]}, "Keep\n\nme.\n"),
        ("---\ntags: [b, a]\nlanguage: fr\n---\n", {"tags": ["a", "b"], "language": "fr"}, ""),
    ],
)
def test_cards_are_merged(theirs, metadata, below) -> None:
    old = None if theirs is None else ModelCard(theirs)
    merged = ModelCard(merge_cards(OURS, old, "someone/tiny"))
    assert merged.data.to_dict() == {"model_name": "someone/tiny", **metadata}
    above, _, kept = merged.text.partition(KEPT_BELOW)
    assert NAMED.format("someone/tiny") in above
    assert kept.lstrip("\n") == below
    again = merge_cards(OURS, merged, "someone/tiny")
    assert ModelCard(again).text == merged.text


@pytest.mark.parametrize("name", ["image-classification", "image.png", "vit_tiny_patch16_224", 'a "b" `c`', "True"])
def test_only_the_name_of_the_model_becomes_that_of_the_repository(name: str) -> None:
    """Also where the folder is called as something else that the card says."""
    model = make("vit")
    merged = merge_cards(str(make_card(model, Card(name))), None, "someone/tiny")
    expected = make_card(model, Card("someone/tiny"))
    assert ModelCard(merged).text == expected.text.replace("# someone/tiny\n", f"# {in_markdown(name)}\n")


def test_headlines_are_in_the_newer_form_too() -> None:
    stitches = make("vit").stitches
    measured = [replace(stitch, metrics={"accuracy": 0.5 + stitch.id / 100}) for stitch in stitches]
    files = eval_results_files(measured, "someone/noise")
    assert set(files) == {".eval_results/stitch-0.yaml", ".eval_results/stitch-1.yaml", ".eval_results/stitch-8.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/stitch-8.yaml"]))
    assert (entry.dataset_id, entry.value) == ("someone/noise", 58.0)
    assert f"stitch 8, {measured[8].flops:,} FLOPs" in entry.notes
    assert eval_results_files(stitches, "someone/noise") == eval_results_files(measured, "noise") == {}


@pytest.mark.parametrize("size", [(40, 50), (64, 33), (32, 32)])
@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
def test_the_image_processor_is_timms_evaluation_transform(size, crop_pct, tmp_path) -> None:
    config = make("vit").config
    image_processor(config, crop_pct=crop_pct, interpolation="bicubic").save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=crop_pct, mean=config.image_mean, std=config.image_std
    )
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8))
    ours = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, transform(picture), rtol=0, atol=1e-6)


def test_the_image_processor_takes_timms_settings_for_the_largest_anchor() -> None:
    processor = image_processor(make("resnet").config)
    timm_cfg = timm.get_pretrained_cfg("resnet50")
    assert processor.size["shortest_edge"] == int(32 / timm_cfg.crop_pct)
    with pytest.raises(ValueError, match="crop_pct"):
        image_processor(make("vit").config, crop_pct=1.5)
