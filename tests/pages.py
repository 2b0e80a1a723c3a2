"""The Python blocks and command lines of the documentation: read from its pages, and run as a reader would run them.

How pages are written, so that they can be run:

- A block of `python` runs in the page's folder, after the blocks above it and with their names. A block of `text` right
  below it is what it prints, or the error that it ends with.
- A block of `sh` holds commands. A block of `console` holds commands after "$ " and below each what it prints; "error:"
  at its beginning says that the command fails.
- Blocks of data (`DATA`) are not run; a block without a language is refused.
- `...` in an output stands for anything, as in doctest.
- `<!-- numbers vary -->` above a block: its output differs by machine in its numbers only (times, what was trained).
- `<!-- slow -->` above a block: it takes more than a few seconds, and runs only in the slow test.
- What cannot run in the tests is listed in not_run.yaml, with the reason.

This file is also a program, `python pages.py FOLDER WHICH PAGE...`: it runs pages in FOLDER and prints what it found.
Each page has a folder of its own, where `FINDS` is put, and all have one Hub on this machine.
"""

import ast
import contextlib
import doctest
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "quickstart.ipynb")
)
"""Of the repository's folder."""
NOT_RUN: dict[str, str] = {
    text: entry["reason"]
    for entry in yaml.safe_load((ROOT / "tests" / "not_run.yaml").read_text(encoding="utf-8"))
    for text in entry["blocks"]
}
"""Commands, or the first lines of Python blocks, and why they are not run."""
ELSEWHERE = {"digit_mixer.py": ROOT / "examples" / "own_family" / "digit_mixer.py"}
FINDS: dict[str, list[str]] = {
    "README.md": ["runs/digits", "photos", "training"],
    "docs/budgets.md": ["runs/digits", "my-model", "digits-test"],
    "docs/deploy.md": ["runs/digits"],
    "docs/families.md": ["digit_mixer.py"],
    "docs/index.md": ["runs/digits", "photos"],
    "docs/publish.md": ["photos"],
    "docs/serve.md": ["runs/digits"],
    "docs/training.md": ["training", "photos"],
}
"""What the reader of a page has: the demo's checkpoint (its figures are those of its card, its weights random), a model
of timm's anchors, photos, labelled digits, files of the repository."""
DATA = {"text", "yaml", "json"}
PUBLIC_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Item:
    """A block of Python, or a command, with what it is said to print (None: nothing is said)."""

    page: str
    line: int
    is_python: bool
    text: str
    output: str | None = None
    slow: bool = False
    numbers_vary: bool = False

    @property
    def name(self) -> str:
        """As in not_run.yaml: a command as it is, a block of Python by its first line."""
        return self.text.splitlines()[0] if self.is_python else self.text

    def check(self, printed: str) -> str | None:
        """What is wrong with what was printed."""
        if self.output is None:
            return None
        want, got = (re.sub(r" +$", "", f"{text.strip()}\n", flags=re.M) for text in (self.output, printed))
        if self.numbers_vary:
            want, got = (re.sub(r"\d[\d,]*(\.\d+)?", "N", text) for text in (want, got))
        checker = doctest.OutputChecker()
        if checker.check_output(want, got, doctest.ELLIPSIS):
            return None
        return f"the page says\n{self.output.strip()}\nbut it is\n{printed.strip()}"


def read_page(page: str) -> list[Item]:
    """What there is to run on a page, in order.

    Raises:
        ValueError: a block without a language, or in one that is neither run nor data.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    return _read_notebook(page, text) if page.endswith(".ipynb") else _read_markdown(page, text)


def _read_notebook(page: str, text: str) -> list[Item]:
    items = []
    for number, cell in enumerate(json.loads(text)["cells"], start=1):
        if cell["cell_type"] == "code":
            output = "".join("".join(part.get("text", "")) for part in cell["outputs"])
            vary = "numbers-vary" in cell["metadata"].get("tags", ())
            items.append(Item(page, number, True, "".join(cell["source"]), output, numbers_vary=vary))
    return items


def _read_markdown(page: str, text: str) -> list[Item]:
    items: list[Item] = []
    above_output = -1  # the line where a block of Python ended
    for line, language, marks, body in _blocks(page, text):
        slow, vary = "slow" in marks, "numbers vary" in marks
        if language == "python":
            ast.parse(body)
            items.append(Item(page, line, True, body, None, slow, vary))
            above_output = line + body.count("\n") + 1
        elif language == "text" and 0 < line - above_output <= 3:
            last = items.pop()
            items.append(Item(page, last.line, True, last.text, body, last.slow or slow, last.numbers_vary or vary))
        elif language in ("sh", "console"):
            items += [Item(page, line, False, *command, slow, vary) for command in _commands(language, body)]
        elif language not in DATA:
            raise ValueError(f"{page}:{line}: a block in {language or 'no language'}")
    return items


def _blocks(page: str, text: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, language, marks and body of each fenced block."""
    lines, marks, number = text.splitlines(), "", 0
    while number < len(lines):
        fence = re.fullmatch(r"( *)(```+)([\w+-]*)", lines[number].rstrip())
        if fence is None:
            comment = re.fullmatch(r" *<!-- ([\w ,]+) -->", lines[number].rstrip())
            marks = comment[1] if comment else marks if not lines[number].strip() else ""
            number += 1
            continue
        indent, ticks, language = fence.groups()
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == ticks)
        body = "".join(f"{line.removeprefix(indent)}\n" for line in lines[number + 1 : end])
        yield number + 1, language, marks, body
        marks, number = "", end + 1


def _commands(language: str, body: str) -> Iterator[tuple[str, str | None]]:
    """Each command of a block in one line, without comments, and what it prints."""
    joined = re.sub(r" *\\\n *", " ", body)
    if language == "console":
        for part in re.split(r"^\$ ", joined, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield _without_comment(command), output
    else:
        yield from ((command, None) for line in joined.splitlines() if (command := _without_comment(line)))


def _without_comment(command: str) -> str:
    return re.sub(r"(^|\s+)# .*", "", command).strip()


# ---------------------------------------------------------------- running


def run_pages(folder: Path, pages: list[str], slow: bool) -> dict[str, Any]:
    """Run pages in a folder, each in one of its own. Without `slow`, what is marked so is left out."""
    from hub_server import TOKEN, Hub

    with Hub() as hub:
        # Before huggingface_hub is imported.
        os.environ |= {**hub.environment(folder / "cache"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        _make(folder / "made", hub)
        done, wrong = [], []
        at_first = dict(hub.repositories)
        for page in pages:
            hub.repositories = dict(at_first)
            place = folder / page
            place.mkdir(parents=True)
            for name in FINDS.get(page, ()):
                (place / name).parent.mkdir(exist_ok=True)
                source = folder / "made" / name
                if source.exists():
                    shutil.copytree(source, place / name)
                else:
                    (place / name).symlink_to(ELSEWHERE.get(name, ROOT / name))
            for item, error in _run(page, place, hub.url, slow):
                done.append([item.page, item.line, item.name])
                if error:
                    wrong.append(f"{item.page}:{item.line}: {item.name}\n{error}")
    return {"done": done, "wrong": wrong}


def _run(page: str, place: Path, hub_url: str, slow: bool) -> Iterator[tuple[Item, str | None]]:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    names: dict[str, Any] = {"__name__": "__main__"}
    with _inside(place):
        for item in read_page(page):
            if item.name in NOT_RUN or (item.slow and not slow):
                continue
            try:
                printed = run_block(item, names) if item.is_python else run_command(item)
            except BaseException:  # also what ends a process
                yield item, traceback.format_exc(limit=-3)
                break
            yield item, item.check(printed.replace(hub_url, PUBLIC_HUB))


@contextlib.contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
        os.chdir(before)


def run_block(item: Item, names: dict[str, Any]) -> str:
    """What a block of Python prints, or the error that it is said to end with."""
    stdout = io.StringIO()
    last = item.output.strip().splitlines()[-1] if item.output and item.output.strip() else ""
    try:
        with contextlib.redirect_stdout(stdout):
            exec(compile(item.text, f"{item.page}:{item.line}", "exec"), names)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if not last.startswith(type(error).__name__):
            raise
        return f"{stdout.getvalue()}{said}"
    return stdout.getvalue()


def run_command(item: Item) -> str:
    """What a command prints: one of stitchable in this process, another in a shell."""
    fails = (item.output or "").startswith("error:")
    if re.match(r"stitchable [^|;&>]+$", item.text):
        from typer.testing import CliRunner

        from stitchable_cli import app

        result = CliRunner().invoke(app, shlex.split(item.text)[1:])
        code, stdout, stderr = result.exit_code, result.stdout, result.stderr
    else:
        shell = subprocess.run(["bash", "-c", item.text], capture_output=True, text=True, check=False)
        code, stdout, stderr = shell.returncode, shell.stdout, shell.stderr
    if (code != 0) is not fails:
        raise AssertionError(f"exit status {code}\n{stdout[-2000:]}\n{stderr[-4000:]}")
    return stderr if fails else stdout


def _make(folder: Path, hub: Any) -> None:
    """What pages find, and timm's weights, which are random here, and a data set on the Hub of this machine."""
    import datasets
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save
    from sklearn.datasets import load_digits

    import stitchable
    from hub_server import Repository
    from stitchable import StitchableForImageClassification
    from stitchable.card import Card
    from stitchable.processing import image_processor
    from stitchable.publishing import save_repository

    torch.manual_seed(0)
    for name in ("test_vit", "test_vit3"):
        repository = Repository()
        repository.commit("main", {"model.safetensors": save(timm.create_model(name).state_dict())}, "")
        hub.repositories[f"timm/{name}.{timm.get_pretrained_cfg(name).tag}"] = repository
    model = stitchable.from_anchors(["test_vit", "test_vit3"])
    save_repository(model, folder / "my-model", image_processor(model.config), Card("my-model"))
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "digits.yaml").read_text(encoding="utf-8"))
    data = recipe["data"]
    settings = {"image_mean": data["image_mean"], "image_std": data["image_std"]}
    config = stitchable.make_config(recipe["anchors"], id2label={i: str(i) for i in range(10)}, **settings)
    table = json.loads((ROOT / "model_cards" / recipe["name"] / "stitches.json").read_text(encoding="utf-8"))
    config.stitches, config.cascades = table["stitches"], table["cascades"]
    model = StitchableForImageClassification(config)
    save_repository(
        model, folder / "runs" / "digits", image_processor(config, crop_pct=data["crop_pct"]), Card("digits")
    )
    digits = load_digits()
    pictures = [Image.fromarray((pixels * 15).astype("uint8")) for pixels in digits.images[:40]]
    for number, picture in enumerate(pictures):
        _save(picture, folder, "digits-test", digits.target[number], number)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    columns = {"image": pictures, "label": digits.target[:40]}
    file = io.BytesIO()
    datasets.Dataset.from_dict(columns, features).to_parquet(file)
    repository = Repository()
    repository.commit("main", {"data/test-00000-of-00001.parquet": file.getvalue()}, "")
    hub.repositories["datasets/someone/digits"] = repository
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype="uint8")
    for number in range(30):
        _save(Image.fromarray(noise[number]), folder, "photos", "holiday", number)


def _save(image: Any, *names: object) -> None:
    path = Path(*map(str, names)).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    result = run_pages(Path(sys.argv[1]), sys.argv[3:], slow=sys.argv[2] == "slow")
    print(json.dumps(result))
