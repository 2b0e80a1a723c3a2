"""Text files are written and read in UTF-8, whatever the locale is; Windows has others."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for name in ("src", "training", "benchmarks", "examples", "tests") for path in ROOT.glob(f"{name}/**/*.py")
)


def without_encoding(code: str) -> list[int]:
    """The lines of calls that open a text file without saying its encoding."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _opens_text(call) and not any(k.arg == "encoding" for k in call.keywords)]


def _opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    # The mode comes second to the function, first to the method of a path; Image.open and others have a path there.
    modes = [k.value for k in call.keywords if k.arg == "mode"] or call.args[isinstance(call.func, ast.Name) :][:1]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None if modes else "r"
    return name == "open" and isinstance(mode, str) and re.fullmatch("[rwaxt+]+", mode) is not None


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = {path: without_encoding(path.read_text(encoding="utf-8")) for path in FILES}
    assert [f"{path.relative_to(ROOT)}:{line}" for path, lines in found.items() for line in lines] == []


@pytest.mark.parametrize(
    "call",
    [
        *("open(path)", "open(path, 'w')", "open(path, mode='r+')"),
        *("path.open()", "path.open('a', buffering=1)", "path.read_text()", "Path(path).write_text(text)"),
    ],
)
def test_what_opens_text_is_known(call: str) -> None:
    assert without_encoding(f"x = 1\n{call}") == [2]
    assert without_encoding(f"{call[:-1]}{'' if call.endswith('()') else ', '}encoding='utf-8')") == []


@pytest.mark.parametrize(
    "call", ["open(path, 'rb')", "path.open('wb')", "Image.open(path)", "tarfile.open(f'{x}.tar', 'w')", "read()"]
)
def test_what_opens_no_text_is_left_alone(call: str) -> None:
    assert without_encoding(call) == []
