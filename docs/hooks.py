"""For mkdocs: SECURITY.md is a page of the site, and links that leave docs/ are names of files in the repository.

A reader of the files on disk or on a forge can follow such a link; the site has no copy of the repository.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the page about security, which lies where forges look for it."""
    files.append(File.generated(config, "security.md", abs_src_path=str(ROOT / "SECURITY.md")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leave of a link to a file of the repository its text, if there is such a file."""
    folder = Path(page.file.abs_src_path).parent

    def without_link(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(DOCS) and str(target.relative_to(DOCS)) in files.src_uris:
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {link[2]}")
        return link[1] if link[1].startswith("`") else f"{link[1]} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(without_link, markdown)
