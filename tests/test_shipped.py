"""What travels with every checkpoint: small enough to be read first, and reaching for nothing at home."""

import ast
import sys
from pathlib import Path

import pytest

import stitchable.model
from families import SHIPPED, make
from stitchable.families import timm_functions

FOLDER = Path(stitchable.model.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
FUNCTIONS = Path(timm_functions.__file__)
"""Travels only with checkpoints that name a function of it."""

ALLOWED = {"torch", "timm", "transformers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
MOST_LINES, MOST_BYTES = 2_429, 128_150
"""Not to grow; the aim is 2,000 lines and 80 kB."""


def test_it_is_short() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    assert {path.name for path in FILES} == SHIPPED
    assert sum(text.count("\n") for text in texts) <= MOST_LINES
    assert sum(len(text.encode()) for text in texts) <= MOST_BYTES
    assert max(len(line) for text in texts for line in text.splitlines()) <= 120


@pytest.mark.parametrize(("name", "brings"), [("vit", set()), ("tnt", {FUNCTIONS.name})])
def test_functions_of_a_family_travel_with_its_checkpoints_only(name: str, brings: set[str], tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == SHIPPED | brings


@pytest.mark.parametrize("path", [*FILES, FUNCTIONS], ids=lambda path: path.name)
def test_it_imports_its_like_and_what_a_checkpoint_needs(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= ALLOWED
        if isinstance(node, ast.ImportFrom):
            if node.level:
                assert f"{node.module}.py" in SHIPPED
                assert node.level == 1
            else:
                assert node.module
                assert node.module.split(".")[0] in ALLOWED
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("__import__", "importlib.import_module", "import_module")


@pytest.mark.parametrize("name", ["routes.py", "schema.py"])
def test_routes_need_no_torch(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert "import torch" not in text
    assert "import transformers" not in text
