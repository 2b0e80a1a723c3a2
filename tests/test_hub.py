"""A real push to a Hub on the loopback interface, and every way to load from it in a process without stitchable."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load

from families import SHIPPED
from hub_server import TOKEN, Hub
from processes import run_python

TESTS = Path(__file__).parent
REPO = "someone/tiny"
FILES = {
    *(".gitattributes", "README.md", "accuracy_flops.png", "sample.png"),
    *SHIPPED,
    *("config.json", "preprocessor_config.json", "model.safetensors.index.json"),
    *("model-anchor-0.safetensors", "model-anchor-1.safetensors", "model-stitching-layers.safetensors"),
    *(".eval_results/stitch-0.yaml", ".eval_results/stitch-1.yaml", ".eval_results/stitch-6.yaml"),
}

CONTROL = """
import os, urllib.request
def control(command):
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/control/" + command, b""))
def said(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, "|", " ".join(str(error).split()))
    else:
        print("nothing is wrong")
"""

PUSH = f"""{CONTROL}
import torch
from families import images, make
from huggingface_hub import HfApi
from stitchable import StitchableForImageClassification
from stitchable.card import Card
from stitchable.processing import image_processor
from stitchable.publishing import push_folder

model = make("vit", id2label={{i: f"class {{i}}" for i in range(5)}})
for stitch in model.stitches:
    model.record(stitch.id, metrics={{"accuracy": 0.9 if stitch.id == 6 else 0.5}})
Card("tiny", "someone/noise", license="apache-2.0", recipe="seed: 1\\n").store(model.config)
model.push_to_hub("{REPO}", private=True, commit_message="First", processor=image_processor(model.config, crop_pct=0.9))
x = images("vit")
torch.save((x, {{s.id: model(x, stitch_id=s.id).logits.detach() for s in model.stitches}}), "logits.pt")
loaded = StitchableForImageClassification.from_pretrained("{REPO}")
loaded.push_to_hub("{REPO}")  # changes nothing

folder = HfApi().snapshot_download("{REPO}", local_dir="local")
card = open("local/README.md", encoding="utf-8").read()
edited = card.replace("library_name", "language: en\\nlibrary_name") + "\\n## From its author\\n\\nMind the gap.\\n"
HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="{REPO}")
HfApi().upload_file(path_or_fileobj=b"old", path_in_repo="model.safetensors", repo_id="{REPO}")
open("local/README.md", "w", encoding="utf-8").write(card.replace("50.00 %", "25.00 %", 1))
control("break/0")
push_folder("local", "{REPO}", commit_message="Again")
push_folder("local", "{REPO}", commit_message="Tagged", tags=["tiny"])
push_folder("local", "{REPO}", tags=["tiny"])
# Files of a cache are links. The same is there, of which a new branch begins.
push_folder(HfApi().snapshot_download("{REPO}"), "{REPO}", revision="trial", tags=["tiny"])
said(lambda: push_folder("local", "{REPO}", token=False))
said(lambda: push_folder("cache", "{REPO}"))
"""

LOAD = f"""{CONTROL}
import sys
sys.modules["stitchable"] = None
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from transformers.utils import logging
logging.disable_progress_bar()

x, logits = torch.load("logits.pt")
def load(auto=AutoModelForImageClassification, repo="{REPO}", **arguments):
    return auto.from_pretrained(repo, trust_remote_code=True, **arguments)

control("mark/alone")
alone = load(stitch_id=0)
control("mark/whole")
assert [stitch.id for stitch in alone.stitches] == [0]
with torch.no_grad():
    assert torch.equal(alone(x).logits, logits[0])
control("break/1")
model = load()
with torch.no_grad():
    for i, expected in logits.items():
        assert torch.equal(model(x, stitch_id=i).logits, expected), i
config = load(AutoConfig)
assert load(AutoModel, max_flops=1e5)(x).pooler_output.ndim == 2
assert AutoImageProcessor.from_pretrained("{REPO}").size["shortest_edge"] == 35
folder = snapshot_download("{REPO}")
classify = pipeline("image-classification", model="{REPO}", trust_remote_code=True)
answers = classify(folder + "/sample.png", top_k=2)
assert {{answer["label"] for answer in answers}} <= set(config.id2label.values()), answers
with torch.no_grad():
    assert torch.equal(load(repo=folder, stitch_id=4)(x).logits, logits[4])
assert "transformers_modules" in type(model).__module__
said(lambda: load(repo="someone/absent"))
said(lambda: load(revision="absent"))
"""


PUSH_AGAIN = f"""
import sys
sys.modules["stitchable"] = None
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("{REPO}", trust_remote_code=True)
with torch.no_grad():
    model.anchors[0].head.bias.fill_(7)
model.push_to_hub("someone/again", private=True, commit_message="Tuned")
try:
    model.push_to_hub("someone/again", processor=None)
except ValueError as error:
    print(error)
"""


def python(code: str, hub: Hub, folder: Path, **variables: str) -> list[str]:
    environment = {**hub.environment(folder / "cache"), "PYTHONPATH": str(TESTS), **variables}
    return run_python(code, cwd=folder, **environment).splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.said = python(PUSH, hub, folder, HF_TOKEN=TOKEN)
        yield hub


def test_a_push_is_one_commit_and_the_same_again_is_none(hub: Hub) -> None:
    repository = hub.repositories[REPO]
    assert repository.private
    created, *pushes = repository.branches["main"]
    # Two of the author's are between; a connection that broke off left nothing, and the library tried again.
    titles = [repository.messages[commit].split()[0] for commit in pushes]
    assert titles == ["First", "Upload", "Upload", "Again", "Tagged"]
    assert repository.trees[created].keys() == {".gitattributes"}
    assert repository.trees[pushes[0]].keys() == FILES
    assert "model.safetensors" in repository.trees[pushes[2]]
    assert repository.trees[pushes[3]].keys() == FILES  # the old weights are gone, which would have been loaded first
    assert repository.branches["trial"] == [created, *pushes]


def test_nothing_of_the_card_is_lost(hub: Hub) -> None:
    repository = hub.repositories[REPO]
    pushed, again = (repository.trees[repository.branches["main"][place]] for place in (1, -1))
    first, second = (ModelCard(tree["README.md"].decode()) for tree in (pushed, again))
    assert (first.data.license, first.data.datasets) == ("apache-2.0", ["someone/noise"])
    assert "seed: 1" in first.text
    assert "stitch 6: " in first.text.split("it prints")[1]  # the snippet was run
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in first.text
    results = {result.metric_args["stitch_id"]: result.metric_value for result in second.data.eval_results}
    assert results == {6: 0.9, **dict.fromkeys((0, 1, 2, 3, 4, 5, 7, 8), 0.5)}
    assert "25.00 %" in second.text  # what is new is there
    assert (second.data.language, second.data.tags[-1]) == ("en", "tiny")
    assert second.text.endswith("## From its author\n\nMind the gap.\n")
    assert b"value: 90.0" in again[".eval_results/stitch-6.yaml"]


def test_it_loads_where_stitchable_is_not_installed_and_only_what_is_needed(hub: Hub, folder: Path, tmp_path) -> None:
    (tmp_path / "logits.pt").write_bytes((folder / "logits.pt").read_bytes())
    absent, no_revision = python(LOAD, hub, tmp_path)
    weights = {name: size for name, size in hub.downloads("alone").items() if name.endswith(".safetensors")}
    tree = hub.repositories[REPO].trees[hub.repositories[REPO].branches["main"][-1]]
    assert weights == {"model-anchor-0.safetensors": len(tree["model-anchor-0.safetensors"])}
    whole = {name for name in hub.downloads("whole") if name.endswith(".safetensors")}
    assert {"model-anchor-1.safetensors", "model-stitching-layers.safetensors"} == whole
    assert absent.startswith("OSError | someone/absent is not a local folder and is not a valid model identifier")
    assert no_revision.startswith("OSError | absent is not a valid git identifier")


def test_a_model_is_pushed_where_stitchable_is_not_installed_as_the_folder_it_came_from(hub: Hub, tmp_path) -> None:
    (refused,) = python(PUSH_AGAIN, hub, tmp_path, HF_TOKEN=TOKEN)
    assert refused == "push_to_hub has no option 'processor' where stitchable is not imported"
    old, new = (hub.repositories[name] for name in (REPO, "someone/again"))
    before, after = (repository.trees[repository.branches["main"][-1]] for repository in (old, new))
    assert new.private
    assert new.messages[new.branches["main"][-1]].split()[0] == "Tuned"
    assert after.keys() == FILES
    changed = {name for name in FILES - {".gitattributes"} if before[name] != after[name]}
    assert changed - {"config.json"} == {"model-anchor-0.safetensors"}
    bias = load(after["model-anchor-0.safetensors"])["anchors.0.head.bias"]
    assert torch.equal(bias, torch.full_like(bias, 7))


def test_what_cannot_be_pushed_is_said(hub: Hub) -> None:
    unauthorised, no_checkpoint = hub.said
    assert unauthorised.startswith("HfHubHTTPError | Client error '401 Unauthorized'")
    assert no_checkpoint.startswith("ValueError | cache is no checkpoint of a stitchable model")
