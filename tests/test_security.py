"""What a checkpoint that nobody vouches for may do. SECURITY.md says it, and here the attacks on it are made."""

import copy
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from typer.testing import CliRunner

import stitchable
from families import SHIPPED, images, make
from processes import run_python
from stitchable import (
    Adapter,
    Layout,
    StitchableConfig,
    StitchableForImageClassification,
    evaluate,
    register_family,
)
from stitchable.card import KEPT_BELOW, Card, as_code, in_markdown, make_card
from stitchable.conversion import convert
from stitchable.export import metadata_of
from stitchable.families.registry import run_modules
from stitchable.model.architectures import create_model
from stitchable.processing import image_processor
from stitchable.publishing import file_of, processor_of, push_folder, save_repository, update_repository
from stitchable_cli import app

FLAT = Adapter(layout=Layout.NCHW, stem=("stem",), stages=("blocks",), head=("classifier",))
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_family" / "digit_mixer.py"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that all foreign code of these tests makes; at the end there must be none."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists(), "foreign code was run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint."""
    model = make("vit", id2label={i: f"class {i}" for i in range(5)})
    save_repository(model, tmp_path / "model", image_processor(model.config, crop_pct=1.0), Card("tiny"))
    return tmp_path / "model"


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def evil(trap: Path) -> str:
    """A module whose import is noticed, with classes for every place that could name one."""
    classes = "".join(f"class {name}:\n    pass\n" for name in ("Evil", "StitchableConfig", "StitchableModel"))
    return f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n{classes}"


class Payload:
    """What its unpickling runs."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.trap),)


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


def pictures(folder: Path) -> Path:
    for number in range(5):
        (folder / f"class {number}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (40 * number, 0, 0)).save(folder / f"class {number}" / "1.png")
    return folder


# ---------------------------------------------------------------- text of a card


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_no_text_of_a_card_is_run(command: str, folder: Path, trap: Path, tmp_path: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(trap)!r}).touch()"
    name = f"nice\x07\n```python\n{code}\n```\n"
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump({'model_name': name})}---\n\n```python\n{code}\n```\n", encoding="utf-8"
    )
    if command == "eval":
        run("eval", folder, pictures(tmp_path / "pictures"), "--trust-remote-code")
    else:
        run("calibrate", folder, "--num-runs", 1, "--trust-remote-code")
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == folder.name
    ours, _, theirs = card.text.partition(KEPT_BELOW)
    assert str(trap) not in ours
    assert code in theirs  # as text that somebody wrote


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x07", "a\x1b[2J", "a\u2028b", "a\u202eb", "a\ud800"])
def test_names_that_cannot_be_seen_are_refused(name: str, folder: Path) -> None:
    for key in ("name", "dataset", "split", "license"):
        with pytest.raises(ValueError, match=f"the {key} of a card is one line of text that can be seen, got"):
            Card(**{"name": "tiny", key: name})
    model = StitchableForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="the dataset of a card is one line"):
        update_repository(model, folder, dataset=name)
    model.config.card = {"dataset": name}
    with pytest.raises(ValueError, match="the config has no facts for a card: the dataset of a card"):
        update_repository(model, folder)


def test_facts_of_another_type_are_refused_before_anything_is_measured(folder: Path) -> None:
    for facts in (["a"], {"recipe": ["a"]}, {"accuracy_before": [1]}, {"accuracy_before": {"a": 1}}, {"dataset": 3}):
        change(folder / "config.json", lambda config, facts=facts: config.update(card=facts))
        output = run("eval", folder, "no data", status=1)
        assert output.startswith("error: the config has no facts for a card: ")


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![a](javascript:alert(1)) [b](javascript:alert(1))",
    "a | b | c",
    "`<script>`",
    "``` <script>alert(1)</script>",
    "</code><script>alert(1)</script>",
    "&lt;script&gt; \\<script>",
    "--- *a* _b_ ~~c~~ # <!-- d",
    "https://evil.example www.evil.com me@evil.example",
    "`` a|HTTPS://evil.example/<b>`|`WWW.evil.com\\|mailto:me@evil.example`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_config_says_is_shown_and_not_obeyed(text: str) -> None:
    model = make("vit", id2label=dict.fromkeys(range(5), text))
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5, "images_per_second": 3.0}, latency_ms=1.0)
    circumstances = dict.fromkeys(("device", "threads", "batch_size", "dtype", "num_runs", "verified"), text)
    model.config.throughput = model.config.latency = {**circumstances, "median_error": text}
    model.config.anchors[0]["kwargs"] = {text: text}
    model.config.anchors[0]["pretrained"] = text
    recipe = f"a: 1\n{text}\n```\n{text}\n~~~\n````\n</pre>{text}\n"
    card = Card(text, text, text, text, recipe, accuracy_before={0: 0.5})
    card.store(model.config)
    made = make_card(model, Card.of(model.config, text), f"{text}\n```\n{text}\n")
    again = ModelCard(str(made))
    assert again.data.to_dict() == made.data.to_dict()  # nothing of it became metadata
    assert again.data.model_name == again.data.license == text
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    page = markdown.render(again.text)
    assert "<script" not in page
    assert page.count("<img") == 1  # the figure
    assert page.count("<!--") == 1  # the mark
    assert set(re.findall(r'href="([^"]*)"', page)) == {"https://arxiv.org/abs/2302.06586", "sample.png"}
    words = [
        token.content for block in markdown.parse(again.text) for token in block.children or () if token.type == "text"
    ]
    assert not re.search(r"://|www\.|@", " ".join(words), re.IGNORECASE)  # of which renderers make links
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert {row.count("<td") + row.count("<th") for row in rows} == {7, 3}  # of stitches, of anchors before and after


def test_the_mark_of_a_card_cannot_be_quoted() -> None:
    with pytest.raises(ValueError, match="a card cannot quote"):
        make_card(make("vit"), Card("tiny", recipe=f"{KEPT_BELOW}\n"))


def test_what_needs_no_escape_has_none() -> None:
    for text in ("vit_tiny_patch16_224.augreg", "someone/noise (test[:10])"[:13], "100 % of 2-3, a.b: 'c'", "é"):
        assert in_markdown(text) == text
    assert as_code("a") == "`a`"
    assert as_code("`a``") == "``` `a`` ```"


# ---------------------------------------------------------------- code of a checkpoint


def add_foreign_code(folder: Path, trap: Path) -> None:
    """A module below the top, and a map that names it."""
    (folder / "sub").mkdir()
    (folder / "sub" / "evil.py").write_text(evil(trap), encoding="utf-8")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor")
    pipelines = {"image-classification": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
    change(folder / "config.json", lambda c: c.update(auto_map=dict.fromkeys(names, "sub/evil.Evil")))
    change(folder / "config.json", lambda c: c.update(custom_pipelines=pipelines))


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_a_foreign_map_is_neither_run_nor_saved_again(trust: dict, folder: Path, trap: Path, tmp_path: Path) -> None:
    """With the package installed, its code is used even where the checkpoint's is trusted."""
    add_foreign_code(folder, trap)
    (folder / "modeling_stitchable.py").write_text(evil(trap), encoding="utf-8")
    assert type(AutoConfig.from_pretrained(folder, **trust)) is StitchableConfig
    for load in (AutoModelForImageClassification, AutoModel, StitchableForImageClassification):
        model = load.from_pretrained(folder, **trust)
        assert type(model).__module__ == "stitchable.model.modeling_stitchable"
        again = tmp_path / f"again-{load.__name__}"
        model.save_pretrained(again)
        config = json.loads((again / "config.json").read_text(encoding="utf-8"))
        assert config["auto_map"] == StitchableConfig().auto_map
        assert "evil" not in json.dumps(config)
        assert {path.name for path in again.rglob("*.py")} == SHIPPED
        assert all(path.read_text(encoding="utf-8") != evil(trap) for path in again.rglob("*.py"))


def test_measuring_a_folder_runs_none_of_its_code(folder: Path, trap: Path) -> None:
    add_foreign_code(folder, trap)
    run("calibrate", folder, "--num-runs", 1)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] == StitchableConfig().auto_map
    with pytest.raises(ValueError, match=r"sub/evil\.py would be published, but is neither code of stitchable"):
        push_folder(folder, "someone/tiny")
    (folder / "sub" / "evil.py").unlink()
    with pytest.raises(OfflineModeIsEnabled):  # and else it would be pushed
        push_folder(folder, "someone/tiny")


FOREIGN_FILES = {
    "evil.py": ("evil.py", "x = 1\n"),
    "a module further down": ("custom_generate/generate.py", "x = 1\n"),
    "our name, other code": ("modeling_stitchable.py", "x = 1\n"),
    "families.py": ("families.py", "from os import system\n\nFAMILIES = (system,)\n"),
    "a map of the image processor": ("preprocessor_config.json", '{"auto_map": {"AutoImageProcessor": "a--b.C"}}'),
    "another map": ("config.json", {"auto_map": {"AutoConfig": "someone/else--evil.Evil"}}),
    "pipelines": ("config.json", {"custom_pipelines": {"a": {"impl": "evil.Evil"}}}),
    "a tokenizer": ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["someone/else--evil.Evil", null]}}'),
    "a family of no anchor": ("evil.py", "x = 1\n"),
    "a map further down": (
        "processor_config.json",
        '{"image_processor": {"auto_map": {"AutoImageProcessor": "a--b.C"}}}',
    ),
    "pipelines in a list": ("other.JSON", '[{"a": [{"custom_pipelines": {"a": {"impl": "evil.Evil"}}}]}]'),
    "another suffix": ("evil.PY", "x = 1\n"),
    "bytecode": ("evil.pyc", "x = 1\n"),
    "machine code": ("sub/evil.cpython-311-x86_64-linux-gnu.so", "x = 1\n"),
}


@pytest.mark.parametrize("case", FOREIGN_FILES)
def test_foreign_code_is_not_published_by_accident(case: str, folder: Path) -> None:
    name, content = FOREIGN_FILES[case]
    if isinstance(content, dict):
        change(folder / name, lambda config: config.update(content))
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    if case == "a family of no anchor":
        change(folder / "config.json", lambda config: config["anchors"][0].update({"class": "evil.Evil"}))
    with pytest.raises(ValueError, match=f"{re.escape(name)} (would be published|names code)"):
        push_folder(folder, "someone/tiny")


@pytest.mark.parametrize("text", [b"{", b"[" * 10**5, b"", b"\xff{}"])
def test_json_that_cannot_be_read_is_not_published(text: bytes, folder: Path) -> None:
    for name in ("processor_config.json", "config.json"):
        (folder / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{re.escape(name)} would be published, but is no JSON"):
            push_folder(folder, "someone/tiny")


@pytest.mark.parametrize("name", ["notes.txt", "sample.png", "README.md", "sub/notes.txt", "sub"])
def test_what_a_link_leads_to_is_not_published(name: str, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    if name == "sub":
        secret.mkdir()
    else:
        Image.new("RGB", (9, 9)).save(secret, "PNG")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{re.escape(name)} would be published, but is a link to .*secret"):
        push_folder(folder, "someone/tiny")
    if name == "sample.png":
        model = StitchableForImageClassification.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"sample\.png would be published, but is a link to .*secret"):
            model.push_to_hub("someone/tiny")


def cached(folder: Path) -> Path:
    """The folder as a snapshot of the cache of the Hub, whose files are links to blobs."""
    repository = folder.parent / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_cache_is_published(folder: Path, tmp_path: Path) -> None:
    snapshot = cached(folder)
    for push in (
        lambda: push_folder(snapshot, "someone/tiny"),
        lambda: StitchableForImageClassification.from_pretrained(snapshot).push_to_hub("someone/tiny"),
    ):
        with pytest.raises(OfflineModeIsEnabled):
            push()
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (snapshot / "notes.txt").symlink_to("../../blobs/notes")
    (snapshot / "../../blobs/notes").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt would be published, but is a link to .*secret"):
        push_folder(snapshot, "someone/tiny")


# ---------------------------------------------------------------- what is written into a folder


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_nothing_is_written_outside_a_folder(command: str, folder: Path, tmp_path: Path) -> None:
    arguments = [pictures(tmp_path / "pictures")] if command == "eval" else ["--num-runs", 1]
    folder = cached(folder)
    victims = tmp_path / "victims"
    victims.mkdir()
    for name in ("README.md", "accuracy_flops.png"):
        (victims / name).write_text("mine", encoding="utf-8")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victims / name)
    (folder / "sample.png").unlink()
    (folder / "sample.png").symlink_to(victims / "sample.png")
    blobs = {path: path.read_bytes() for path in (folder / "../../blobs").iterdir()}
    run(command, folder, *arguments)
    assert {path: path.read_bytes() for path in (folder / "../../blobs").iterdir()} == blobs
    assert {path.name for path in victims.iterdir()} == {"README.md", "accuracy_flops.png"}
    assert {path.read_text(encoding="utf-8") for path in victims.iterdir()} == {"mine"}
    assert "mine" not in ModelCard.load(folder / "README.md").text.splitlines()
    assert not any(path.name.startswith(".stitchable") for path in folder.iterdir())
    assert StitchableForImageClassification.from_pretrained(folder).stitches[4].id == 4

    (victims / "stitch-1.yaml").write_text("mine", encoding="utf-8")
    (folder / ".eval_results").symlink_to(victims)
    output = run(command, folder, *["no data"] * (command == "eval"), status=1)
    assert output.startswith(f"error: {folder / '.eval_results'} is no directory of {folder}")
    assert (victims / "stitch-1.yaml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("card", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff", b"---\n1: 2\n---\n"])
def test_a_card_that_cannot_be_read_is_refused_before_anything_is_measured(card: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(card)
    for arguments in (["eval", folder, "no data"], ["calibrate", folder, "--threads", 0]):
        assert run(*arguments, status=1).startswith(f"error: the model card {folder / 'README.md'} cannot be read; ")
    for call in (
        lambda: push_folder(folder, "someone/tiny"),
        lambda: update_repository(StitchableForImageClassification.from_pretrained(folder), folder),
    ):
        with pytest.raises(ValueError, match=r"the model card .*README\.md cannot be read; mend it, or remove it: "):
            call()
    assert (folder / "README.md").read_bytes() == card


@pytest.fixture
def own_family(tmp_path: Path) -> Path:
    """A checkpoint that brings a family of its author's own."""
    run_modules([str(EXAMPLE.with_name("register_digit_mixer.py"))])
    names = ["digit_mixer_s", "digit_mixer_m"]
    stitchable.from_anchors(names, pretrained=False).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_a_family_of_ones_own_is_published(own_family: Path) -> None:
    with pytest.raises(OfflineModeIsEnabled):
        push_folder(own_family, "someone/tiny")
    (own_family / "other.py").write_text("print(1)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.py would be published"):
        push_folder(own_family, "someone/tiny")
    (own_family / "other.py").unlink()
    with (own_family / EXAMPLE.name).open("a", encoding="utf-8") as file:
        file.write("print(1)\n")
    with pytest.raises(ValueError, match=r"digit_mixer\.py would be published"):
        push_folder(own_family, "someone/tiny")


def test_files_that_no_family_needs_are_not_published(own_family: Path) -> None:
    (own_family / "evil.py").write_text("class Evil:\n    pass\n", encoding="utf-8")
    for own_class in ("digit_mixer.DigitMixer", "evil.Evil"):  # which this process has registered, and has not
        anchor = {"class": own_class}
        change(own_family / "config.json", lambda config, anchor=anchor: config["anchors"][0].update(anchor))
        with pytest.raises(ValueError, match=r"evil\.py would be published"):
            push_folder(own_family, "someone/tiny")


@pytest.mark.parametrize(
    "name", ["../evil.Evil", "/evil.Evil", "sub/evil.Evil", "sub\\evil.Evil", "evil", "a.b.Evil", ".Evil", "evil.", 3]
)
def test_classes_are_of_files_of_the_checkpoint(name: Any, own_family: Path, trap: Path) -> None:
    (own_family / "sub").mkdir()
    for path in (own_family.parent / "evil.py", own_family / "sub" / "evil.py"):
        path.write_text(evil(trap), encoding="utf-8")
    change(own_family / "config.json", lambda config: config["anchors"][0].update({"class": name}))
    for trust in (False, True):
        with pytest.raises(ValueError, match=r"class (is 'file\.Class' of a file beside the config|must be text)"):
            StitchableForImageClassification.from_pretrained(own_family, trust_remote_code=trust)


def test_classes_are_run_only_where_they_are_trusted(own_family: Path, trap: Path) -> None:
    (own_family / "evil.py").write_text(evil(trap), encoding="utf-8")
    change(own_family / "config.json", lambda config: config["anchors"][0].update({"class": "evil.Evil"}))
    with pytest.raises(ValueError, match=r"brings models of its own in evil\.py; read it and pass trust_remote_code"):
        StitchableForImageClassification.from_pretrained(own_family)


@pytest.mark.parametrize("name", ["../evil.evil", "sub/evil.evil", "evil.", "a.b.evil", "/evil.evil"])
def test_functions_are_of_files_of_the_checkpoint(name: str, own_family: Path, trap: Path) -> None:
    (own_family.parent / "evil.py").write_text(evil(trap), encoding="utf-8")
    change(own_family / "config.json", lambda config: config["anchors"][0]["chain"].update(call=f"function:{name}"))
    for trust in (False, True):
        with pytest.raises(ValueError, match=r"a function is 'NAME', or 'file\.NAME' of a file beside the config"):
            StitchableForImageClassification.from_pretrained(own_family, trust_remote_code=trust)


def test_functions_are_run_only_where_they_are_trusted(own_family: Path, trap: Path) -> None:
    (own_family / "evil.py").write_text(evil(trap), encoding="utf-8")
    change(own_family / "config.json", lambda config: config["anchors"][0]["chain"].update(call="function:evil.call"))
    with pytest.raises(ValueError, match=r"brings models of its own in evil\.py; read it and pass trust_remote_code"):
        StitchableForImageClassification.from_pretrained(own_family)


# ---------------------------------------------------------------- image processors


def test_the_code_of_an_image_processor_is_neither_run_nor_named_again(
    folder: Path, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "evil.py").write_text(evil(trap), encoding="utf-8")
    path = folder / "preprocessor_config.json"
    change(path, lambda settings: settings.update(auto_map={"AutoImageProcessor": "evil.Evil"}))
    model = StitchableForImageClassification.from_pretrained(folder, trust_remote_code=True)
    save_repository(model, tmp_path / "again", processor_of(model), Card("again"))
    model.save_pretrained(tmp_path / "bare")
    for saved in (tmp_path / "again", tmp_path / "bare"):
        assert "evil" not in (saved / path.name).read_text(encoding="utf-8")
    change(path, lambda settings: settings.pop("image_processor_type"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where nobody said no
    with pytest.raises(ValueError, match="trust_remote_code"):
        processor_of(model)
    model.save_pretrained(tmp_path / "of timm")
    assert "BitImageProcessor" in (tmp_path / "of timm" / path.name).read_text(encoding="utf-8")
    assert run("eval", folder, pictures(tmp_path / "pictures"), status=1).startswith("error: ")


# ---------------------------------------------------------------- what a config has built


@pytest.mark.parametrize(
    "architecture",
    [
        *("local-dir:{folder}", "hf-hub:someone/model", "HF-HUB:someone/model", "resnet18.a:b", "resnet18/../x"),
        *("{folder}", "someone/resnet18", "<script>", "a b", "", "vit\n", 3, None, ["resnet18"]),
    ],
)
def test_a_config_names_registered_architectures(architecture: Any, folder: Path) -> None:
    if isinstance(architecture, str):
        architecture = architecture.format(folder=folder)
    change(folder / "config.json", lambda config: config["anchors"][0].update(architecture=architecture))
    for load in (StitchableConfig, StitchableForImageClassification):
        with pytest.raises(ValueError, match=r"anchors.0.*(an architecture is named by letters, digits|must be text)"):
            load.from_pretrained(folder)
    with pytest.raises(ValueError, match="an architecture is named by letters, digits"):
        create_model(architecture, num_classes=2)


REFUSED_KWARGS = {
    "checkpoint_path": "{pickle}",
    "pretrained": True,
    "pretrained_cfg": {"file": "{pickle}"},
    "pretrained_cfg_overlay": {"url": "https://example.com/weights.pth"},
    "pretrained_strict": False,
    "pretrained_model_args": {"depth": 1},
    "pretrained_filter_fn": "os.system",
    "cache_dir": "{pickle}",
    "model_cls": "os.system",
    "model_name": "resnet18",
    "variant": "resnet18",
    "features_only": True,
    "feature_cls": "fx",
    "out_indices": [0],
    "pruned": True,
    "scriptable": True,
    "exportable": True,
    "no_jit": True,
    "num_classes": 7,
    "device": "cpu",
    "dtype": "float16",
}


@pytest.mark.parametrize("name", REFUSED_KWARGS)
def test_kwargs_are_those_of_the_constructor(name: str, folder: Path, trap: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Payload(trap), protocol=2))
    value = json.loads(json.dumps(REFUSED_KWARGS[name]).replace("{pickle}", str(tmp_path / "weights.pth")))
    change(folder / "config.json", lambda config: config["anchors"][0]["kwargs"].update({name: value}))
    with pytest.raises(ValueError, match=rf"kwargs of 'vit_tiny_patch16_224' cannot hold '{name}'"):
        StitchableForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"state_dict": "weights.pth"}, "cannot be made with .*state_dict"),
        ({"act_layer": "os.system"}, r"cannot be made with .*os\.system"),
        ({"norm_layer": "torch.nn.LayerNorm"}, r"cannot be made with .*torch\.nn\.LayerNorm"),
        ({"embed_layer": "os.system"}, "cannot be made with"),
        ({"depth": "many"}, "cannot be made with"),
        ({"num_heads": 0}, "cannot be made with"),
        ({"drop_path_rate": {"__float__": "NaN"}}, r"kwargs\.drop_path_rate must be a finite number, text, .* got nan"),
        (["depth"], "kwargs must be (a mapping|arguments of the model) by name"),
        ("depth", "kwargs must be (a mapping|arguments of the model) by name"),
    ],
)
def test_values_of_kwargs_are_plain(kwargs: Any, message: str, folder: Path) -> None:
    whole = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "depth": 3}
    kwargs = {**whole, **kwargs} if isinstance(kwargs, dict) else kwargs
    change(folder / "config.json", lambda config: config["anchors"][0].update(kwargs=kwargs))
    with pytest.raises(ValueError, match=message):
        StitchableForImageClassification.from_pretrained(folder)
    for value in (nn.GELU, Path("a"), {1: 2}, [float("inf")], torch.ones(1)):
        with pytest.raises(ValueError, match=r"224'\.act_layer.* must be a (finite number|mapping by name)"):
            create_model("vit_tiny_patch16_224", {"act_layer": value}, num_classes=2)


def test_names_that_a_config_refuses_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="an architecture is named by letters"):
        register_family(nn.Identity, FLAT, {"a b": {}}, input_size=(3, 8, 8), num_classes=3)


def test_a_config_cannot_choose_a_kernel_of_the_hub(folder: Path) -> None:
    for key in ("attn_implementation", "_attn_implementation"):
        change(folder / "config.json", lambda config, key=key: config.update({key: "someone/evil-kernel"}))
        with pytest.raises((ValueError, ImportError)):
            StitchableForImageClassification.from_pretrained(folder)


# ---------------------------------------------------------------- weights


def test_pickles_are_not_run(folder: Path, trap: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"anchors.0.cls_token": Payload(trap)}, protocol=2))
    for arguments in ({}, {"use_safetensors": False}, {"trust_remote_code": True}, {"stitch_id": 4}):
        with pytest.raises((OSError, pickle.UnpicklingError, ValueError)):
            StitchableForImageClassification.from_pretrained(folder, **arguments)
    change(folder / "config.json", lambda config: config.update(transformers_weights="pytorch_model.bin"))
    with pytest.raises((OSError, pickle.UnpicklingError, ValueError)):
        StitchableForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="no checkpoint that can be read without running its code"):
        convert(folder / "pytorch_model.bin", "deit")
    anchor = {"architecture": "resnet18", "weights": folder / "pytorch_model.bin"}
    with pytest.raises(ValueError, match=r"the weights .* cannot be read"):
        stitchable.from_anchors([anchor, anchor])


def test_weights_are_safetensors(folder: Path, tmp_path: Path) -> None:
    """All others would be read by transformers, whose index of them may name files of other folders."""
    weights = StitchableForImageClassification.from_pretrained(folder).state_dict()
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (tmp_path / "secret").mkdir()
    torch.save(weights, tmp_path / "secret" / "w.bin")
    weight_map = dict.fromkeys(weights, "../secret/w.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    for whole in (False, True):
        if whole:
            torch.save(
                {name.replace(".linear.", "."): value for name, value in weights.items()}, folder / "pytorch_model.bin"
            )
        for arguments in ({}, {"stitch_id": 4}):
            with pytest.raises(OSError, match=r"no file named model\.safetensors .*: convert them to safetensors"):
                StitchableForImageClassification.from_pretrained(folder, **arguments)
            with pytest.raises(ValueError, match=r"use_safetensors=False: the weights .* are safetensors; convert"):
                StitchableForImageClassification.from_pretrained(folder, use_safetensors=False, **arguments)


def test_a_config_cannot_choose_other_weights_than_are_checked(folder: Path) -> None:
    weights = StitchableForImageClassification.from_pretrained(folder).state_dict()
    save_file({name: value + 1 for name, value in weights.items()}, folder / "other.safetensors", {"format": "pt"})
    change(folder / "config.json", lambda config: config.update(transformers_weights="other.safetensors"))
    for arguments in ({}, {"stitch_id": 4}):
        loaded = StitchableForImageClassification.from_pretrained(folder, **arguments)
        assert "transformers_weights" not in vars(loaded.config)
        for name, value in loaded.state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
from stitchable import StitchableForImageClassification
try:
    StitchableForImageClassification.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_applied_or_refused(folder: Path, tmp_path: Path) -> None:
    model = StitchableForImageClassification.from_pretrained(folder).eval()
    x = images("vit", 2)
    base = model(x, stitch_id=4).logits
    cheapest = model.stitches[0].flops
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()
    expected = tuned(pixel_values=x, stitch_id=4).logits
    assert not torch.allclose(base, expected)
    tuned.save_pretrained(folder)
    change(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path="someone/else"))
    folder.rename(tmp_path / "root")
    for source, place in ((tmp_path / "root", {}), (tmp_path, {"subfolder": "root"})):
        whole = StitchableForImageClassification.from_pretrained(source, **place)
        torch.testing.assert_close(whole(x, stitch_id=4).logits, expected)
        for part in ({"stitch_id": 4}, {"max_flops": cheapest}):
            with pytest.raises(ValueError, match=r"an adapter of PEFT lies in .*; merge the adapters first"):
                StitchableForImageClassification.from_pretrained(source, **place, **part)
    (tmp_path / "root" / "adapter_model.safetensors").unlink()
    for part in ({}, {"stitch_id": 4}):
        with pytest.raises(OSError, match=r"has adapter_config\.json, but no adapter_model\.safetensors"):
            StitchableForImageClassification.from_pretrained(tmp_path / "root", **part)


@pytest.mark.slow
def test_without_peft_an_adapter_is_not_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    save_file({}, folder / "adapter_model.safetensors")
    assert "an adapter of PEFT lies in" in run_python(WITHOUT_PEFT, folder, cwd=tmp_path)


def test_an_index_names_only_files_beside_it(folder: Path, tmp_path: Path) -> None:
    secret = load_file(folder / "model-anchor-1.safetensors")
    assert "anchors.1.cls_token" in secret
    (folder / "model-anchor-1.safetensors").rename(tmp_path / "secret.safetensors")
    for place in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        names = dict.fromkeys(secret, place)
        change(folder / "model.safetensors.index.json", lambda index, names=names: index["weight_map"].update(names))
        for arguments in ({}, {"stitch_id": 4}):
            with pytest.raises(ValueError, match="is no index of weights: it names files of other folders"):
                StitchableForImageClassification.from_pretrained(folder, **arguments)


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize("load", [StitchableForImageClassification, AutoModelForImageClassification, AutoModel])
@pytest.mark.parametrize("part", [{}, {"stitch_id": 4}])
def test_no_secret_stays_on_a_model(load: Any, part: dict, folder: Path, tmp_path: Path) -> None:
    change(folder / "config.json", lambda config: config.update(token="", proxies={}, use_auth_token=""))
    model = load.from_pretrained(folder, token="hf_secret", proxies={"https": "http://me:hf_secret@proxy"}, **part)
    model.save_pretrained(tmp_path / "saved")
    for held in (model, model.config, model.hub_arguments, vars(model.config), model.extract(4)):
        assert b"hf_secret" not in pickle.dumps(held)
    assert all(b"hf_secret" not in path.read_bytes() for path in (tmp_path / "saved").iterdir())
    assert "hf_secret" not in f"{model.config}{vars(model)}"
    assert file_of(model, "sample.png") == str(folder / "sample.png")


# ---------------------------------------------------------------- figures


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_diverged_stitch_is_measured_saved_and_pushed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = make("vit"), images("vit", 10)
    with torch.no_grad():
        for parameter in model.get_stitching_layer(model.stitches[4].layers[0]).parameters():
            parameter.fill_(torch.nan)
    measured = evaluate(model, [{"pixel_values": x, "labels": torch.arange(10) % 5}])
    diverged = [i for i, figures in measured.items() if "loss" not in figures]
    shared = model.stitches[4].layers
    assert diverged == [stitch.id for stitch in model.stitches if stitch.layers == shared]
    assert {i: dict(stitch.metrics) for i, stitch in enumerate(model.stitches)} == measured
    strict(json.dumps(measured))
    save_repository(model, tmp_path / "model", image_processor(model.config), Card("tiny", accuracy_before={0: np.nan}))
    for path in (tmp_path / "model").glob("*.json"):
        assert "__float__" not in json.dumps(strict(path.read_text(encoding="utf-8"))), path
    strict(metadata_of(model)["preprocessing"])
    with pytest.raises(OfflineModeIsEnabled):
        push_folder(tmp_path / "model", "someone/tiny")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_figure_is_infinite(value: float, folder: Path) -> None:
    model = make("vit")
    everything = {"flops": value, "params": value, "latency_ms": value, "memory_mb": value}
    recorded = model.record(3, **everything, metrics={"accuracy": value, "loss": 2.0})
    assert recorded.to_dict() == {**recorded.to_dict(), "metrics": {"loss": 2.0}}
    assert not set(everything) & set(recorded.to_dict())
    assert model.config.stitches[3] == recorded.to_dict()
    # As checkpoints of before have it.
    change(folder / "config.json", lambda c: c["stitches"][3].update(everything, metrics={"accuracy": value}))
    config = StitchableConfig.from_pretrained(folder)
    assert config.stitches[3].keys() == {"id", "route", "layers"}
    run("calibrate", folder, "--num-runs", 1)
    strict((folder / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(OfflineModeIsEnabled):
        push_folder(folder, "someone/tiny")


@pytest.mark.parametrize("figure", ["<b>", "1", True, [1], 10**400])
def test_figures_of_a_config_are_numbers(figure: Any, folder: Path) -> None:
    entry = copy.deepcopy(json.loads((folder / "config.json").read_text(encoding="utf-8"))["stitches"][3])
    for changed in ({"flops": figure}, {"latency_ms": figure}, {"metrics": {"accuracy": figure}}, {"metrics": figure}):
        change(folder / "config.json", lambda c, changed=changed: c["stitches"].__setitem__(3, {**entry, **changed}))
        with pytest.raises(ValueError, match=r"stitches\[3\]\.\w+(\.accuracy)? must be (a number|a mapping by name)"):
            StitchableConfig.from_pretrained(folder)
        assert run("table", folder, status=1).startswith("error: stitches[3].")


def test_the_image_processor_of_a_checkpoint_is_what_transformers_loads(folder: Path) -> None:
    model = StitchableForImageClassification.from_pretrained(folder)
    assert processor_of(model).to_dict() == AutoImageProcessor.from_pretrained(folder).to_dict()


def test_every_promise_names_its_attacks() -> None:
    page = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    named = {name for bracket in re.findall(r"\[(`[^\]]*)\](?!\()", page) for name in re.findall(r"\w+", bracket)}
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(named) > 10
    assert {name for name in named if not any(name in test for test in tests)} == set()
