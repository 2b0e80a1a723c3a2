"""Every Python block and command line of the documentation is run, and prints what the page shows (see pages.py)."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pages
import stitchable
from pages import NOT_RUN, PAGES, ROOT, Item, read_page

ITEMS = [item for page in PAGES for item in read_page(page)]


def run(folder: Path, which: str, names: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", pages.__file__, str(folder), which, *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def ran(items: list[Item]) -> set[tuple[str, int, str]]:
    return {(item.page, item.line, item.name) for item in items if item.name not in NOT_RUN}


def test_what_the_pages_show_runs_and_prints_what_they_say(tmp_path) -> None:
    result = run(tmp_path, "quick", PAGES)
    assert result["wrong"] == [], "\n\n".join(result["wrong"])
    assert {tuple(name) for name in result["done"]} == ran([item for item in ITEMS if not item.slow])


@pytest.mark.slow
def test_what_takes_longer_does_too(tmp_path) -> None:
    names = sorted({item.page for item in ITEMS if item.slow})
    result = run(tmp_path, "slow", names)
    assert result["wrong"] == [], "\n\n".join(result["wrong"])
    assert {tuple(name) for name in result["done"]} == ran([item for item in ITEMS if item.page in names])


def test_nothing_is_left_out_that_is_not_on_a_page() -> None:
    assert set(NOT_RUN) <= {item.name for item in ITEMS}
    assert all(reason.strip() for reason in NOT_RUN.values())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```\nmake test\n```\n", "page.md:1: a block in no language"),
        ("```bash\nmake test\n```\n", "page.md:1: a block in bash"),
    ],
)
def test_a_block_that_would_not_be_run_is_refused(block, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(block, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_page("page.md")


PAGE = """
```python
print(1 + 1)
```

<!-- numbers vary -->
```text
3
```

```console
$ echo one \\
      two  # a remark
one two
$ echo 12.5 ms
...
```

<!-- slow -->
```sh
# a remark
ls "#1"
```

```yaml
key: value
```
"""


def test_how_a_page_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    items = read_page("page.md")
    assert [(item.text, item.output, item.slow) for item in items] == [
        ("print(1 + 1)\n", "3\n", False),
        ("echo one two", "one two\n", False),
        ("echo 12.5 ms", "...\n", False),
        ('ls "#1"', None, True),
    ]
    assert items[0].check("2") is None
    assert items[0].check("two") == "the page says\n3\nbut it is\ntwo"
    assert pages.run_command(items[1]) == "one two\n"
    assert items[1].check("one  two") is not None
    assert items[2].check("12.5 ms\n") is None


def test_what_goes_wrong_on_a_page_is_found() -> None:
    wrong = Item("page.md", 1, True, "print('before')\nint('x')", "before\nValueError: invalid literal ...\n")
    assert wrong.check(pages.run_block(wrong, {})) is None
    with pytest.raises(ValueError, match="invalid literal"):
        pages.run_block(Item("page.md", 1, True, "int('x')", "TypeError: ..."), {})
    with pytest.raises(AssertionError, match="exit status 3"):
        pages.run_command(Item("page.md", 1, False, "exit 3"))
    with pytest.raises(AssertionError, match="exit status 0"):
        pages.run_command(Item("page.md", 1, False, "true", "error: no"))


def test_the_reference_has_every_public_name() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in set(stitchable.__all__) - {"__version__"}:
        assert f"::: stitchable.{name}\n" in reference, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_commands_within_sentences_name_files_that_there_are() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(r"`(?:python|accelerate launch) ([\w/]+\.py)", text):
            assert (ROOT / path).is_file(), f"{page}: {path}"
        for target in re.findall(r"`make ([\w-]+)", text):
            assert f"\n{target}: " in (ROOT / "Makefile").read_text(encoding="utf-8"), f"{page}: make {target}"
